"""The same run on a CUDA device as on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from megatron.core.extensions.transformer_engine import HAVE_TE
from test_cli import TRAIN, metrics, run
from test_cross_entropy import samples_of as partly_labelled
from test_families import TINY, assert_same_run, build_all, make_layout, micro_batches, run_of, steps_of
from test_generation import MODELS, asked_of, continued, expected_of, samples_of, starting_run

from nemo_vlm.batch import Sample
from nemo_vlm.config import OptimConfig, ParallelConfig, RunConfig
from nemo_vlm.inference.restore import restore
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.sources.opening import open_source
from nemo_vlm.training.build import make_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("transformer_impl", ["local", "auto"])
def test_a_gpu_trains_as_the_cpu(tmp_path, transformer_impl: str) -> None:
    steps = ("trainer.max_steps=4", "model.data.num_workers=0", f"model.transformer_impl={transformer_impl}")
    for accelerator in ("cpu", "gpu"):
        where = (f"trainer.accelerator={accelerator}", "trainer.devices=1", f"exp_manager.name={accelerator}")
        impl = ("model.transformer_impl=local",) if accelerator == "cpu" else ()
        result = run(str(TRAIN), *steps, *where, *impl, cwd=tmp_path, forked=False)
        assert result.returncode == 0, result.stderr
        assert f"on 1 {'cuda' if accelerator == 'gpu' else 'cpu'} ranks" in result.stdout
    close = 1e-3 if transformer_impl == "local" else 1e-2  # Transformer Engine's products of fp32 are TF32's
    for on_gpu, on_cpu in zip(metrics(tmp_path, "gpu"), metrics(tmp_path, "cpu"), strict=True):
        assert on_gpu["reduced_train_loss"] == pytest.approx(on_cpu["reduced_train_loss"], rel=close)
        assert on_gpu["grad_norm"] == pytest.approx(on_cpu["grad_norm"], rel=10 * close)


def moments(settled: RunConfig, layout: Layout):
    """Steps, the devices of what the optimizer keeps after them, and the bytes that the GPU holds then."""
    groups.initialize(layout, seed=1)
    engine = make_engine(settled, layout, build_all(settled, layout)[0])
    results = steps_of(engine, settled, layout)
    devices = {value.device.type for shard in engine.updater.shards() for value in shard.tensors.values()}
    held = torch.cuda.memory_allocated()
    groups.shut_down()
    return results, devices, held


@pytest.mark.parametrize("name", ["fused_adam", "distributed_fused_adam"])
@pytest.mark.parametrize("family_name", ["llava", "qwen3_vl"])
def test_offload_moves_the_optimizer_and_changes_no_results(family_name: str, name: str) -> None:
    """By its fraction: of the moments, 8 bytes a parameter, the GPU holds half and then none. Experts' too."""
    optim = OptimConfig(name=name, lr=1e-2)
    plain = run_of(family_name, TINY[family_name], optim=optim, precision="bf16-mixed")
    runs = [replace(plain, optim=replace(optim, offload=offload)) for offload in (False, 0.5, 1.0)]
    found = [run_ranks(moments, 1, settled, make_layout(settled, 1))[0] for settled in runs]
    (expected, on_gpu, all_of_it), (_, _, half), (_, on_host, least) = found
    assert "cuda" in on_gpu and "cpu" in on_host
    assert all_of_it > half > least
    for results, _, _ in found[1:]:
        assert_same_run(results, expected, loss=1e-3, norm=1e-2)


EXPERT_KERNELS: dict[str, dict[str, Any]] = {
    "one by one": dict(moe_grouped_gemm=False),
    "grouped": dict(moe_grouped_gemm=True),
    "permuted": dict(moe_permute_fusion=True),
    "gathered": dict(moe_token_dispatcher_type="allgather"),
}


@pytest.mark.skipif(not HAVE_TE, reason="needs Transformer Engine")
@pytest.mark.parametrize("kernels", EXPERT_KERNELS)
def test_experts_train_alike_by_every_kernel(kernels: str) -> None:
    """Transformer Engine's grouped products and permutation, against the layers of torch.

    Its products of fp32 are TF32's: a token may go to another expert from the second step on.
    """
    plain = run_of("qwen3_vl", TINY["qwen3_vl"])
    steps = [replace(plain.step, transformer_impl="local"), replace(plain.step, **EXPERT_KERNELS[kernels])]
    runs = [replace(plain, step=step) for step in steps]
    expected, found = (run_ranks(moments, 1, settled, make_layout(settled, 1))[0][0] for settled in runs)
    assert_same_run(found[:1], expected[:1], loss=1e-3, norm=1e-2)
    assert_same_run(found, expected, loss=1e-2, norm=1e-1)


def train_on(run: RunConfig, layout: Layout, samples: list[Sample]):
    """One step on the given samples."""
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    result = engine.step(micro_batches(layout, samples), lr=1e-3)
    groups.shut_down()
    return result.grad_norm, result.counts[3]


