"""The decoder's layers on tokens that follow those in a cache: what Megatron's compute, without what it does around it.

At each call its blocks and layers prepare for training, offload, recorded graphs and 8-bit floats, none of which there
are here; in a step of a small model that costs more than all of its products.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.deepstack import take_features, with_unused
from nemo_vlm.mcore.linear import multiply
from nemo_vlm.mcore.rotary import turns


def decode_cached(
    gpt: GPTModel, embeddings: Tensor | None, width: int, cache: Cache, positions: Tensor | None = None
) -> Tensor:
    """Run this stage's layers on tokens that follow those in the cache, which grows by them.

    Args:
        embeddings: [s, b, h] on the first stage; elsewhere None, the schedule has set the input.
        width: s.
        positions: [3, b, s] of prompts, where the model has M-RoPE.
    Returns:
        On the last stage the logits [b, 1, vocab / tp] behind the last token of each row, elsewhere hidden states.
    """
    cache.rotate_by(cached_turns(gpt, width, cache, positions), gpt.config.params_dtype)
    embeddings, features = take_features(gpt, embeddings)
    hidden = run_layers(gpt.decoder, gpt.decoder.input_tensor if embeddings is None else embeddings, features, cache)
    if not gpt.post_process:
        return with_unused(gpt, hidden, features)
    tied = gpt.share_embeddings_and_output_weights
    weight = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
    return multiply(cache.last(hidden), weight).transpose(0, 1)


def run_layers(decoder: Any, hidden: Tensor, features: Tensor | None, cache: Cache) -> Tensor:
    """Hidden states [s, b, h] behind this stage's layers, the first of which add DeepStack's features [s, b, n h]."""
    width = hidden.shape[-1]
    for layer in decoder.layers:
        attention = layer.self_attention
        parts = attention.get_query_key_value_tensors(layer.input_layernorm(hidden))
        heads = cache.attend(layer.layer_number, *(part.permute(1, 2, 0, 3) for part in parts))
        hidden = add(hidden, *attention.linear_proj(heads.permute(2, 0, 1, 3).flatten(2)))
        hidden = add(hidden, *layer.mlp(layer.pre_mlp_layernorm(hidden), padding_mask=None))
        if features is not None and features.shape[-1]:
            hidden, features = hidden + features[..., :width], features[..., width:]
    return hidden if decoder.final_layernorm is None else decoder.final_layernorm(hidden)


def add(hidden: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
    """What a part of a layer makes, onto what it was made of."""
    return hidden + (output if bias is None else output + bias)


def cached_turns(gpt: GPTModel, width: int, cache: Cache, positions: Tensor | None) -> Tensor:
    """The turns [s, b or 1, 1, 2 d] of this pass's tokens; M-RoPE's three axes are equal behind a prompt."""
    if gpt.position_embedding_type != "mrope":
        angles = RotaryEmbedding.forward(gpt.rotary_pos_emb, cache.capacity)
        return turns(angles[:, 0, :, : angles.shape[-1] // 2][cache.positions(width)])
    if positions is None:
        positions = cache.positions(width).T.expand(3, -1, -1)
    else:
        cache.count_on(positions)
    return gpt.rotary_pos_emb(positions, gpt.mrope_section)
