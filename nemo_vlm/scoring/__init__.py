"""Scores by other people's harnesses, in whose environments this runs: no Hydra, no Lightning, no Megatron."""
