"""Floating-point operations of a training step, for TFLOP/s and MFU.

A multiply-add counts as two; the backward pass as two forwards; attention only where it is not masked; recomputation
is not counted. Embedding look-ups cost nothing, and of experts those count that a token is sent to.
"""

from __future__ import annotations

from nemo_vlm.config import LanguageConfig

# Dense bf16 TFLOP/s by name of device, from the vendor's data sheets.
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "B200": 2250.0}


def peak_tflops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def step_flops(
    model: LanguageConfig,
    num_tokens: float,
    squared_lengths: float,
    num_patches: float = 0.0,
    squared_frames: float = 0.0,
) -> float:
    """FLOPs of forward and backward over a global batch, as Batch.counts describes it.

    Args:
        squared_lengths: the sum of the samples' squared lengths, in tokens.
        squared_frames: the sum of the squared numbers of patches of images and frames.
    """
    width = model.num_attention_heads * model.kv_channels  # type: ignore[operator]
    attention_weights = model.hidden_size * (2 * width + 2 * model.num_query_groups * model.kv_channels)  # type: ignore[operator]
    layer = attention_weights + ffn_weights(model)
    matmuls = 2 * num_tokens * (model.num_layers * layer + model.hidden_size * (model.vocab_size or 0))
    attention = 2 * model.num_layers * width * squared_lengths  # two matmuls over half of the square
    return 3 * (matmuls + attention + model.vision_flops(num_patches, squared_frames))


def ffn_weights(model: LanguageConfig) -> int:
    """Those that one token passes in a layer's FFN: of experts the router's, and those of the experts it chooses."""
    if model.num_moe_experts is None:
        return 3 * model.hidden_size * model.ffn_hidden_size
    chosen = 3 * model.moe_router_topk * model.moe_ffn_hidden_size  # type: ignore[operator]
    return model.hidden_size * (model.num_moe_experts + chosen)
