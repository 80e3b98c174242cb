"""Tensor parallelism's communication beside the products it belongs to, through buffers of Transformer Engine's."""

from __future__ import annotations

from nemo_vlm.config import StepConfig
from nemo_vlm.layout import Layout


def start(step: StepConfig, layout: Layout, row_length: int, hidden_size: int) -> None:
    """Make the buffers, before the modules that use them; as Megatron's training/initialize.py does.

    Args:
        row_length: tokens of each row of a micro-batch, which are the same in all of them.
    """
    from transformer_engine.pytorch.module import base  # not on machines without CUDA

    modes = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[row_length * layout.micro_batch_size // layout.context, hidden_size],
        tp_size=layout.tensor,
        quantization_modes=[modes.FP8 if step.fp8 else modes.NONE],
        bootstrap_backend="nccl",
    )
