"""Convert a 7B-shaped LLaVA of random bf16 weights to a .nemo and back, beside cp and fsync of the same files.

    python scripts/benchmarks/convert.py [--full] [--rounds N] [--json FILE] [--folder DIR]

Both read from a cold page cache, as far as the kernel lets go of it, and both end with fsync, by turns; before each of
them everything is removed and written that was left to be. --full has all layers (14 GB, and three times that on the
disk), and whole commands are judged. Without it the model is an eighth, for which Python and its libraries start longer
than cp takes: what is judged then are processes that are forked from one that has loaded them, from their start to
their end. That is fair to both: a virtual machine gives memory that lies idle for seconds back to its host, and whoever
starts late waits for it. A whole command is told beside it. Everything is removed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from side_by_side import flags, in_turn, report, row
from torch import Tensor

from nemo_vlm.conversion.jobs import Run, export_huggingface, import_huggingface
from nemo_vlm.formats import safetensors
from nemo_vlm.formats.safetensors import Safetensors, TensorSpec
from nemo_vlm.formats.store import Folder
from nemo_vlm.models.llava import mapping
from nemo_vlm.models.llava.config import Config, MultimodalConfig, VisionConfig
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

SCRIPTS = Path(__file__).resolve().parents[1]
MIN_SPEED, MAX_MEMORY = ">= 0.5", "<= 2.0"  # of cp; GB
POOL = 64 * 2**20  # random values, from which tensors are cut at random places
LIBRARIES = [  # what a conversion loads
    "nemo_vlm.conversion.jobs",
    *(f"transformers.models.{name}.configuration_{name}" for name in ("auto", "llava", "llama", "clip")),
]


@dataclass(frozen=True)
class Measured:
    """One process.

    Attributes:
        peak: of its anonymous memory, in bytes.
    """

    seconds: float
    peak: int = 0


@dataclass(frozen=True)
class Way:
    """A conversion.

    Attributes:
        script: the command that makes it.
        job: what the command does once it is loaded.
    """

    name: str
    script: str
    job: Callable[[Source, Path, Run], None]


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--full", action="store_true", help="all layers: about 14 GB; --rounds 1 is enough")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    config = llava(layers=32, vision_layers=24) if options.full else llava(layers=3, vision_layers=3)
    specs = specs_of(config)
    size = sum(spec.num_bytes for spec in specs)
    options.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.folder).free
    if free < 3.2 * size:
        sys.exit(f"--folder={options.folder}: needs {3.2 * size / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    scratch = Path(tempfile.mkdtemp(prefix="convert-", dir=options.folder))
    try:
        rows = measure(scratch, config, specs, options.rounds, options.full)
        report(rows, options.json, {"model": f"a LLaVA of {size / 1e9:.2f} GB in bf16", "peer": "cp -r, then fsync"})
    finally:
        shutil.rmtree(scratch)


def llava(layers: int, vision_layers: int) -> Config:
    """LLaVA 1.5 7B, but for its number of layers."""
    tower = VisionConfig(num_layers=vision_layers)
    multimodal = MultimodalConfig(vision_encoder=tower, image_token_index=32000)
    return Config(num_layers=layers, vocab_size=32064, mm_cfg=multimodal)


def measure(
    scratch: Path, config: Config, specs: list[TensorSpec], rounds: int, full: bool
) -> Iterator[dict[str, Any]]:
    theirs, archive, back = scratch / "hf", scratch / "x.nemo", scratch / "back"
    write_model(theirs, config, specs)
    size = sum(spec.num_bytes for spec in specs)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(LIBRARIES)
    for way, source, target in (
        (Way("HF -> .nemo", "convert_hf_to_nemo.py", import_huggingface), theirs, archive),
        (Way(".nemo -> HF", "convert_nemo_to_hf.py", export_huggingface), archive, back),
    ):
        command = partial(convert, way.script, source, target)
        ways = {"cp": partial(copy, source, scratch / "copy")}
        ways["ours"] = command if full else partial(fork, forks, way, source, target)
        found: dict[str, list[Measured]] = {side: [] for side in ways}
        for side in in_turn(ways, rounds, first=0):
            found[side].append(ways[side]())
        if not full:
            usual = median(measured.seconds for measured in found["cp"])
            yield row(f"{way.name}, whole command", size / 1e6 / command().seconds, size / 1e6 / usual, "MB/s")
        yield from rows_of(way.name, size, found["ours"], found["cp"])
    yield row("tensors that differ after both", compare(theirs, back), None, "", "<= 0")


def specs_of(config: Config) -> list[TensorSpec]:
    return [TensorSpec(n, s, torch.bfloat16) for rule in mapping.rules(config) for n, s in rule.theirs.items()]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_model(folder: Path, config: Config, specs: list[TensorSpec]) -> None:
    """A directory as from Hugging Face."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(mapping.hf_config(config) | {"torch_dtype": "bfloat16"}))
    parts = safetensors.split(specs, safetensors.MAX_SHARD_BYTES)
    shards = dict(zip(safetensors.shard_names(len(parts)), parts, strict=True))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(safetensors.index(shards))
    tensors = random_tensors(specs)
    for name, shard in shards.items():
        with open(folder / name, "wb") as file:
            safetensors.write(file, shard, tensors)


