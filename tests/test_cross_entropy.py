"""Losses whose logits exist by chunks and only where a label is: equal to plain ones, under every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from test_families import TINY, assert_same_run, build_all, make_layout, one_rank, run_of, sharded, tied
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_vlm.batch import IGNORE_INDEX, Sample, collate
from nemo_vlm.config import LanguageConfig, RunConfig, StepConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import cross_entropy, gpt, groups
from nemo_vlm.mcore.cross_entropy import LinearCrossEntropy, Vocabulary
from nemo_vlm.models.base import family
from nemo_vlm.training.build import make_engine

HIDDEN, TOKENS, PADDED = 16, 61, 64  # of the vocabulary, and with its padding


def drawn(count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(count, HIDDEN, generator=generator), torch.randn(PADDED, HIDDEN, generator=generator)
    return hidden, weight, torch.randint(TOKENS, (count,), generator=generator), torch.rand(count, generator=generator)


def plain(count: int) -> list[torch.Tensor]:
    """Torch's losses, and the gradients of hidden states and weight."""
    hidden, weight, labels, weights = drawn(count)
    losses = F.cross_entropy(hidden.requires_grad_() @ weight.requires_grad_()[:TOKENS].T, labels, reduction="none")
    (3 * weights * losses).sum().backward()
    return [losses.detach(), hidden.grad, weight.grad]


def chunked(count: int, group: ProcessGroup) -> list[torch.Tensor]:
    """Ours of this rank's part of the vocabulary."""
    hidden, weight, labels, weights = drawn(count)
    width = PADDED // group.size()
    first = group.rank() * width
    part, mine = Vocabulary(first, width, TOKENS - first, group), weight[first : first + width].requires_grad_()
    losses = LinearCrossEntropy.apply(hidden.requires_grad_(), mine, labels, weights, part)
    with torch.no_grad():
        torch.testing.assert_close(LinearCrossEntropy.apply(hidden, mine, labels, None, part), losses, rtol=0, atol=0)
    (3 * weights * losses).sum().backward()
    return [losses.detach(), hidden.grad, mine.grad]


