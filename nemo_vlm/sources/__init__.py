"""Models on disk, whatever the format: configuration, tensors under our names, tokenizer."""
