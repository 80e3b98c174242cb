"""Throughput and memory of training steps on one GPU, beside what the plan expects of them.

    python scripts/benchmarks/gpu.py [--only NAME ...] [--rounds N] [--json FILE] [--tiny]

Slices of models in their full widths, with fewer layers, random weights and samples in memory, by Megatron's
distributed optimizer in bf16 and in 8 bits, padded and packed: useful tokens a second, TFLOP/s and MFU of the model's
own operations (planning.flops; of 8 bits against the peak of bf16 too), and the most memory that torch's allocator
held. scripts/benchmarks/gpu.sh runs the tests that need a GPU behind it. --tiny takes sizes that a CPU has patience
for: it tries the script, and its figures say nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from settled import settled
from side_by_side import flags, report, row

from nemo_vlm.batch import IGNORE_INDEX, Batch, Images, Sample, collate, pack
from nemo_vlm.config import LanguageConfig, RunConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference.restore import megatron_groups
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore import cpu, groups
from nemo_vlm.mcore.config import DTYPES
from nemo_vlm.mcore.engine import Engine, StepResult, materialize
from nemo_vlm.mcore.layers import kernels
from nemo_vlm.models.build import build_chunks
from nemo_vlm.planning import hardware
from nemo_vlm.planning.activations import activation_bytes, buffer_bytes
from nemo_vlm.planning.communication import Case
from nemo_vlm.planning.flops import step_flops
from nemo_vlm.planning.memory import hold
from nemo_vlm.planning.parameters import count
from nemo_vlm.planning.timing import step_time
from nemo_vlm.planning.workload import of_batch
from nemo_vlm.script import run_command
from nemo_vlm.training.build import make_engine

WARM_UP, LR, GIB = 3, 1e-5, 1024**3
EIGHT_BITS = "model.fp8=true"
GRAPHS = "model.enable_cuda_graph=true"


@dataclass(frozen=True)
class Slice:
    """A part of a model, and what it is trained on.

    Attributes:
        recipe, settings: as on the command line.
        tiny: the settings of --tiny.
        samples: images and tokens of text of each.
        ways: settings that it is trained under besides, by name.
    """

    recipe: str
    settings: str
    tiny: str
    samples: tuple[tuple[int, int], ...]
    ways: dict[str, str]


TINY_VOCABULARY = "model.vocab_size=250 model.encoder_seq_length=128"
SLICES = {
    "llava": Slice(
        "neva_finetune",
        "model=llava_7b model.num_layers=8 model.vocab_size=32064 model.mm_cfg.vision_encoder.freeze=true",
        f"model=llava_tiny {TINY_VOCABULARY}",
        ((1, 120), (1, 160), (1, 210), (1, 260), (1, 340), (1, 480), (0, 900), (1, 700)),
        {"bf16": "", "fp8": EIGHT_BITS},
    ),
    "experts": Slice(
        "gpt_pretrain",
        "model=qwen3_4b model.hidden_size=2048 model.num_query_groups=4 model.num_layers=3 model.vocab_size=151936 "
        "model.num_moe_experts=128 model.moe_ffn_hidden_size=768 model.moe_router_topk=8 model.encoder_seq_length=4096",
        f"model=gpt_tiny {TINY_VOCABULARY} model.num_moe_experts=4 model.moe_ffn_hidden_size=32 "
        "model.moe_router_topk=2",
        ((0, 4096), (0, 4096)),
        {"bf16": ""},
    ),
    "text": Slice(
        "gpt_pretrain",
        "model=llama3_8b model.num_layers=6 model.encoder_seq_length=4096 model.data.pad_to=4096",
        f"model=gpt_tiny {TINY_VOCABULARY} model.data.pad_to=128",
        ((0, 4096), (0, 4096)),
        {"bf16": "", "fp8": EIGHT_BITS, "CUDA graphs": GRAPHS},  # the last: what is captured stays in memory
    ),
}


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=SLICES, default=list(SLICES))
    parser.add_argument("--tiny", action="store_true", help="sizes to try the script on a CPU")
    chosen = parser.parse_args()
    if not torch.cuda.is_available() and not chosen.tiny:
        raise ConfigError("there is no GPU that torch can use; --tiny tries this script without one")
    cpu.enable()
    backend = cpu.BACKENDS[cpu.device().type]
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    settings = {"device": device, "kernels": kernels("auto"), "peer": "the plan"}
    try:
        report(measure(chosen.only, chosen.rounds, chosen.tiny), chosen.json, settings)
    finally:
        torch.distributed.destroy_process_group()


def measure(names: list[str], rounds: int, tiny: bool) -> Iterator[dict[str, Any]]:
    for name in names:
        some, losses = SLICES[name], {}
        for way, more in some.ways.items():
            if more and kernels("auto") == "local":  # only Transformer Engine has that
                continue
            run = settled(some.recipe, f"{some.tiny if tiny else some.settings} trainer.precision=bf16 {more}")
            samples = made(run.model, tuple((seen, text // 64 if tiny else text) for seen, text in some.samples))
            batches = {"padded": collate(samples, 16), "packed": pack(samples, 16)}
            if more == GRAPHS:
                del batches["packed"]
            for kind, found in trained(run, batches, rounds).items():
                yield from rows_of(f"{name}, {way}, {kind}", run, batches[kind], *found)
                losses[way, kind] = found[1].loss
        for (way, kind), loss in losses.items():
            if way != "bf16":
                apart = abs(loss / losses["bf16", kind] - 1)
                yield row(f"{name}, {way}, {kind}: loss beside bf16's", apart, None, "apart", "<= 0.05")


def made(model: LanguageConfig, sizes: tuple[tuple[int, int], ...]) -> list[Sample]:
    """Random samples: images first, then text, of which every token is trained on."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for seen, text in sizes:
        tokens, images = torch.randint(0, 240, (text + 1,), generator=generator), Images()
        if seen:
            media: Any = model.media
            vision = media.vision_encoder
            edge = vision.image_size // vision.patch_dim
            pixels = torch.rand(seen * edge**2, 3 * vision.patch_dim**2, generator=generator)
            images = Images(pixels, torch.tensor([[1, edge, edge]] * seen))
            tokens = torch.cat([torch.full((seen * media.num_image_tokens,), media.image_token_index), tokens])
        labels = torch.cat([torch.full((len(tokens) - 1 - text,), IGNORE_INDEX), tokens[-text:]])
        samples.append(Sample(tokens[:-1], labels, images))
    return samples