@pytest.mark.parametrize("transformer_impl", ["local", "auto"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_text_alone_trains_a_vision_language_model(name: str, transformer_impl: str) -> None:
    settled = run_of(name, TINY[name])
    settled = replace(settled, step=replace(settled.step, transformer_impl=transformer_impl))
    samples = family(name, "tiny").samples(settled.model, 40, torch.Generator().manual_seed(0))
    text = [sample for sample in samples if not len(sample.images)][:8]
    assert len(text) == 8
    grad_norm, num_images = run_ranks(train_on, 1, settled, make_layout(settled, 1), text)[0]
    assert num_images == 0 and grad_norm > 0


def in_micro_batches(run: RunConfig, sizes: tuple[int, ...]) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and tokens of the same step, by micro-batches of each size."""
    found = []
    for size in sizes:
        layout = make_layout(replace(run, step=replace(run.step, micro_batch_size=size)), 1)
        groups.initialize(layout, seed=1)
        result = make_engine(run, layout, build_all(run, layout)[0]).step(
            micro_batches(layout, partly_labelled(run, 0)), lr=1e-3
        )
        found.append((result.loss, result.grad_norm, result.counts[0]))
        groups.shut_down()
    return found


@pytest.mark.parametrize("transformer_impl", ["local", "auto"])
@pytest.mark.parametrize("name", ["gpt", "llava", "qwen2_vl"])
def test_micro_batches_without_a_label_train_nothing(name: str, transformer_impl: str) -> None:
    """Every second pair of samples has none; all of them together have some."""
    settled = run_of(name, TINY[name])
    settled = replace(settled, step=replace(settled.step, transformer_impl=transformer_impl))
    by_pairs, at_once = run_ranks(in_micro_batches, 1, settled, (2, 8))[0]
    assert_same_run([by_pairs], [at_once], loss=1e-3, norm=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_context_parallel_rank_without_labels_trains_as_one_process(tmp_path: Path) -> None:
    """Many answers are one letter, which ends its sample: one of the ranks has it."""
    steps = ("trainer.max_steps=4", "trainer.precision=32", "model.micro_batch_size=1", "model.data.num_workers=0")
    for parallel, devices in (("single", 1), ("cp2", 2)):
        where = (f"parallel={parallel}", f"trainer.devices={devices}", f"exp_manager.name={parallel}")
        result = run(str(TRAIN), *steps, *where, "trainer.accelerator=gpu", cwd=tmp_path, forked=False)
        assert result.returncode == 0, result.stderr
    for got, expected in zip(metrics(tmp_path, "cp2"), metrics(tmp_path, "single"), strict=True):
        assert got["reduced_train_loss"] == pytest.approx(expected["reduced_train_loss"], rel=1e-3)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def answers_of(name: str, path: Path) -> list[list[int]]:
    samples = samples_of(name, starting_run(name, path, ParallelConfig()))
    with restore(open_source(path, "model_path"), "32") as restored:
        return continued(restored.forward, [samples[number] for number in asked_of(name)])


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl", "qwen3_vl_moe"])
def test_a_gpu_answers_as_transformers_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Prompts of several lengths with images and videos, then a token a step behind each."""
    path = MODELS[name][1](tmp_path / name)
    assert run_ranks(answers_of, 1, name, path) == [expected_of(name, path)[2]]


BACKENDS = [f"model.attention_backend={name}" for name in ("flash", "fused", "unfused", "local")]
EIGHT_BITS = [("model.fp8=true", *more) for more in ((), ("model.fp8_e4m3=true",), ("model.fp8_recipe=tensorwise",))]
GRAPHS = ("model.enable_cuda_graph=true", "model.data.pad_to=512")
SETTINGS = {(backend,): 0.02 for backend in BACKENDS} | dict.fromkeys([("model.cpu_offloading=true",), GRAPHS], 0.02)
SETTINGS |= dict.fromkeys([*EIGHT_BITS, (*EIGHT_BITS[-1], *GRAPHS)], 0.05)


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    return bf16_losses(folder)


def bf16_losses(folder: Path, *settings: str) -> list[float]:
    """Of six steps with Transformer Engine; sizes that 8-bit products and every attention take."""
    sizes = ("model.hidden_size=64", "model.ffn_hidden_size=128", "model.kv_channels=16")
    sizes += ("model.mm_cfg.vision_encoder.hidden_size=64",)
    run_settings = ("trainer.precision=bf16", "trainer.max_steps=6", "trainer.devices=1", "exp_manager.name=bf16")
    result = run(str(TRAIN), *sizes, *run_settings, "model.data.num_workers=0", *settings, cwd=folder)
    assert result.returncode == 0, result.stderr
    return [row["reduced_train_loss"] for row in metrics(folder, "bf16")]


@pytest.mark.skipif(not HAVE_TE, reason="needs Transformer Engine")
@pytest.mark.parametrize(("settings", "tolerance"), SETTINGS.items(), ids=[" ".join(key) for key in SETTINGS])
def test_kernels_agree(tmp_path, in_bf16, settings: tuple[str, ...], tolerance: float) -> None:
    """Other attention, offload, CUDA graphs and 8-bit products in the language model: nearly the losses of bf16."""
    if "model.fp8=true" in settings and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no 8-bit floats on this GPU")
    losses = bf16_losses(tmp_path, *settings)
    assert losses == pytest.approx(in_bf16, rel=tolerance)
    if "model.fp8=true" in settings:
        assert losses != in_bf16
