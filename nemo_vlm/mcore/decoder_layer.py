"""The decoder's layers, of which the last one's MLP is spared the positions that nobody looks at.

In tuning most positions have no label. The last layer's attention needs them all, as keys and values; what stands
behind it is by position, and without a label nothing reads it.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DecoderLayer(TransformerLayer):
    """Megatron's layer. The positions come as context_mask, which is meant for cross-attention, of which it has none:
    Megatron hands that to each layer, and through recomputation.
    """

    def _forward_attention(
        self, *args: Any, context_mask: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [s, b, h], of the last layer [n, 1, h] where it is given the positions [n] among [s * b]."""
        hidden, context = super()._forward_attention(*args, **rest)
        if context_mask is not None and self.layer_number == self.config.num_layers:
            hidden = hidden.flatten(0, 1).index_select(0, context_mask)[:, None]
        return hidden, context


def can_pick(gpt: GPTModel, features: Tensor | None) -> bool:
    """Whether this stage's last layer may leave positions out.

    Not where they count or must come in certain numbers: to routers, to sequence parallelism's parts, to 8-bit products
    and recorded graphs; nor where DeepStack's features are added behind the MLP.
    """
    config, width = gpt.config, len(gpt.decoder.layers) * gpt.config.hidden_size
    every = config.num_moe_experts or config.sequence_parallel or config.fp8 or config.cuda_graph_impl != "none"
    return gpt.post_process and not every and (features is None or features.shape[-1] < width)