def random_tensors(specs: list[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    largest = max(spec.num_bytes // 2 for spec in specs)
    pool = torch.randn(largest + POOL, generator=generator).bfloat16()
    for spec in specs:
        start = int(torch.randint(POOL, (1,), generator=generator))
        yield spec.name, pool[start : start + spec.num_bytes // 2].view(spec.shape)


def make_ready(source: Path, target: Path) -> None:
    """No target, nothing left to be written, and a page cache that has let go of the source."""
    remove(target)
    os.sync()
    for file in files(source):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def copy(source: Path, target: Path) -> Measured:
    make_ready(source, target)
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in files(target):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - start
    remove(target)
    return Measured(seconds)


def convert(script: str, source: Path, target: Path) -> Measured:
    """By a command, from its start to its end."""
    command = [sys.executable, str(SCRIPTS / script), "--input", str(source), "--output", str(target), "--no-verify"]
    make_ready(source, target)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        peak = watch(process.pid, lambda: process.poll() is None)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        sys.exit(f"{script} ended with exit code {process.returncode}")
    return Measured(time.monotonic() - start, peak)


def fork(forks: Any, way: Way, source: Path, target: Path) -> Measured:
    """By a process that has its libraries, from its start to its end."""
    make_ready(source, target)
    process = forks.Process(target=work, args=(way, source, target), daemon=True)
    start = time.monotonic()
    process.start()
    peak = watch(process.pid, process.is_alive)
    process.join()
    if process.exitcode:
        sys.exit(f"{way.name} ended with exit code {process.exitcode}")
    return Measured(time.monotonic() - start, peak)


def work(way: Way, source: Path, target: Path) -> None:
    way.job(open_source(source, "--input"), target, Run("auto", "cpu", verify=False))


def watch(process: int, runs: Callable[[], bool]) -> int:
    """The peak of its RssAnon, looked at every 5 ms."""
    peak = 0
    while runs():
        with contextlib.suppress(OSError):  # it has ended
            status = Path(f"/proc/{process}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if "RssAnon:" in line)])
        time.sleep(0.005)
    return peak


def compare(one: Path, other: Path) -> int:
    """Tensors that are not there or not equal to the bit."""
    first, second = (Safetensors(Folder(path), [p.name for p in path.glob("*.safetensors")]) for path in (one, other))
    both = first.names() & second.names()
    return len(first.names() ^ second.names()) + sum(not equal(first.read(name), second.read(name)) for name in both)


def equal(one: Tensor, other: Tensor) -> bool:
    same = one.dtype is other.dtype and one.shape == other.shape
    return same and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def rows_of(name: str, size: int, ours: list[Measured], peer: list[Measured]) -> Iterator[dict[str, Any]]:
    mine, theirs = ([size / 1e6 / measured.seconds for measured in side] for side in (ours, peer))
    yield row(f"{name}, against cp and fsync", mine, theirs, "MB/s", MIN_SPEED)
    yield row(f"{name}, most anonymous memory", max(measured.peak for measured in ours) / 1e9, None, "GB", MAX_MEMORY)


if __name__ == "__main__":
    main()
