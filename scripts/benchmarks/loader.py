"""The loader on a data set as large as LLaVA-665k, made on the spot: indexing, first batch, memory, images, packing.

    python scripts/benchmarks/loader.py [--records 665000] [--json FILE]

Records have LLaVA's form and size, and only one row has images; the lengths of the packing rows are drawn from the
table beside this file, percentiles of each part of the 665k mix (its composition is published, the texts' lengths are
estimated).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from nemo_vlm.config import DataConfig, RunConfig
from nemo_vlm.data import packing
from nemo_vlm.data.loader import Share, training_loader
from nemo_vlm.data.opening import open_datasets
from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.layout import one_process
from nemo_vlm.models.base import family
from nemo_vlm.typed import defaults, read_run

LENGTHS = Path(__file__).with_name("llava665k_lengths.json")
WORDS = ["the", "bus", "in", "this", "image", "is", "white", "and", "red,", "a", "man", "irons", "on", "its", "back"]
SEQ_LENGTH, BATCH, STEPS, READ = 4096, 128, 200, 40
IMAGES, IMAGE_BATCH = 64, 16  # files, and samples that a rank reads a step
WIDTH, HEIGHT, REPEATS = 640, 480, 100  # of an image, and how often it is read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [*loading(options.records), *images(), image_path(), *packed()]
    result = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "rows": rows}
    for row in rows:
        sys.stdout.write(f"{row['name']}: {row['ours']:.4g} {row['unit']}, goal {row['goal']}\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def row(name: str, ours: float, unit: str, goal: float | None, most: bool = True) -> dict[str, Any]:
    """A figure and its goal, which is the most it may be, or the least."""
    ok = goal is None or (ours <= goal if most else ours >= goal)
    return {"name": name, "ours": ours, "peer": None, "unit": unit, "ratio": None, "goal": goal, "ok": ok}


def loading(records: int) -> Iterator[dict[str, Any]]:
    """Each worker starts from the same fork, so its base is the memory of a worker over few records."""
    with tempfile.TemporaryDirectory() as scratch:
        small, large = (write(Path(scratch, f"{count}.json"), count) for count in (1000, records))
        yield row("size of the JSON", large.stat().st_size / 1e9, "GB", None)
        started = time.perf_counter()
        opened(large)
        yield row("indexing", time.perf_counter() - started, "s", None)
        base, _ = worker(small)
        memory, first = worker(large)
        yield row("first batch, index warm", first, "s", 5.0)
        yield row("memory of a worker above that over 1000 records", memory - base, "MB", 150.0)


def images() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "images.json")
        path.write_text(json.dumps([with_image(number, path.parent) for number in range(IMAGES)]))
        memory, _ = worker(path, "llava", IMAGE_BATCH)
        yield row(f"memory of a worker, {IMAGE_BATCH} images of 336 pixels a step", memory, "MB", 1000.0)


def image_path() -> dict[str, Any]:
    """Pillow's decoding and resizing alone, by turns with the whole way from the file to patches; CPU time, the least.

    The file is a JPEG, about as smooth as a photo.
    """
    views = family("qwen2_vl", "processor").views_of(family("qwen2_vl", "config").Config(), DataConfig())
    noise = numpy.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=numpy.uint8)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "image.jpg")
        Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=90)
        (picture,) = views.frames(views.pixels([path]))[0]
        bare, ours = [], []
        for _ in range(REPEATS):
            bare.append(cpu_time(lambda: Image.open(path).resize(picture.size, Image.Resampling.BICUBIC)))
            ours.append(cpu_time(lambda: views.pixels([path])))
    return row("qwen2_vl image path", min(bare) / min(ours), "of bare Pillow's speed", 0.9, most=False)


def cpu_time(work: Callable[[], Any]) -> float:
    """Seconds of this thread."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def with_image(number: int, folder: Path) -> dict[str, Any]:
    pixels = numpy.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.jpg")
    turns = record(number)["conversations"]
    return {"image": f"{number}.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, *turns[1:]]}


def write(path: Path, count: int) -> Path:
    with open(path, "w") as file:
        for number in range(count):
            file.write(f"{',' if number else '['}\n{json.dumps(record(number))}")
        file.write("]")
    return path


def record(number: int) -> dict[str, Any]:
    """Three turns of some 1500 characters in all."""
    turns = []
    for turn in range(3):
        said = " ".join(WORDS[(number + turn + place) % len(WORDS)] for place in range(90))
        turns += [{"from": "human", "value": f'What is "that", in {number}?\n'}, {"from": "gpt", "value": said}]
    return {"id": f"{number:09d}", "conversations": turns}


def opened(path: Path, name: str = "gpt", batch: int = BATCH) -> tuple[RunConfig, Any]:
    """A family's run with its default model, which is not built, and its data."""
    tokenizer, config = train_tokenizer(WORDS, vocab_size=400), family(name, "config").Config
    model = defaults(config) | {"family": name, "vocab_size": len(tokenizer), "global_batch_size": batch}
    model["data"] |= {"data_path": str(path), "num_workers": 1}
    run = read_run({"trainer": {}, "exp_manager": {}, "model": model}, config)
    parts = family(name, "processor")
    run = replace(run, model=parts.settle(run.model, tokenizer))
    return run, open_datasets(run, parts.Processor(run.model, run.data, tokenizer)).train


def worker(path: Path, name: str = "gpt", batch: int = BATCH) -> tuple[float, float]:
    """MB that a worker has held at most in READ batches, shared pages included, and seconds until the first."""
    started = time.perf_counter()
    run, dataset = opened(path, name, batch)
    loader = training_loader(dataset, one_process(run.model, 8), Share(0, 1), run, READ, 0)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - started
    for _ in range(READ - 2):
        next(batches)
    status = Path(f"/proc/{batches._workers[0].pid}/status").read_text()  # type: ignore[attr-defined]
    (held,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return held / 1024, first


def packed() -> Iterator[dict[str, Any]]:
    """Tokens that are no padding, over STEPS global batches; eight ranks' packs where nothing is padded."""
    for ranks, pad_to in ((1, SEQ_LENGTH), (2, SEQ_LENGTH), (1, 8), (8, 8)):
        generator, tokens, positions = numpy.random.default_rng(0), 0, 0
        for _ in range(STEPS):
            sizes = drawn(generator)
            packs = packing.plan(numpy.array(sizes)[:, None], [SEQ_LENGTH], ranks)
            tokens += sum(sizes)
            positions += sum(-(-sum(sizes[place] for place in pack) // pad_to) * pad_to for pack in packs)
        yield row(f"tokens in packs, {ranks} ranks, padded to {pad_to}", tokens / positions, "of all", 0.95, most=False)


def drawn(generator: numpy.random.Generator) -> list[int]:
    """Lengths of a global batch."""
    parts = json.loads(LENGTHS.read_text())["parts"]
    weights = numpy.array([part["thousand_samples"] for part in parts], float)
    found = []
    for number in generator.choice(len(parts), BATCH, p=weights / weights.sum()):
        percentiles = parts[number]["text_tokens_percentiles"]
        text = numpy.interp(generator.uniform(0, 100), [int(p) for p in percentiles], list(percentiles.values()))
        found.append(parts[number]["image_tokens"] + int(text))
    return found


if __name__ == "__main__":
    main()
