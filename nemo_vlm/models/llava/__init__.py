"""LLaVA 1.5: a CLIP or SigLIP vision tower, a projector, a Llama-style language model (arXiv:2310.03744)."""
