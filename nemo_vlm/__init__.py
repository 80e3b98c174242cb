"""nemo_vlm: train, convert, serve and evaluate vision-language models on Megatron-Core."""

__version__ = "0.1.0"
