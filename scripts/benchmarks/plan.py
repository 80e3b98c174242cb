"""Planned memory beside what a step of the same run really holds, on layouts of CPU ranks, for all families.

    python scripts/benchmarks/plan.py [--only NAME ...] [--json FILE]

Ours is what dry_run=true plans for a rank: weights, gradients, optimizer, activations and buffers. The peer is a step
of the real engine on samples as the plan assumes them, of which every tensor's bytes are counted, op by op
(planning.measured); of the ranks of each stage the first. Beside the sum, whose goal is 8 %, stands what comes and goes
within a step, within 10 %, so that parts cannot make up for each other: all but weights, gradients and optimizer.
Gradients of FSDP come and go too.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from side_by_side import flags, report, row

from nemo_vlm.config import (
    DataConfig,
    ExpManagerConfig,
    LanguageConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    StepConfig,
    TokenizerConfig,
    TrainerConfig,
)
from nemo_vlm.config.peft import Target
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.planning import plan as planning
from nemo_vlm.training.rehearsal import rehearse

MB = 1e6
GOAL = 0.08  # of what is measured
PASSING = 0.1  # the same of what comes and goes
SIZES = dict(hidden_size=192, ffn_hidden_size=512, num_attention_heads=6, num_query_groups=2, kv_channels=32)
TP, PP = dict(tensor_model_parallel_size=2), dict(pipeline_model_parallel_size=2)
SP = TP | dict(sequence_parallel=True)
VPP = PP | dict(virtual_pipeline_model_parallel_size=2)
FULL = dict(activations_checkpoint_granularity="full")
BLOCK = FULL | dict(activations_checkpoint_method="block", activations_checkpoint_num_layers=2)


@dataclass(frozen=True)
class Case:
    """A run of a small model of a family."""

    family: str
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    lora: tuple[Target, ...] = ()
    precision: str = "32"

    @property
    def run(self) -> RunConfig:
        peft = (
            PeftConfig("lora", None, LoraConfig(target_modules=self.lora, adapter_dim=8)) if self.lora else PeftConfig()
        )
        return RunConfig(
            self.family,
            TrainerConfig(devices=self.ranks, accelerator="cpu", precision=self.precision),  # type: ignore[arg-type]
            ExpManagerConfig(),
            model_of(self),
            ParallelConfig(**self.parallel),
            StepConfig(**dict(micro_batch_size=2, global_batch_size=8) | self.step),
            DataConfig(**self.data),
            OptimConfig(),
            TokenizerConfig(),
            peft=peft,
        )


def model_of(case: Case) -> LanguageConfig:
    """The family's smallest, in sizes at which activations weigh more than what is rounded."""
    tiny: Any = family(case.family, "tiny").config()
    sizes = SIZES | dict(num_layers=4, encoder_seq_length=256, vocab_size=2048) | case.model
    if tiny.num_moe_experts:
        sizes |= dict(moe_ffn_hidden_size=128)
    if tiny.mrope_section:
        sizes |= dict(mrope_section=None)
    if tiny.media is None:
        return replace(tiny, **sizes)
    vision = replace(tiny.mm_cfg.vision_encoder, hidden_size=128, ffn_hidden_size=384)
    if case.family == "llava":
        vision = replace(vision, image_size=96)
    mm = replace(tiny.mm_cfg, vision_encoder=replace(vision, freeze="tower" in case.frozen))
    mm = replace(mm, llm=replace(mm.llm, freeze="language" in case.frozen))
    return replace(tiny, **sizes, mm_cfg=mm)


