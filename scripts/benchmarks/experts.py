"""A training step with experts, beside the dense one in which a token passes as many weights.

    python scripts/benchmarks/experts.py [--experts N] [--topk K] [--rounds N] [--json FILE]

A small decoder of random weights on this machine, one process: local kernels on a CPU, Transformer Engine's grouped
products where it is. Medians of rounds in which the two take turns; what the experts cost more is their router, the
sorting of tokens, and products in small pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch

from nemo_vlm.batch import Batch, Sample, collate
from nemo_vlm.config import RunConfig
from nemo_vlm.inference.restore import megatron_groups, process_group
from nemo_vlm.layout import one_process
from nemo_vlm.mcore import cpu
from nemo_vlm.models.base import family
from nemo_vlm.training.build import build_engine
from nemo_vlm.typed import defaults, read_run

LAYERS, HIDDEN, EXPERT, VOCABULARY = 4, 512, 512, 8192
SAMPLES, LENGTH = 4, 512  # of a step
GOAL = 0.4  # of the dense step's speed; on a CPU experts are computed one by one


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--experts", type=int, default=8)
    flags.add_argument("--topk", type=int, default=2)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--json", type=Path, help="where the figures are written")
    options = flags.parse_args()
    runs = {
        "experts": run_of(EXPERT, num_moe_experts=options.experts, moe_router_topk=options.topk),
        "dense": run_of(options.topk * EXPERT),
    }
    speed = {name: median(found) for name, found in take_turns(runs, options.rounds).items()}
    report(f"step, {options.topk} of {options.experts} experts / dense", speed, options.json)


def run_of(ffn_hidden_size: int, **experts: int) -> RunConfig:
    kind = family("gpt", "config").Config
    sizes = dict(num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=ffn_hidden_size, num_attention_heads=8)
    batch = dict(micro_batch_size=SAMPLES, global_batch_size=SAMPLES)
    model = defaults(kind) | sizes | batch | experts | {"family": "gpt", "vocab_size": VOCABULARY}
    return read_run({"trainer": {"precision": "32"}, "exp_manager": {}, "model": model}, kind)


def take_turns(runs: dict[str, RunConfig], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each; a first round warms up."""
    speed: dict[str, list[float]] = {name: [] for name in runs}
    layout, batch = one_process(next(iter(runs.values())).model, SAMPLES), make_batch()
    with process_group(layout), megatron_groups(layout):
        engines = {name: build_engine(run, layout) for name, run in runs.items()}
        for number in range(rounds + 1):
            for name, engine in engines.items():
                start = time.perf_counter()
                engine.step([batch.to(cpu.device())], lr=1e-4)  # its loss is read, so the device has finished
                if number:
                    speed[name].append(SAMPLES * LENGTH / (time.perf_counter() - start))
    return speed


def make_batch() -> Batch:
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return collate([Sample(row[:-1], row[1:]) for row in tokens])


def report(name: str, speed: dict[str, float], path: Path | None) -> None:
    ratio = speed["experts"] / speed["dense"]
    verdict = "ok" if ratio >= GOAL else "MISSED"
    print(f"{name:45} {speed['experts']:>8.0f} {speed['dense']:>8.0f} tokens/s  {ratio:.2f} >= {GOAL} {verdict}")
    if path is not None:
        machine = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
        row = {"name": name, **speed, "unit": "tokens/s", "ratio": ratio, "goal": f">= {GOAL}", "ok": ratio >= GOAL}
        path.write_text(json.dumps({"machine": machine, "rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
