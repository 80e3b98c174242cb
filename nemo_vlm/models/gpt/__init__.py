"""Text-only language models: Llama, Qwen2.5, Qwen3 (dense) and their kin."""
