"""Qwen2-VL: a tower that sees in any resolution, a merger, a Qwen2 with positions on three axes (arXiv:2409.12191)."""
