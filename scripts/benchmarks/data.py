"""The data path beside plain Pillow, Hugging Face's processors and Energon: images, and records by the million.

    python scripts/benchmarks/data.py [--records 665000] [--rounds N] [--json FILE]

- Images a second of one core, from the file to the patches that leave a worker (`Views.pixels`). The limit is what
  Pillow alone takes to decode the same JPEGs and to resize them to the same size with its bicubic filter, for LLaVA's
  padding on the same square canvas. The files are crops of the two photographs that scikit-learn brings, in COCO's
  sizes; turns are many and short, and each side is a process of its own on the same core, whose time is counted, and
  for each round a new one, which has seen no image before: what a process has freed decides how often the system takes
  memory from it and clears it again, a tenth of Pillow's time. Ours asks Pillow to keep it.
  Beside it the families' processors of transformers, backend pil, which normalise too: ours does that where the model
  is, and what it costs there is told.
- image_draft=true beside full decoding, of photographs of some twelve million pixels, and how far their pixels differ.
- Samples a second of LLaVA's loader with one worker, tokens and batches included, beside Energon's with a task encoder
  that resizes, crops and stacks.
- A JSON of LLaVA's form, 1500 characters a record, made on the spot, each figure in a process of its own. The first
  batch, the median of three: of a JSON that is new, where records are found and counted once and kept in an index
  beside it, and of one that has its index. A worker's memory in MB of a million bytes: its own, which are the private
  pages that go with it after 16 batches, and beside that how much its highest, shared pages included, grows with the
  file.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from megatron.energon import DefaultTaskEncoder, SampleDecoder, VQASample, WorkerConfig, get_loader, get_val_dataset
from PIL import Image, ImageFile, ImageOps
from side_by_side import by_turns, flags, in_processes, report, row
from sklearn.datasets import load_sample_images

from nemo_vlm.config import DataConfig, RunConfig
from nemo_vlm.data.cached import of_kind
from nemo_vlm.data.loader import Share, training_loader
from nemo_vlm.data.opening import open_datasets
from nemo_vlm.data.prepare_wds import Sharding, prepare
from nemo_vlm.data.records import RecordFile
from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.layout import one_process
from nemo_vlm.models.base import family
from nemo_vlm.models.images import CLIP
from nemo_vlm.typed import defaults, read_run

WORDS = ["the", "bus", "in", "this", "image", "is", "white", "and", "red,", "a", "man", "irons", "on", "its", "back"]
SIZES = ((640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (375, 500), (640, 360), (612, 612))  # COCO's
LARGE = (4032, 3024)
EDGE = 336  # of LLaVA 1.5's tower
LOADED, BATCH = 128, 16  # images that a loader reads; samples of a batch
TEXT_BATCH, FEWEST, READ = 128, 3, 16  # records of a step; steps
FIRSTS = 3  # first batches of which the median counts
SHORT = 10  # turns of images in each pair of processes
FEW, MANY, BLOCK = 10_000, 1_000_000, 1000  # records; and how many differ
GOALS = {"bare Pillow": ">= 0.9"}
Way = Callable[[], Any]


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--records", type=int, default=665_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = {"cores of each side": 1, "images": f"{len(SIZES)} JPEGs of {SIZES}, quality 90"}
        report(measure(folder, options.records, options.rounds), options.json, settings)


def measure(folder: Path, records: int, rounds: int) -> Iterator[dict[str, Any]]:
    yield from loading(folder, records)  # first, while this process is small
    paths = photographs(folder)
    yield from image_path(paths, rounds)
    yield from draft(folder, rounds)
    yield from loaders(folder, paths, rounds)


def photographs(folder: Path) -> list[Path]:
    """Of either scene by turns."""
    found, scenes = [], [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number, size in enumerate(SIZES):
        found.append(folder / f"{size[0]}x{size[1]}.jpg")
        ImageOps.fit(scenes[number % 2], size, Image.Resampling.BICUBIC).save(found[-1], quality=90)
    return found


def views_of(name: str, **data: Any) -> Any:
    """A family's image part with its default model."""
    config, chosen = family(name, "config").Config(), DataConfig(**data)
    return family(name, "views").Views(config, chosen) if name == "llava" else parts_of(name).views_of(config, chosen)


