"""FlashCore behind other names: PyTorch's SDPA, Hugging Face Transformers. Import the module that you need."""
