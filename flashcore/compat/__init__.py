"""FlashCore under other packages' function names, for programs that are written for them."""

from flashcore.compat import flash_attn, flash_attn_interface

__all__ = ["flash_attn", "flash_attn_interface"]
