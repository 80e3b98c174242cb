"""The output side of the language model: logits, or losses, for which logits exist only where a label is, by chunks.

In tuning most positions have no label. Of those that have one, the gradients of the hidden states and of the weight are
taken in the forward pass, while a chunk's logits are there; what each token's loss weighs is known before it (see
Engine). Neither logits nor their softmax then wait for the backward pass, and none are computed twice. As Liger's
FusedLinearCrossEntropy (arXiv:2410.10989), which knows one mean; here every token has a weight, and the vocabulary may
be split over the tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from nemo_vlm.batch import IGNORE_INDEX
from nemo_vlm.mcore.cpu import add_product

CHUNK, CHUNK_ON_CPU = 2048, 512  # tokens: each chunk adds to all of the weight's gradient; a CPU's caches like fewer


@dataclass(frozen=True)
class Targets:
    """Stands for the labels on their way through GPTModel.

    Attributes:
        labels: [b, s] int64.
        weights: [b, s] float32, the gradient of what is differentiated by the losses, but for a factor that all share;
            None: it is not known.
        places: of `labelled`, where they are known already; None: they are asked of the device, which is waited for.
        picked: the last layer leaves hidden states of those places alone, [n, 1, h].
    """

    labels: Tensor
    weights: Tensor | None
    places: Tensor | None = None
    picked: bool = False


def labelled(labels: Tensor) -> Tensor:
    """[n] int64: the positions of labels [b, s] that have one, among [s * b]."""
    return (labels.T.flatten() != IGNORE_INDEX).nonzero()[:, 0]


@dataclass(frozen=True)
class Vocabulary:
    """This rank's part.

    Attributes:
        first: number of its first token.
        width: how many there are.
        visible: those that are tokens; what is behind them pads the vocabulary, and must not take part in the softmax.
    """

    first: int
    width: int
    visible: int
    group: torch.distributed.ProcessGroup

    def hide_padding(self, logits: Tensor) -> Tensor:
        """[..., part] -> as it is, or with the lowest values where the padding is."""
        if self.visible >= self.width:
            return logits
        columns = torch.arange(self.width, device=logits.device)
        return logits.masked_fill(columns >= self.visible, torch.finfo(logits.dtype).min)

    def find(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[n] -> [n, 1] their columns in this part, and [n] whether they are in it."""
        place = labels - self.first
        here = (place >= 0) & (place < self.width)
        return (place * here)[:, None], here


class LanguageModel(GPTModel):
    """Megatron's, whose output layer makes the losses.

    Args:
        num_tokens: of the vocabulary without padding.
    """

    def __init__(self, *args: Any, num_tokens: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.post_process:
            self.output_layer.__class__ = OutputLayer  # GPTModel leaves no choice
            self.output_layer.num_tokens = num_tokens

    def _postprocess(self, hidden_states: Tensor, labels: Targets | Tensor | None = None, **rest: Any) -> Tensor:
        if not self.post_process or not isinstance(labels, Targets):
            return super()._postprocess(hidden_states, labels=labels, **rest)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, tied, targets=labels)


class OutputLayer(ColumnParallelLinear):
    """Megatron's. Losses are made inside a call of the layer as well: FSDP gathers its weight around that."""

    num_tokens: int

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        targets: Targets | None = None,
    ) -> Any:
        """Hidden states [s, b, h], of which sequence parallelism leaves this rank a part -> logits [s, b, part], None.

        With targets -> losses [b, s] float32, 0 where there is no label.
        """
        if targets is not None:
            return self.losses(input_, self.weight if weight is None else weight, targets)
        logits, bias = super().forward(input_, weight, runtime_gather_output)
        return self.vocabulary.hide_padding(logits), bias

    def losses(self, hidden: Tensor, weight: Tensor, targets: Targets) -> Tensor:
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        places = labelled(targets.labels) if targets.places is None else targets.places
        labels = targets.labels.T.flatten()[places]
        picked = hidden[:, 0] if targets.picked else hidden.flatten(0, 1).index_select(0, places)
        if not self.sequence_parallel:
            picked = copy_to_tensor_model_parallel_region(picked, group=self.tp_group)
        if targets.weights is None and torch.is_grad_enabled():
            logits = self.vocabulary.hide_padding(torch.matmul(picked, weight.T))
            losses = vocab_parallel_cross_entropy(logits, labels)
        else:
            weights = None if targets.weights is None else targets.weights.T.flatten()[places]
            losses = LinearCrossEntropy.apply(picked, weight, labels, weights, self.vocabulary)
        whole = torch.zeros(targets.labels.numel(), device=losses.device)
        return whole.index_copy(0, places, losses).view(targets.labels.T.shape).T

    @property
    def vocabulary(self) -> Vocabulary:
        first = self.tp_group.rank() * self.output_size_per_partition
        return Vocabulary(first, self.output_size_per_partition, self.num_tokens - first, self.tp_group)


