"""Functions of autograd in our layers, beside torch's own pieces; a tower that keeps nothing where it is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from test_families import TINY, build, micro_batches, one_rank, run_of
from torch import Tensor

from nemo_vlm.batch import collate
from nemo_vlm.layout import one_process
from nemo_vlm.mcore.linear import Product
from nemo_vlm.mcore.norms import Normalization
from nemo_vlm.mcore.swiglu import SwiGLU
from nemo_vlm.models.base import family
from nemo_vlm.training.build import build_engine


def plain_swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return Normalization.apply(x, weight, 1e-5)


def torchs(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("found", "expected", "weights"),
    [(SwiGLU.apply, plain_swiglu, 0), (ours, torchs, 1)],
    ids=["swiglu", "rms_norm"],
)
def test_values_and_gradients_equal_torchs(
    found: Callable, expected: Callable, weights: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *rest = (torch.randn(shape, generator=generator).to(dtype) for shape in [(7, 3, 48), (48,)][: 1 + weights])
    given = [each.requires_grad_() for each in (x, *rest)]
    one, two = found(*given), expected(*given)
    assert torch.equal(one, two)
    gradient = torch.randn(one.shape, generator=generator).to(dtype)
    close = dict(rtol=1e-5, atol=1e-5) if dtype is torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(*(torch.autograd.grad(each, given, gradient) for each in (one, two)), strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def test_functions_keep_no_products_in_between() -> None:
    """Beside their inputs: nothing, and one number a token."""
    kept: list[Tensor] = []
    both, weight = torch.randn(7, 3, 48, requires_grad=True), torch.ones(48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        SwiGLU.apply(both)
        ours(both, weight)
    assert [each.numel() for each in kept] == [both.numel(), both.numel(), weight.numel(), 7 * 3]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_frozen_tower_keeps_nothing(name: str) -> None:
    config = TINY[name]
    batch = collate(family(name, "tiny").samples(config, 2, torch.Generator().manual_seed(0)))
    with one_rank(config):
        model, _ = build(name, config, one_process(config))
        assert model.vision_model(batch.images).requires_grad
        expected = model.vision_model(batch.images)
        model.vision_model.requires_grad_(False)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda one: one):
            found = model.vision_model(batch.images)
        assert not kept and not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert model(batch, batch.labels).requires_grad


def test_a_frozen_product_keeps_no_input() -> None:
    """As Megatron's LinearWithFrozenWeight."""
    hidden, weight, kept = torch.randn(7, 1, 5, requires_grad=True), torch.randn(3, 5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda one: one):
        product = Product.apply(hidden, weight, False)
    product.sum().backward()
    assert kept == [weight.shape]
    torch.testing.assert_close(hidden.grad, weight.sum(0).expand_as(hidden))


def test_the_norm_of_many_gradients_is_exact() -> None:
    """Megatron's own function, which cpu.enable leads to ours; torch's norm of as many is off by 1e-4."""
    grads = [torch.rand(2, 3_000_000, generator=torch.Generator().manual_seed(0)), torch.tensor([2000.0])]
    exact = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    with one_rank(TINY["gpt"]):
        found = get_grad_norm_fp32(grads, grad_stats_parallel_group=torch.distributed.group.WORLD)
    assert found == pytest.approx(exact, rel=1e-6)


def test_a_weight_that_a_step_does_not_reach_has_no_gradient() -> None:
    """The products' weights are not zeroed ahead of a step, see mcore.replicated.add_to_buffers."""
    run, layout = run_of("gpt", TINY["gpt"]), one_process(TINY["gpt"], 2)
    samples = family("gpt", "tiny").samples(run.model, 2, torch.Generator().manual_seed(0))
    with one_rank(TINY["gpt"]):
        engine = build_engine(run, layout)
        engine.step(micro_batches(layout, samples), lr=1e-3)
        updater: Any = engine.updater
        (buffer,) = [buffer for module in updater.modules for buffer in module.buffers]
        assert buffer.grad_data.count_nonzero() > 0.9 * len(buffer.grad_data)
        updater.start()
        assert buffer.grad_data.any(), "or there is nothing to see here"
        updater.finalize(updater.modules, torch.tensor(1))
        assert not buffer.grad_data.any()
