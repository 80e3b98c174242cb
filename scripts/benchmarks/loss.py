"""The loss of labelled positions by chunks, beside Megatron's of all positions at once: time and memory.

    python scripts/benchmarks/loss.py [--rounds N] [--json FILE]

From the final hidden states to the losses and back to the gradients of hidden states and output weight, as in a step of
training; fp32, one process, the vocabularies of Llama and Qwen2-VL. The peer is what GPTModel does with labels:
ColumnParallelLinear, then vocab_parallel_cross_entropy. Memory is the highest sum of bytes of the tensors that are made
on the way, the gradients among them, counted by torch's MemTracker. Losses and gradients are compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from side_by_side import by_turns, flags, report, row
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from nemo_vlm.batch import IGNORE_INDEX
from nemo_vlm.inference.restore import megatron_groups, process_group
from nemo_vlm.layout import one_process
from nemo_vlm.mcore.config import context
from nemo_vlm.mcore.cross_entropy import OutputLayer, Targets
from nemo_vlm.mcore.gpt import build_gpt
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.models.base import family
from nemo_vlm.typed import defaults, read_model

POSITIONS = 2048
SIZES = ((32000, 512), (152064, 128))  # of the vocabulary and of hidden states
Found = tuple[Tensor, ...]  # losses, gradients


def main() -> None:
    options = flags(__doc__).parse_args()
    settings = {
        "positions": POSITIONS,
        "threads of each side": torch.get_num_threads(),
        "precision": "fp32",
        "Megatron-Core": "ColumnParallelLinear, vocab_parallel_cross_entropy, every position",
    }
    report(measure(options.rounds), options.json, settings)


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    kind = family("gpt", "config").Config
    for vocabulary, width in SIZES:
        sizes = dict(num_layers=1, hidden_size=width, ffn_hidden_size=width, num_attention_heads=4)
        model = read_model(defaults(kind) | sizes | {"family": "gpt", "vocab_size": vocabulary}, kind)["model"]
        layout = one_process(model)
        with process_group(layout), megatron_groups(layout):
            layer = build_gpt(model, context(layout), Stage(1)).output_layer
            for share in (1.0, 0.2):
                yield from compared(f"{vocabulary} wide, {share:.0%} labelled", layer, share, rounds)


def compared(name: str, layer: OutputLayer, share: float, rounds: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_(0, 0.02, generator=generator)
    hidden = torch.randn(POSITIONS, 1, layer.input_size, generator=generator)
    labels = torch.randint(layer.num_tokens, (1, POSITIONS), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) >= share] = IGNORE_INDEX
    weights = (labels != IGNORE_INDEX).float()
    ways: dict[str, Callable[[], Found]] = {
        "ours": partial(run, ours, layer, hidden, labels, weights),
        "plain": partial(run, plain, layer, hidden, labels, weights),
    }
    seconds = by_turns(ways, rounds)
    yield row(f"{name}, time", seconds["ours"], seconds["plain"], "s", "<= 1.1")
    mine, theirs = (peak(way, layer.weight) / 1e6 for way in ways.values())
    yield row(f"{name}, memory", mine, theirs, "MB", "<= 0.5")
    apart = [
        float((mine - theirs).abs().max() / theirs.abs().max())
        for mine, theirs in zip(*(way() for way in ways.values()), strict=True)
    ]
    yield row(f"{name}, losses and gradients", max(apart), None, "apart", "<= 1e-6")


def run(way: Callable[..., Tensor], layer: OutputLayer, hidden: Tensor, labels: Tensor, weights: Tensor) -> Found:
    hidden, layer.weight.grad = hidden.clone().requires_grad_(), None
    losses = way(layer, hidden, labels, weights) * weights
    losses.sum().backward()
    return losses.detach(), hidden.grad, layer.weight.grad


def ours(layer: OutputLayer, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return layer(hidden, targets=Targets(labels, weights))


def plain(layer: OutputLayer, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """As GPTModel._postprocess and LanguageModule.compute_language_model_loss."""
    logits, _ = layer(hidden)
    return vocab_parallel_cross_entropy(logits, labels.T.contiguous()).T.contiguous()


def peak(way: Callable[[], Found], weight: Tensor) -> float:
    """Bytes beside those of the weight, which the tracker counts when it sees it."""
    with MemTracker() as tracker:
        way()
    return tracker.get_tracker_snapshot("peak")[weight.device]["Total"] - weight.nbytes


if __name__ == "__main__":
    main()
