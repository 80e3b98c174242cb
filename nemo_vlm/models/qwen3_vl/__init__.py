"""Qwen3-VL, dense and MoE: features of several depths of the tower in the decoder's first layers (arXiv:2511.21631)."""
