"""Useful tokens a second of packed steps, beside Hugging Face Trainer's padded batches; how full and even packs are.

    python scripts/benchmarks/packing.py [--threads N] [--rounds N] [--json FILE]

Lengths are drawn from the model of LLaVA-1.5's 665k mix beside this file and divided by 8, so that a CPU gets through
them; shares of padding do not change by that. Random ids stand for images and text, of which the text is trained on. A
Llama of 4 layers of width 256 takes an optimizer step behind as many samples on all sides. Hugging Face Trainer takes
them at random, or by groups of like lengths (of 50 batches, its default), each batch padded to its longest sample; ours
takes them at random, packs those of a step, up to 8192 / 8 tokens together, and pads nothing. Tokens are useful that
are no padding.

Each side is a process of its own, and the others wait while one has its turn of 48 samples; every second round goes
backwards, and a round before them warms up. Rows of filling and balance are of whole packs of 4096 tokens, lengths
undivided, 128 samples a step. Of 8 ranks filling is told without a goal: each takes as few packs as a step has tokens
for, so that the last ones are shorter, and would be less full if they were padded, which a run does not do.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import torch
from side_by_side import report, row
from train import Told, take_turns
from trainers import Job, Turns, arguments, fit_watched, run_of, theirs, train_watched, trainer_flags, trainer_settings

from nemo_vlm.batch import IGNORE_INDEX, Sample
from nemo_vlm.data import packing

LENGTHS = Path(__file__).with_name("llava665k_lengths.json")
VOCABULARY, SCALE, SAMPLES, TURN, ROUNDS = 2000, 8, 1664, 48, 31
TOGETHER = 8192 // SCALE  # tokens of a pack at most: about what their batch of 8 has with padding
LIMIT, STEP, STEPS = 4096, 128, 200  # of filling: tokens of a pack, samples of a step, steps


def main() -> None:
    options = trainer_flags(__doc__, ROUNDS).parse_args()
    report(chain(filled(), raced(options.rounds, options.threads)), options.json, trainer_settings(options.threads))


def drawn(generator: numpy.random.Generator, count: int) -> numpy.ndarray:
    """[count, 2]: tokens of samples, and how many of them stand for images."""
    parts = json.loads(LENGTHS.read_text())["parts"]
    weights = numpy.array([part["thousand_samples"] for part in parts], float)
    found = []
    for number in generator.choice(len(parts), count, p=weights / weights.sum()):
        percentiles = parts[number]["text_tokens_percentiles"]
        text = numpy.interp(generator.uniform(0, 100), [int(p) for p in percentiles], list(percentiles.values()))
        found.append((parts[number]["image_tokens"] + int(text), parts[number]["image_tokens"]))
    return numpy.array(found)


def filled() -> Iterator[dict[str, Any]]:
    """Whole packs, each padded to the limit, of one rank; how even the work of several ranks is where nothing is."""
    for ranks in (1, 2, 8):
        generator, tokens, count, most, means = numpy.random.default_rng(0), 0, 0, [], []
        for _ in range(STEPS):
            lengths = drawn(generator, STEP)[:, :1]
            packs = packing.plan(lengths, [LIMIT], ranks)
            loads = numpy.array([lengths[pack].sum() for pack in packs])
            dealt = [loads[packing.share(range(len(packs)), rank, ranks)].sum() for rank in range(ranks)]
            tokens, count = tokens + loads.sum(), count + len(packs)
            most.append(max(dealt))
            means.append(loads.sum() / ranks)
        goal = ">= 0.95" if ranks < 8 else ""
        yield row(f"useful of whole packs, {ranks} ranks", tokens / count / LIMIT, None, "of all", goal)
        if ranks > 1:
            even = sum(most) / sum(means)
            yield row(f"tokens of the fullest of {ranks} ranks, over their mean", even, None, "times", "<= 1.02")


def raced(rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        job = Job("gpt", make_model(Path(scratch)), 8, 0, 0.0, rounds + 1, TURN // 8, threads)
        sides = {
            "ours of 8": partial(ours, batch=8),
            "ours of 16": partial(ours, batch=16),
            "random of 8": partial(hugging_face, batch=8, sampling="random"),
            "random of 16": partial(hugging_face, batch=16, sampling="random"),
            "grouped of 8": partial(hugging_face, batch=8, sampling="group_by_length"),
        }
        told = take_turns(job, sides, rounds)
    for mine, peer, goal in (
        ("ours of 8", "random of 8", ">= 1.4"),
        ("ours of 16", "random of 16", ">= 1.6"),
        ("ours of 8", "grouped of 8", ">= 1.05"),
    ):
        yield row(f"packed, beside {peer}", speeds(told[mine]), speeds(told[peer]), "tokens/s", goal)


def speeds(told: Told) -> list[float]:
    """Useful tokens a second of each turn but the one that warms up."""
    return [sum(tokens) / len(tokens) / seconds for seconds, tokens in told[1:]]


def make_model(scratch: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY)
    transformers.LlamaForCausalLM(config).save_pretrained(scratch / "llama")
    return scratch / "llama"


def samples() -> list[Sample]:
    """The very last position has no label, since Hugging Face gives it none."""
    found, generator = [], torch.Generator().manual_seed(0)
    for number, (length, image) in enumerate((drawn(numpy.random.default_rng(0), SAMPLES) // SCALE).tolist()):
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = tokens.roll(-1)
        labels[: max(image - 1, 0)] = labels[-1] = IGNORE_INDEX
        found.append(Sample(tokens, labels, record=number))
    return found


class AsTheyAre:
    """In the place of a processor."""

    def sample(self, record: Sample) -> Sample:
        return record


def ours(job: Job, turns: Turns, batch: int) -> None:
    """Order random, a step's samples packed."""
    from nemo_vlm.data.records import RecordDataset

    turns.steps = TURN // batch
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(replace(job, batch=batch, steps=turns.steps), folder)
        data = replace(run.data, dataloader_type="cyclic", packing=True)
        run = replace(run, data=data, model=replace(run.model, encoder_seq_length=TOGETHER))
        made = samples()
        lengths = numpy.array([(len(sample.tokens), 0) for sample in made], numpy.int32)
        dataset = RecordDataset([made], None, AsTheyAre(), lengths)  # type: ignore[list-item]
        fit_watched(run, dataset, turns, lambda _, packs: sum(int(pack.lengths.sum()) for pack in packs))


def hugging_face(job: Job, turns: Turns, batch: int, sampling: str) -> None:
    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        found.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))

    found: list[int] = []
    turns.steps = TURN // batch
    with tempfile.TemporaryDirectory() as folder:
        model = theirs(job)
        model.register_forward_pre_hook(count, with_kwargs=True)
        how = arguments(replace(job, batch=batch, steps=turns.steps), folder, sampling)
        train_watched(model, how, samples(), turns, found)


if __name__ == "__main__":
    main()
