"""A training step beside Hugging Face Trainer's, and beside a bare Megatron-Core loop's.

    python scripts/benchmarks/train.py [--only llama llava] [--threads N] [--rounds N] [--json FILE]

The Llama has 8 layers of width 512, 8 heads, 4 groups of them and a vocabulary of 8000; every position of its rows of
512 tokens is trained on. The LLaVA has the same layers, a vocabulary of 32000 and 144 tokens an image, and is trained
on a fifth of its positions; its tower is frozen, as in LLaVA's second stage. All sides start from one checkpoint of
random weights and read the same samples, which stand in memory, in the same order.

- ours: what an example starts, Lightning's Trainer with our loader, callbacks and metrics.csv
- Hugging Face: transformers.Trainer, scaled_dot_product_attention, fused AdamW, batches padded to their longest sample
- bare Megatron: our model under Megatron's DistributedDataParallel, schedule and optimizer, with nothing around it;
  nor do its linear layers add gradients to Megatron's buffers by themselves, as ours are made to

Each side is a process of its own, and the others wait while one has its turn of a step; every second round goes
backwards, and a round before them warms up. Losses of the first ten steps are compared one by one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from side_by_side import in_processes, report, row
from trainers import Job, Turns, bare, hugging_face, ours, trainer_flags, trainer_settings

STEPS = 1  # of a turn
COMPARED = 10  # losses of each side
Side = Callable[[Job, Turns], None]
Told = list[tuple[float, list[float]]]  # of each turn, seconds a step and losses


def main() -> None:
    parser = trainer_flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=("llama", "llava"), default=("llama", "llava"))
    options = parser.parse_args()
    megatron = "torch's AdamW, as Megatron takes it without Apex, with its fused kernel switched on"
    about = trainer_settings(options.threads) | {"bare Megatron": megatron}
    report(measure(options.only, options.rounds, options.threads), options.json, about)


def measure(names: Sequence[str], rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        if "llama" in names:
            job = Job("gpt", make_llama(Path(scratch)), 2, 512, 1.0, rounds + 1, STEPS, threads)
            told = take_turns(job, {"ours": ours, "Hugging Face": hugging_face, "bare Megatron": bare}, rounds)
            yield compared("dense LM, a step", told, "Hugging Face", "<= 1.0")
            yield compared("dense LM, a step", told, "bare Megatron", "<= 1.03")
            yield from losses("dense LM", told)
        if "llava" in names:
            job = Job("llava", make_llava(Path(scratch)), 4, 100, 0.2, rounds + 1, STEPS, threads)
            told = take_turns(job, {"ours": ours, "Hugging Face": hugging_face}, rounds)
            yield compared("LLaVA tuning, a step", told, "Hugging Face", "<= 0.9")
            yield from losses("LLaVA tuning", told)


def make_llama(scratch: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder(8000)))
    model.save_pretrained(scratch / "llama")
    return scratch / "llama"


def make_llava(scratch: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    tower = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower, image_size=168, patch_size=14),
        text_config=transformers.LlamaConfig(**decoder(32000)),
        image_token_index=31999,
        image_seq_length=144,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(scratch / "llava")
    return scratch / "llava"


def decoder(vocabulary: int) -> dict[str, Any]:
    sizes = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8)
    return sizes | dict(num_key_value_heads=4, vocab_size=vocabulary, max_position_embeddings=2048)


def take_turns(job: Job, sides: Mapping[str, Side], rounds: int) -> dict[str, Told]:
    """What each side tells of its turns, that of the round that warms up at the front."""
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    return in_processes({name: partial(begin, side, job) for name, side in sides.items()}, rounds, "spawn")


def begin(side: Side, job: Job, line: Connection) -> None:
    torch.set_num_threads(job.threads)
    side(job, Turns(line, job))


def compared(name: str, told: Mapping[str, Told], peer: str, goal: str) -> dict[str, Any]:
    mine, theirs = ([seconds for seconds, _ in told[side][1:]] for side in ("ours", peer))
    return row(f"{name}, beside {peer}", mine, theirs, "s", goal)


def losses(name: str, told: Mapping[str, Told]) -> Iterator[dict[str, Any]]:
    """How far those of the first steps are apart, at most; from step to step differences in rounding grow."""
    found = {side: [loss for _, some in turns for loss in some][:COMPARED] for side, turns in told.items()}
    mine = found.pop("ours")
    for peer, theirs in found.items():
        apart = max(abs(one - two) for one, two in zip(mine, theirs, strict=True))
        yield row(f"{name}, losses of {len(mine)} steps beside {peer}", apart, None, "nats apart", "<= 1e-4")


if __name__ == "__main__":
    main()