def parts_of(name: str) -> Any:
    return family(name, "processor")


@dataclass(frozen=True)
class Case:
    """A family's way of seeing images.

    Attributes:
        bare: the same by Pillow alone, as far as it goes.
        processor: of transformers.
    """

    name: str
    views: Any
    bare: Callable[[Path], Image.Image]
    processor: Any

    def patches(self, path: Path) -> Any:
        return self.views.pixels([path])

    def by_transformers(self, path: Path) -> Any:
        return self.processor(Image.open(path).convert("RGB"), return_tensors="pt")


def cases() -> Iterator[Case]:
    square = {"height": EDGE, "width": EDGE}
    clip = transformers.CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=square)
    yield Case("LLaVA, 336 pixels, crop", views_of("llava"), cropped, clip)
    llava = transformers.LlavaImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=square, do_pad=True)
    yield Case("LLaVA, 336 pixels, pad", views_of("llava", image_aspect_ratio="pad"), padded, llava)
    for name in ("qwen2_vl", "qwen3_vl"):
        views, config = views_of(name), family(name, "config").Config()
        files = parts_of(name).hf_processor(config, DataConfig())
        theirs = transformers.Qwen2VLImageProcessorPil(**files["preprocessor_config.json"])
        yield Case(f"{name}, own size", views, partial(native, views), theirs)


def image_path(paths: Sequence[Path], rounds: int) -> Iterator[dict[str, Any]]:
    for case in cases():
        yield beside(case, "bare Pillow", case.bare, paths, rounds)
        yield beside(case, "transformers", case.by_transformers, paths, 1)
        seconds = apart(normalising, case.views, paths, rounds)
        yield row(f"{case.name}: normalising", [1e3 * each / len(paths) for each in seconds], None, "ms/image")


def normalising(views: Any, paths: Sequence[Path], rounds: int) -> list[float]:
    return by_turns({"normalise": views.pixels(paths).normalised}, rounds)["normalise"]


def beside(case: Case, peer: str, way: Callable[[Path], Any], paths: Sequence[Path], rounds: int) -> dict[str, Any]:
    ways = {"ours": partial(every, case.patches, paths), "peer": partial(plain, partial(every, way, paths))}
    found = [on_one_core(ways, SHORT) for _ in range(rounds)]
    ours, theirs = ([len(paths) / each for one in found for each in one[name]] for name in ways)
    return row(f"{case.name}: {peer}", ours, theirs, "images/s", GOALS.get(peer, ""))


def every(way: Callable[[Path], Any], paths: Sequence[Path]) -> list[Any]:
    """All together, as a batch has them."""
    return [way(path) for path in paths]


def plain(way: Way) -> None:
    """With what models.images sets in Pillow as Pillow has it."""
    Image.core.set_blocks_max(0)
    ImageFile.MAXBLOCK = 2**16
    way()