class LinearCrossEntropy(torch.autograd.Function):
    """Losses [n] float32 of hidden states [n, h], this rank's part of the weight [part, h] and labels [n].

    The gradient of what is differentiated by the losses is the weights [n] times one factor; None: no backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, vocabulary: Vocabulary
    ) -> Tensor:
        of_hidden, of_weight = (weights is not None and needed for needed in ctx.needs_input_grad[:2])
        ctx.weights, ctx.dtype = weights, weight.dtype
        losses = torch.empty(len(hidden), device=hidden.device)
        size = min(CHUNK_ON_CPU if hidden.device.type == "cpu" else CHUNK, max(len(hidden), 1))
        of_all = weight.dtype if len(hidden) <= size else torch.float32  # each chunk's addition would round
        ctx.hidden_grad = torch.empty_like(hidden) if of_hidden else None
        ctx.weight_grad = torch.empty_like(weight, dtype=of_all) if of_weight else None
        logits = hidden.new_empty(size, len(weight))
        softmax = logits if logits.dtype is torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            chunk, scores = hidden[rows], logits[: len(hidden[rows])]
            likely = scores if softmax is logits else softmax[: len(scores)]  # to copy a tensor onto itself is no work
            torch.mm(chunk, weight.T, out=scores)
            losses[rows], share = cross_entropy(scores, likely, labels[rows], vocabulary)
            if weights is None:
                continue
            slopes = scores.copy_(gradient(likely, labels[rows], weights[rows], share, vocabulary))
            if of_hidden:
                torch.mm(slopes, weight, out=ctx.hidden_grad[rows])
            if of_weight:
                add_product(chunk, slopes, ctx.weight_grad, first=not start)
        if of_weight and not len(hidden):
            ctx.weight_grad.zero_()
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.hidden_grad, ctx.weight_grad
        ctx.hidden_grad = ctx.weight_grad = None  # the graph is held until the next micro-batch's stands
        if not len(grad):
            return *found, None, None, None
        largest = ctx.weights.argmax()
        weight = ctx.weights.take(largest).clamp(min=torch.finfo(ctx.weights.dtype).tiny)  # 0: all are, and so is grad
        factor = grad.take(largest) / weight  # an index would be asked of the device
        if grad.device.type != "cpu" or factor != 1:  # a GPU would have to be asked
            found = tuple(None if each is None else each.mul_(factor) for each in found)
        grads = (None if each is None else each.to(ctx.dtype) for each in found)
        return *grads, None, None, None


def cross_entropy(logits: Tensor, softmax: Tensor, labels: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Losses [n] of logits [n, part], and how much of the softmax this rank's part is [n].

    Args:
        softmax: [n, part] float32, which becomes the softmax over this rank's part; it may be the logits.
    """
    logits[:, max(vocabulary.visible, 0) :] = torch.finfo(logits.dtype).min
    place, here = vocabulary.find(labels)
    chosen, highest = logits.gather(1, place)[:, 0].float() * here, logits.amax(-1).float()
    torch.softmax(softmax.copy_(logits), -1, out=softmax)  # a dtype instead of the copy would take memory for another
    log_sum = highest - softmax.amax(-1).log()
    if vocabulary.group.size() == 1:
        return log_sum - chosen, torch.ones_like(log_sum)
    both = gathered(torch.stack([log_sum, chosen]), vocabulary.group)
    total = both[:, 0].logsumexp(0)
    return total - both[:, 1].sum(0), (log_sum - total).exp()


def gradient(softmax: Tensor, labels: Tensor, weights: Tensor, share: Tensor, vocabulary: Vocabulary) -> Tensor:
    """That of the logits [n, part], in the place of the softmax over this rank's part."""
    place, here = vocabulary.find(labels)
    return softmax.mul_((weights * share)[:, None]).scatter_add_(1, place, -(weights * here)[:, None])


def gathered(part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[k, ...] of each rank -> [ranks, k, ...] on all."""
    whole = part.new_empty(group.size() * len(part), *part.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, part, group)
    return whole.unflatten(0, (group.size(), -1))
