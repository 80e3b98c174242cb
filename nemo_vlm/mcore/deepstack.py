"""DeepStack (arXiv:2406.04334): features of several depths of the vision tower, added in the decoder's first layers.

They travel with the hidden state, [s, b, (1 + K) h]: behind it stands what the next layer adds, then the layer behind
that, zero but at visual positions. What splits and sends hidden states, sequence and context parallelism and the
pipeline, so takes them along, and a stage sees by the width how many are left, whatever layers it has.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_vlm.mcore.decoder_layer import DecoderLayer


class DeepStackLayer(DecoderLayer):
    """A layer that adds the first features to its output.

    They come as context, which is meant for cross-attention, of which it has none: Megatron hands that from layer to
    layer, and through recomputation.
    """

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [s, b, h] and features [s, b, n h] -> hidden states, features [s, b, (n - 1) h]; None: none."""
        hidden, _ = super().forward(hidden_states, **rest)
        if context is None:
            return hidden, None
        width = hidden.shape[-1]
        left = context[..., width:] if context.shape[-1] > width else None
        return hidden + context[..., :width], left


def take_features(gpt: GPTModel, embeddings: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Part what this stage gets, embeddings on the first and else its input, into hidden states and features.

    Returns:
        the hidden states on the first stage; elsewhere None, they are set as its input. Features, or None.
    """
    width = gpt.config.hidden_size
    both = embeddings if gpt.pre_process else gpt.decoder.input_tensor
    if both is None or both.shape[-1] == width:
        return embeddings, None
    hidden = both[..., :width].contiguous()
    if gpt.pre_process:
        return hidden, both[..., width:]
    gpt.decoder.set_input_tensor(hidden)
    return None, both[..., width:]


def with_unused(gpt: GPTModel, output: Tensor, features: Tensor | None) -> Tensor:
    """What the next stage gets: this one's output, and behind it those features that its layers have not added."""
    used = len(gpt.decoder.layers) * gpt.config.hidden_size
    if gpt.post_process or features is None or features.shape[-1] <= used:
        return output
    return torch.cat([output, features[..., used:]], -1)