def trained(
    run: RunConfig, batches: dict[str, Batch], rounds: int
) -> dict[str, tuple[list[float], StepResult, int | None]]:
    """Of each batch: seconds of a step, the last step's result, and the most bytes that the GPU held."""
    layout, found = one_process(run.model, len(batches["padded"].tokens)), {}
    with megatron_groups(layout):
        engine = engine_of(run, layout)
        for kind, batch in batches.items():
            for _ in range(WARM_UP):
                engine.step([batch], LR)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                result = engine.step([batch], LR)  # its loss is read, so the device has finished
                seconds.append(time.perf_counter() - start)
            found[kind] = seconds, result, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def engine_of(run: RunConfig, layout: Layout) -> Engine:
    """With weights that are drawn where they stand: those of billions of parameters take a CPU longer than all else."""
    if run.step.enable_cuda_graph:
        groups.seed_ranks(layout, run.step.seed, for_graphs=True)
    chunks = build_chunks(run, layout)
    for chunk in chunks:
        materialize(chunk, DTYPES[run.trainer.precision])
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
                elif name.endswith("weight"):  # a norm's
                    parameter.fill_(1.0)
    return make_engine(run, layout, chunks)


def rows_of(
    name: str, run: RunConfig, batch: Batch, seconds: list[float], result: StepResult, held: int | None
) -> Iterator[dict[str, Any]]:
    tokens, _, squares, patches, frames, *_ = result.counts
    speeds = [tokens / each for each in seconds]
    flops = step_flops(run.model, tokens, squares, patches, frames)
    device = torch.cuda.get_device_name().lower() if held else "CPU"
    known = next((one for key, one in hardware.HARDWARE.items() if key in device), None)
    expected = planned(run, batch, known) if held else (None, 0)
    yield row(name, speeds, expected[0], "tokens/s")
    tflops = sorted(flops / each / 1e12 for each in seconds)[len(seconds) // 2]
    yield row(f"{name}: of the model", tflops, None, "TFLOP/s")
    if known:
        yield row(f"{name}: MFU", tflops / known.bf16_tflops, None, "of bf16's peak")
    if held:
        yield row(f"{name}: most memory", held / GIB, expected[1] / GIB, "GiB", "+-0.08")


def planned(run: RunConfig, batch: Batch, on: hardware.Hardware | None) -> tuple[float | None, int]:
    """Tokens a second of a step of that batch, if the hardware is one that is known, and the most bytes it needs."""
    layout, work, speed = one_process(run.model, len(batch.tokens)), of_batch(batch, run.model), None
    if on is not None:
        speed = step_time(Case(run, layout, work, work, on), count(run, 1).of_stage(layout, 0)).tokens_per_sec
    activations = sum(activation_bytes(run, layout, 0, work).values())
    return speed, hold(run, layout, 0).memory.total + buffer_bytes(run, layout, work) + activations


if __name__ == "__main__":
    run_command(main)