def on_one_core(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """As by_turns, of the core's time, each in a process of its own: memory that one keeps does not serve the other."""
    told = in_processes({name: partial(serve, way) for name, way in ways.items()}, rounds, "fork")
    return {name: seconds[1:] for name, seconds in told.items()}


def serve(way: Way, line: Connection) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    while line.recv():
        start = time.process_time()
        way()
        line.send(time.process_time() - start)


def cropped(path: Path) -> Image.Image:
    return centre(scaled(Image.open(path).convert("RGB")))


def scaled(image: Image.Image) -> Image.Image:
    shortest = min(image.size)
    width, height = (int(EDGE * side / shortest) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def centre(image: Image.Image) -> Image.Image:
    left, top = (image.width - EDGE) // 2, (image.height - EDGE) // 2
    return image.crop((left, top, left + EDGE, top + EDGE))


def padded(path: Path) -> Image.Image:
    """As LLaVA's expand2square."""
    image = Image.open(path).convert("RGB")
    edge = max(image.size)
    canvas = Image.new("RGB", (edge, edge), tuple(int(255 * value) for value in CLIP["mean"]))
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return canvas.resize((EDGE, EDGE), Image.Resampling.BICUBIC)


def native(views: Any, path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    return image.resize(views.images.resized(image.size, 1, views.format), Image.Resampling.BICUBIC)


def draft(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    large = folder / "large.jpg"
    mosaic().save(large, quality=90)
    limits = {"max_pixels": 1280 * 28**2}
    for name, data in (("llava", {"image_aspect_ratio": "pad"}), ("qwen2_vl", limits), ("qwen3_vl", limits)):
        plain, fast = (views_of(name, **data, image_draft=chosen) for chosen in (False, True))
        ways = {"draft": partial(fast.pixels, [large]), "full": partial(plain.pixels, [large])}
        speeds = {way: [1 / each for each in found] for way, found in by_turns(ways, rounds).items()}
        told = f"{name}, image_draft, {LARGE[0]} x {LARGE[1]}"
        yield row(f"{told}: full decoding", speeds["draft"], speeds["full"], "images/s")
        drafted, full = (way().pixel_values.float() for way in ways.values())
        yield row(f"{told}: apart, of 255", float((drafted - full).abs().mean()), None, "levels")


def mosaic() -> Image.Image:
    """Both photographs many times side by side: as large as a camera's, and as sharp as they are."""
    tiles, large = [Image.fromarray(pixels) for pixels in load_sample_images().images], Image.new("RGB", LARGE)
    for number in range(64):
        large.paste(tiles[number % 2], (number % 8 * tiles[0].width, number // 8 * tiles[0].height))
    return large


def loaders(folder: Path, paths: Sequence[Path], rounds: int) -> Iterator[dict[str, Any]]:
    file, tars = folder / "images.json", folder / "tars"
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " ".join(WORDS)}]
    shown = [{"image": paths[number % len(paths)].name, "conversations": said} for number in range(LOADED)]
    file.write_text(json.dumps(shown))
    prepare(RecordFile(file), tars, Sharding(LOADED, (1.0, 0.0, 0.0)), 0.0)
    run, dataset = opened(file, "llava", BATCH)
    ways: dict[str, Way] = {
        "ours": lambda: all(training_loader(dataset, one_process(run.model), Share(0, 1), run, LOADED // BATCH, 0)),
        "Energon": partial(by_energon, tars),
    }
    speeds = {way: [LOADED / each for each in found] for way, found in by_turns(ways, rounds).items()}
    yield row("LLaVA's loader, one worker: Energon's", speeds["ours"], speeds["Energon"], "samples/s")


class Resizing(DefaultTaskEncoder):
    """The pixels that LLaVA sees, and the text as it stands."""

    decoder = SampleDecoder(image_decode="pil")

    def encode_sample(self, sample: VQASample) -> VQASample:
        return replace(sample, image=numpy.array(centre(scaled(sample.image.convert("RGB")))))

    def batch(self, samples: list[VQASample]) -> tuple[torch.Tensor, list[str]]:
        return torch.stack([torch.from_numpy(one.image) for one in samples]), [one.context for one in samples]

    def encode_batch(self, batch: tuple[torch.Tensor, list[str]]) -> tuple[torch.Tensor, list[str]]:
        return batch


def by_energon(tars: Path) -> None:
    workers = WorkerConfig(rank=0, world_size=1, num_workers=1)
    found = get_val_dataset(tars, split_part="train", batch_size=BATCH, worker_config=workers, task_encoder=Resizing())
    assert sum(len(pixels) for pixels, _ in get_loader(found)) == LOADED


def loading(folder: Path, records: int) -> Iterator[dict[str, Any]]:
    few, some, many = (write(folder / f"{count}.json", count) for count in (FEW, records, MANY))
    os.sync()  # or the disk would be busy with them meanwhile
    yield row(f"{records} records: size of the JSON", some.stat().st_size / 1e9, None, "GB")
    cold, warm = ([first_batch(some, indexed) for _ in range(FIRSTS)] for indexed in (False, True))
    yield row(f"{records} records: first batch, not indexed yet", cold, None, "s", "<= 5.0")
    yield row(f"{records} records: first batch, indexed", warm, None, "s", "<= 5.0")
    steady = apart(text_worker, some, READ)
    yield row("text of a worker", steady["speed"], None, "records/s")
    yield row(f"{records} records: a worker's own memory", steady["own"], None, "MB", "<= 150")
    base = apart(text_worker, write(folder / "1000.json", 1000), READ)["memory"]
    yield row(
        f"{records} records: a worker's memory above 1000 records'", steady["memory"] - base, None, "MB", "<= 150"
    )
    for path in (few, many):
        apart(RecordFile, path)  # which indexes it
    held = [apart(text_worker, path, READ)["memory"] for path in (few, many)]
    yield row(f"a worker's memory, {MANY} records above {FEW}", held[1] - held[0], None, "MB", "<= 20")


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """In a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(work, *given).result()


def first_batch(path: Path, indexed: bool) -> float:
    """Seconds until it is there."""
    for index in [] if indexed else of_kind(path, "index"):
        index.unlink()
    return float(apart(text_worker, path, FEWEST)["first"])


def text_worker(path: Path, steps: int) -> dict[str, float]:
    """Seconds until the first batch, MB of a worker in so many, at most and its own, and records a second."""
    started = time.perf_counter()
    run, dataset = opened(path)
    batches = iter(training_loader(dataset, one_process(run.model), Share(0, 1), run, steps, 0))
    next(batches)
    first = time.perf_counter() - started
    for _ in range(steps - 2):
        next(batches)
    speed = (steps - 2) * TEXT_BATCH / (time.perf_counter() - started - first)
    process = Path(f"/proc/{batches._workers[0].pid}")  # type: ignore[attr-defined]
    held = in_megabytes(process / "status", ("VmHWM:",))
    own = in_megabytes(process / "smaps_rollup", ("Private_Clean:", "Private_Dirty:"))
    return {"first": first, "memory": held, "own": own, "speed": speed}


def in_megabytes(file: Path, names: tuple[str, ...]) -> float:
    """The sum of lines that the kernel gives in units of 1024 bytes."""
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in file.read_text().splitlines() if line.startswith(names))


def opened(path: Path, name: str = "gpt", batch: int = TEXT_BATCH) -> tuple[RunConfig, Any]:
    """A family's run with its default model, which is not built, and its data."""
    config, words = family(name, "config").Config, tokenizer()
    model = defaults(config) | {"family": name, "vocab_size": len(words), "global_batch_size": batch}
    model["data"] |= {"data_path": str(path), "num_workers": 1}
    run = read_run({"trainer": {}, "exp_manager": {}, "model": model}, config)
    run = replace(run, model=parts_of(name).settle(run.model, words))
    return run, open_datasets(run, parts_of(name).Processor(run.model, run.data, words)).train


@cache
def tokenizer() -> Any:
    return train_tokenizer(WORDS, vocab_size=400)


def write(path: Path, count: int) -> Path:
    """BLOCK records again and again, which is faster to write."""
    block = ",\n".join(json.dumps(record(number)) for number in range(BLOCK))
    with open(path, "w") as file:
        for number in range(count // BLOCK):
            file.write(f"{',' if number else '['}\n{block}")
        file.write("]")
    return path


def record(number: int) -> dict[str, Any]:
    """Three turns of some 1500 characters in all."""
    turns = []
    for turn in range(3):
        said = " ".join(WORDS[(number + turn + place) % len(WORDS)] for place in range(90))
        turns += [{"from": "human", "value": f'What is "that", in {number}?\n'}, {"from": "gpt", "value": said}]
    return {"id": f"{number:09d}", "conversations": turns}


if __name__ == "__main__":
    main()