@pytest.mark.parametrize(("count", "size"), [(20, 7), (20, 5), (20, 64), (0, 7)])
def test_chunks_equal_torch(monkeypatch: pytest.MonkeyPatch, count: int, size: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ON_CPU", size)
    with one_rank(TINY["gpt"]):
        found = chunked(count, torch.distributed.group.WORLD)
    for ours, theirs in zip(found, plain(count), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_chunks_round_as_little_as_one_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ON_CPU", 4)
    hidden, weight, labels, weights = (one.to(dtype) if one.is_floating_point() else one for one in drawn(512))

    def grads(made: torch.dtype, losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        leaves = [one.detach().to(made, copy=True).requires_grad_() for one in (hidden, weight)]
        (3 * weights * losses(*leaves)).sum().backward()
        assert all(leaf.grad.dtype is made for leaf in leaves)
        return [leaf.grad.double() for leaf in leaves]

    def plainly(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        logits = ours @ theirs[:TOKENS].T
        return F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), labels, reduction="none")

    with one_rank(TINY["gpt"]):
        part = Vocabulary(0, PADDED, TOKENS, torch.distributed.group.WORLD)
        found = grads(dtype, lambda *leaves: LinearCrossEntropy.apply(*leaves, labels, weights.float(), part))
    for ours, theirs, exact in zip(found, grads(dtype, plainly), grads(torch.float64, plainly), strict=True):
        assert (ours - exact).norm() < 2 * (theirs - exact).norm()  # 5 times, were chunks added in half precision


def test_losses_that_weigh_nothing_have_no_gradient() -> None:
    hidden, weight, labels, weights = drawn(5)
    with one_rank(TINY["gpt"]):
        part = Vocabulary(0, PADDED, TOKENS, torch.distributed.group.WORLD)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        losses = LinearCrossEntropy.apply(*leaves, labels, weights.zero_(), part)
        (weights * losses).sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


def samples_of(run: RunConfig, number: int) -> list[Sample]:
    """Samples of a step; every second pair has no label: micro-batches and ranks have none."""
    made = family(run.family, "tiny").samples(run.model, 8, torch.Generator().manual_seed(number))
    unlabelled = [replace(each, labels=torch.full_like(each.labels, IGNORE_INDEX)) for each in made]
    return [(made if number % 4 < 2 else unlabelled)[number] for number in range(8)]


def train(run: RunConfig, layout: Layout, size: int) -> list[tuple[float, float, float]]:
    cross_entropy.CHUNK_ON_CPU = size
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    first, pad, results = groups.data_parallel_rank() * layout.samples_per_rank, layout.tensor, []
    for number in range(2):
        mine = samples_of(run, number)[first : first + layout.samples_per_rank]
        result = engine.step([collate(mine[i : i + 2], pad) for i in range(0, len(mine), 2)], lr=1e-2)
        results.append((result.loss, result.grad_norm, result.counts[0]))
    groups.shut_down()
    return results


def train_all(runs: list[tuple[RunConfig, Layout]], size: int):
    return [train(*run, size) for run in runs]


def on_two_ranks(runs: list[tuple[RunConfig, Layout]], size: int):
    cross_entropy.CHUNK_ON_CPU = 7
    return chunked(20, torch.distributed.group.WORLD), train_all(runs, size)


CONFIGS = {"gpt": TINY["gpt"], "gpt_tied": tied(TINY["gpt"]), "llava": TINY["llava"]}
LAYOUTS = [
    *(("gpt", layout) for layout in ("tp2_sp", "cp2")),
    *(("gpt_tied", layout) for layout in ("tp2", "pp2_vpp2", "fsdp")),
    *(("llava", layout) for layout in ("ddp", "fsdp")),
]


def run_for(name: str, config: LanguageConfig, reduction: str = "sample") -> RunConfig:
    step = StepConfig(micro_batch_size=2, global_batch_size=8, loss_reduction=reduction)
    return run_of(name.split("_")[0], config, step=step)


def test_every_layout_by_chunks_trains_as_one_process() -> None:
    """With micro-batches and ranks that have no label; and the function itself, over a split vocabulary."""
    runs = [sharded(run_for(name, CONFIGS[name]), layout, 2) for name, layout in LAYOUTS]
    whole = [(run, make_layout(run, 1)) for run in (run_for(name, config) for name, config in CONFIGS.items())]
    expected = dict(zip(CONFIGS, run_ranks(train_all, 1, whole, 512)[0], strict=True))
    (first, found), (second, _) = run_ranks(on_two_ranks, 2, runs, 5)
    for (name, _), got in zip(LAYOUTS, found, strict=True):
        assert_same_run(got[:1], expected[name][:1], loss=1e-6, norm=1e-5)
        assert_same_run(got, expected[name])
    losses, of_hidden, of_weight = plain(20)
    torch.testing.assert_close(first[0], losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first[1] + second[1], of_hidden, rtol=1e-6, atol=1e-6)  # each has its tokens' part
    torch.testing.assert_close(torch.cat([first[2], second[2]]), of_weight, rtol=1e-6, atol=1e-6)


class Logits(TorchDispatchMode):
    """How many rows the products have that are as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and found.shape[1] == self.width:
            self.rows.append(len(found))
        return found


@pytest.mark.parametrize("reduction", ["token", "sample", "micro_batch"])
def test_there_are_logits_of_labelled_positions_alone(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ON_CPU", 10)
    run = run_for("llava", TINY["llava"], reduction=reduction)
    with one_rank(run.model):
        layout = make_layout(run, 1)
        engine = make_engine(run, layout, build_all(run, layout)[0])
        batch = collate(samples_of(run, 0)[:2])
        labelled = int((batch.labels != IGNORE_INDEX).sum())
        with Logits(len(engine.updater.modules[0].module.model.language_model.output_layer.weight)) as seen:
            engine.step([batch], lr=0.0)
    assert labelled < batch.labels.numel() / 2
    assert sum(seen.rows) == labelled and max(seen.rows) == 10


@pytest.mark.parametrize("granularity", [None, "full"])
def test_the_last_layers_mlp_takes_labelled_positions_alone(
    monkeypatch: pytest.MonkeyPatch, granularity: Literal["full"] | None
) -> None:
    """And trains as one that takes all."""
    run = run_for("gpt", TINY["gpt"])
    run = replace(run, step=replace(run.step, activations_checkpoint_granularity=granularity))

    def steps() -> tuple[list[tuple[float, float]], list[int]]:
        with one_rank(run.model):
            layout = make_layout(run, 1)
            engine = make_engine(run, layout, build_all(run, layout)[0])
            layers, rows = engine.updater.modules[0].module.model.language_model.decoder.layers, []
            for layer in layers:
                layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2].numel()))
            results = [engine.step([collate(samples_of(run, number)[:2])], lr=1e-2) for number in (0, 1)]
        return [(result.loss, result.grad_norm) for result in results], rows[: len(layers)]

    batch = collate(samples_of(run, 0)[:2])
    positions, labelled = batch.labels.numel(), int((batch.labels != IGNORE_INDEX).sum())
    found, rows = steps()
    assert labelled < positions and rows == [*[positions] * (len(rows) - 1), labelled]
    monkeypatch.setattr(gpt, "can_pick", lambda *unused: False)
    expected, every = steps()
    assert every == [positions] * len(rows)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)
