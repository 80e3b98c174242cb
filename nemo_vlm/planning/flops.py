"""Floating-point operations of a training step, for TFLOP/s and MFU.

A multiply-add counts as two. Attention counts only where it is not masked, the output over every token, and of experts
those that a token is sent to; embedding look-ups, norms and what is recomputed count nothing. A part that trains takes
a forward pass and two backward, by its input and by its weights. One that is frozen takes the first of these where
something below it trains, and none where nothing does. So does NVIDIA count, and MFU is this over the dense bf16 peak.
"""

from __future__ import annotations

from nemo_vlm.config import LanguageConfig

Parts = dict[str, float]  # FLOPs by part of the model, in the order of a forward pass


def step_flops(
    model: LanguageConfig,
    num_tokens: float,
    squared_lengths: float,
    num_patches: float = 0.0,
    squared_frames: float = 0.0,
    adapters: bool = False,
    kept_patches: float = 0.0,
) -> float:
    """FLOPs of forward and backward over a global batch, as Batch.counts describes it.

    Args:
        squared_lengths: the sum of the samples' squared lengths, in tokens.
        squared_frames: the sum of the squared numbers of patches of images and frames.
        adapters: the language model and the tower are frozen, and low-rank adapters train.
        kept_patches: beside the others, those whose features were kept: the tower is not run on them.
    """
    forward = forward_flops(model, num_tokens, squared_lengths, num_patches, squared_frames)
    forward["projector"] += model.projector_flops(kept_patches)
    times = passes(model, adapters)
    return sum(flops * times[part] for part, flops in forward.items())


def forward_flops(
    model: LanguageConfig, num_tokens: float, squared_lengths: float, num_patches: float, squared_frames: float
) -> Parts:
    """FLOPs of the forward pass: `decoder` is its layers' products with weights, `attention` those without."""
    projector = model.projector_flops(num_patches)
    layer = attention_weights(model) + ffn_weights(model)
    width = model.num_attention_heads * model.kv_channels  # type: ignore[operator]
    return {
        "vision": model.vision_flops(num_patches, squared_frames) - projector,
        "projector": projector,
        "decoder": 2 * num_tokens * model.num_layers * layer,
        "attention": 2 * model.num_layers * width * squared_lengths,  # two products over half of the square
        "output": 2 * num_tokens * model.hidden_size * (model.vocab_size or 0),
    }


def passes(model: LanguageConfig, adapters: bool) -> dict[str, int]:
    """Passes that each part takes, the forward one counted: 1, 2 or 3."""
    frozen = {name: part.freeze for name, part in model.parts.items()}
    vision = bool(frozen) and not (frozen["vision_model"] or adapters)
    projector = bool(frozen) and not frozen["vision_projection"]
    language = not (adapters or frozen.get("language_model"))
    decoder = 3 if language else 2
    return {
        "vision": 3 if vision else 1,
        "projector": 3 if projector else 1 + vision,
        "decoder": decoder,
        "attention": 3,
        "output": decoder,
    }


def attention_weights(model: LanguageConfig) -> int:
    """Of a layer's projections to queries, keys and values, and back."""
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    return model.hidden_size * size * 2 * (heads + groups)  # type: ignore[operator]


def ffn_weights(model: LanguageConfig) -> int:
    """Those that one token passes in a layer's FFN: of experts the router's, and those of the experts it chooses."""
    if model.num_moe_experts is None:
        return 3 * model.hidden_size * model.ffn_hidden_size
    chosen = 3 * model.moe_router_topk * model.moe_ffn_hidden_size  # type: ignore[operator]
    return model.hidden_size * (model.num_moe_experts + chosen)