PHOTO = dict(max_pixels=200_000)
CASES = {
    "gpt": Case("gpt"),
    "gpt, a larger vocabulary": Case("gpt", model=dict(vocab_size=16384)),
    "gpt, bf16": Case("gpt", precision="bf16"),
    "gpt, recomputed": Case("gpt", step=FULL),
    "gpt, tp2": Case("gpt", 2, TP),
    "gpt, fsdp": Case("gpt", 2, dict(fsdp=True)),
    "gpt, fsdp, a larger vocabulary": Case("gpt", 2, dict(fsdp=True), model=dict(vocab_size=16384)),
    "gpt, cp2": Case("gpt", 2, dict(context_parallel_size=2)),
    "gpt, pp2 vpp2": Case("gpt", 2, VPP),
    "llava": Case("llava"),
    "llava, tower frozen": Case("llava", frozen=("tower",)),
    "llava, projector alone": Case("llava", frozen=("tower", "language")),
    "llava, lora": Case("llava", lora=("attention", "mlp")),
    "llava, packed": Case("llava", data=dict(packing=True), model=dict(encoder_seq_length=800)),
    "llava, pp2": Case("llava", 2, PP),
    "llava, tp2 pp2 with sequence parallelism": Case("llava", 4, SP | PP),
    "qwen2_vl": Case("qwen2_vl", data=PHOTO),
    "qwen2_vl, block recomputed": Case("qwen2_vl", data=PHOTO, step=BLOCK),
    "qwen2_vl, packed": Case("qwen2_vl", data=PHOTO | dict(packing=True), model=dict(encoder_seq_length=800)),
    "qwen2_vl, tp2 with sequence parallelism": Case("qwen2_vl", 2, SP, data=PHOTO),
    "qwen3_vl": Case("qwen3_vl", data=PHOTO),
    "qwen3_vl, ep2": Case("qwen3_vl", 2, dict(expert_model_parallel_size=2), data=PHOTO),
    "qwen3_vl, pp2 ep2": Case("qwen3_vl", 4, PP | dict(expert_model_parallel_size=2), data=PHOTO),
    "qwen3_vl, tp2 ep2": Case(
        "qwen3_vl", 2, TP | dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1), data=PHOTO
    ),
}


def main() -> None:
    parser = flags(__doc__, rounds=None)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    settings = {"peer": "tensor bytes at the peak of the second step, counted under a TorchDispatchMode"}
    report(rows({name: CASES[name] for name in options.only}), options.json, settings)


def rows(cases: dict[str, Case]) -> Iterator[dict[str, Any]]:
    for ranks in sorted({case.ranks for case in cases.values()}):
        some = {name: case.run for name, case in cases.items() if case.ranks == ranks}
        for (name, run), found in zip(some.items(), measured(list(some.values()), ranks), strict=True):
            yield from compared(name, run, found)


def compared(name: str, run: RunConfig, found: list[Counter[str]]) -> Iterator[dict[str, Any]]:
    """Rows for the first rank of each stage."""
    for entry in planning.describe(planning.training(run, {}))["stages"]:
        if entry["tensor_rank"] == entry["expert_rank"] == 0:
            planned, peer = Counter(entry["bytes"]), found[entry["rank"]]
            stage = f", stage {entry['stage']}" if run.parallel.pipeline_model_parallel_size > 1 else ""
            yield row(f"{name}{stage}", planned.total() / MB, peer.total() / MB, "MB", f"+-{GOAL}")
            kept = ("weights", "optimizer") + (() if run.parallel.fsdp else ("gradients",))
            ours, theirs = (sum(size for kind, size in sizes.items() if kind not in kept) for sizes in (planned, peer))
            yield row(f"{name}{stage}: of a step", ours / MB, theirs / MB, "MB", f"+-{PASSING}")


def measured(runs: list[RunConfig], ranks: int) -> list[list[Counter[str]]]:
    """What each rank of each run held, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(on_rank, (runs, ranks, folder), nprocs=ranks, start_method="fork")
        found = [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(ranks)]
    return [list(each) for each in zip(*found, strict=True)]


def on_rank(rank: int, runs: list[RunConfig], ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of frozen parts whose weights are random
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.distributed.init_process_group("gloo", (Path(folder) / "ranks").as_uri(), rank=rank, world_size=ranks)
    torch.save([held(run) for run in runs], Path(folder) / str(rank))
    torch.distributed.barrier()


def held(run: RunConfig) -> Counter[str]:
    layout = planning.training(run, {}).layout
    groups.initialize(layout, seed=1)
    found = rehearse(run, layout)
    groups.shut_down()
    return found


if __name__ == "__main__":
    main()
