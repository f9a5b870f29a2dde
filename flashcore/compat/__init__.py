"""FlashCore under other packages' function names, for programs that are written for them."""
