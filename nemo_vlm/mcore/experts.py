"""Experts in the place of a layer's FFN: Megatron's MoE layer with a router that counts, and is alike in all layouts.

Megatron weighs the auxiliary loss of a micro-batch by its tokens; here it weighs as much as the micro-batch's own loss,
so that both are means over the global batch whatever ranks, stages or recomputation it is trained on. The weights
travel as Megatron's padding_mask, which recomputation hands to a layer once more; layers that it does not recompute get
no mask then, and find them on their router.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_vlm.batch import IGNORE_INDEX, Batch
from nemo_vlm.mcore import cpu
from nemo_vlm.mcore.linear import ColumnLinear, RowLinear

PADDING = -1.0  # in the place of a loss's weight


@dataclass(frozen=True)
class ExpertLoads:
    """What the routers of all decoder layers did in one step, over the global batch.

    Attributes:
        tokens: [layers, experts] float64, on the CPU: tokens that were sent to each; neither padding counts, nor what
            stands for a record that was left out.
        aux_loss: [layers] float64: E * sum over experts of f * P, at least about 1 where all are even (Switch
            Transformer, arXiv:2101.03961, equation 4; f counts each of a token's top-k as 1 / k); nan where no token
            is trained.
    """

    tokens: Tensor
    aux_loss: Tensor


def expert_spec(config: TransformerConfig, with_engine: bool) -> ModuleSpec | type[MoELayer]:
    """The layer's MLP: experts one by one, or Transformer Engine's grouped products of all that a rank holds."""
    if not with_engine:
        return ExpertLayer
    spec: Any = get_moe_module_spec_for_backend(TESpecProvider(), config.num_moe_experts, config.moe_grouped_gemm)
    spec.submodules.router = Router
    return spec


class ExpertLayer(MoELayer):
    """Megatron's with experts one by one, which sends tokens nowhere where a rank that does not train has all experts.

    What it prepares for sending costs a step of generation more than the experts of a small model do.
    """

    def __init__(self, config: TransformerConfig) -> None:
        experts = ModuleSpec(SequentialMLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear))
        super().__init__(config, MoESubmodules(experts=experts, router=Router))

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h], and no bias."""
        if self.training or self.config.expert_model_parallel_size > 1 or self.config.expert_tensor_parallel_size > 1:
            return super().forward(hidden_states, **rest)
        weights, chosen = self.router(hidden_states)  # [tokens, experts]
        numbers, tokens = chosen.T.nonzero(as_tuple=True)
        counts, flat = chosen.sum(0).tolist(), hidden_states.flatten(0, 1)
        parts = zip(flat[tokens].split(counts), weights[tokens, numbers].split(counts), strict=True)
        experts: Any = self.experts.local_experts
        outputs = [expert(*part)[0] for expert, part in zip(experts, parts, strict=True) if len(part[1])]
        return torch.zeros_like(flat).index_add_(0, tokens, torch.cat(outputs)).view_as(hidden_states), None


def prepare(block: Any) -> None:
    """What Megatron's MoE layers lack, once they are built.

    Args:
        block: the TransformerBlock of this stage's layers.
    """
    block.register_forward_pre_hook(hand_to_all, with_kwargs=True)
    for layer in block.layers:
        moe: Any = layer.mlp
        moe.register_forward_pre_hook(hand_weights, with_kwargs=True)
        for parameter in moe.experts.parameters():
            # Summed over the experts' own data-parallel group: Megatron says so only where whole experts are shared.
            parameter.allreduce = False
            parameter.tensor_model_parallel = True  # in the norm of each rank, whatever the dense parts are split over


def hand_to_all(block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: the padding mask [b, s] is loss_weights', of which Megatron would make booleans."""
    weights = kwargs.get("padding_mask")
    for layer in block.layers:
        layer.mlp.router.loss_weights = None if weights is None else weights.T.flatten()


def hand_weights(moe: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: recomputation hands the mask over once more, when other micro-batches have passed."""
    if (weights := kwargs["padding_mask"]) is not None:
        moe.router.loss_weights = weights.T.flatten()


class Router(TopKRouter):
    """Megatron's, of which the auxiliary loss and the counts are taken in here; its own are off (language_config)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_weights: Tensor | None = None
        self.seen: Tensor | None = None  # [experts + 1] since it was last taken: tokens of each, the weighted loss

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [s, b, experts] to weights and choice, both [s * b, experts]."""
        probs, chosen = super().routing(logits)
        if self.loss_weights is None or not self.training or not torch.is_grad_enabled():
            return probs, chosen  # without gradients it runs before recomputation, which counts
        real = self.loss_weights[:, None] >= 0
        weight, chosen_real = self.loss_weights.max().clamp(min=0), (chosen & real).sum(0)
        scores = torch.softmax(logits.view(-1, self.num_experts), -1, dtype=torch.float32) * real
        loss = weight * balance_loss(scores.sum(0), self.of_micro_batch(chosen_real), self.topk)
        seen = torch.cat([chosen_real.double(), loss.detach().double()[None]])
        self.seen = seen if self.seen is None else self.seen + seen
        if self.config.moe_aux_loss_coeff:
            probs = MoEAuxLossAutoScaler.apply(probs, self.config.moe_aux_loss_coeff * loss)
        return probs, chosen

    def of_micro_batch(self, counts: Tensor) -> Tensor:
        """This rank's counts with those of the other ranks that have a part of the micro-batch's tokens."""
        counts = counts.float()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        return counts


def balance_loss(scores: Tensor, counts: Tensor, topk: int) -> Tensor:
    """This rank's share of the auxiliary loss of a micro-batch; the shares of all ranks add up to it.

    Args:
        scores: [experts] the sum of the softmax over this rank's tokens, where the gradient flows.
        counts: [experts] tokens sent to each, of the whole micro-batch.
    """
    total = (counts.sum() / topk).clamp(min=1)  # there may be none
    return len(scores) / (topk * total**2) * (scores * counts).sum()


def loss_weights(batch: Batch) -> Tensor | None:
    """[b, s] float32: the weight that the micro-batch's loss has in training; PADDING also in batch.empty_sample."""
    if batch.loss_weight is None:
        return None
    position = torch.arange(batch.tokens.shape[1])
    ends = batch.lengths.sum()[None] if batch.packed else batch.lengths
    weights = torch.where(position < ends[:, None], batch.loss_weight.float(), PADDING)
    single = (batch.lengths == 1)[batch.segments]
    weights = weights.masked_fill(single & (batch.at_hand.labels == IGNORE_INDEX), PADDING)
    return weights.to(batch.tokens.device, non_blocking=True)


def take_loads(stages: Iterable[nn.Module], config: TransformerConfig, weight: float) -> ExpertLoads | None:
    """What the routers have counted since it was last taken, over all ranks; None of a model without experts.

    Args:
        weight: that of the loss over the global batch.
    """
    if config.num_moe_experts is None:
        return None
    table = torch.zeros(config.num_layers, config.num_moe_experts + 1, dtype=torch.float64)
    for router in (module for stage in stages for module in stage.modules() if isinstance(module, Router)):
        if router.seen is not None:
            table[router.layer_number - 1] = router.seen.cpu()
        router.seen = None
    summed = table.to(cpu.device(), torch.float32 if cpu.device().type == "npu" else torch.float64)
    torch.distributed.all_reduce(summed)
    table = summed.double().cpu()
    return ExpertLoads(table[:, :-1], table[:, -1] / weight)
