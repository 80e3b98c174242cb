"""Convert a 7B-shaped LLaVA of random bf16 weights to a .nemo and back, beside cp and fsync of the same files.

    python scripts/benchmarks/convert.py [--full] [--rounds N] [--json FILE] [--folder DIR]

Both read from a cold page cache, as far as the kernel lets go of it, and both end with fsync, by turns. --full has all
layers (14 GB, and three times that on the disk), and whole processes are judged. Without it the model is an eighth, for
which Python and its libraries start longer than cp takes: what is judged then goes from the moment the output appears
on the disk to the end of the process; the whole is shown beside it. Everything is removed.
"""

from __future__ import annotations

import contextlib
import json
import math
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
from typing import Any

import torch
from side_by_side import flags, report, row
from torch import Tensor

from nemo_vlm.formats import safetensors
from nemo_vlm.formats.safetensors import Safetensors, TensorSpec
from nemo_vlm.formats.store import Folder
from nemo_vlm.models.llava import mapping
from nemo_vlm.models.llava.config import Config, MultimodalConfig, VisionConfig

SCRIPTS = Path(__file__).resolve().parents[1]
MIN_SPEED, MAX_MEMORY = ">= 0.5", "<= 2.0"  # of cp; GB
POOL = 64 * 2**20  # random values, from which tensors are cut at random places


@dataclass(frozen=True)
class Measured:
    """One process.

    Attributes:
        writing: seconds from the moment its output appears.
        peak: of its anonymous memory, in bytes.
    """

    seconds: float
    writing: float = 0.0
    peak: int = 0


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
    for name, script, source, target in (
        ("HF -> .nemo", "convert_hf_to_nemo.py", theirs, archive),
        (".nemo -> HF", "convert_nemo_to_hf.py", archive, back),
    ):
        ways: dict[str, Callable[[], Measured]] = {
            "cp": partial(copy, source, scratch / "copy"),
            "ours": partial(convert, script, source, target),
        }
        found: dict[str, list[Measured]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in list(ways)[:: -1 if number % 2 else 1]:
                forget(source)
                found[way].append(ways[way]())
        yield from rows_of(name, size, found["ours"], found["cp"], full)
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


def forget(source: Path) -> None:
    """Let the page cache let go of it."""
    for file in files(source):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def copy(source: Path, target: Path) -> Measured:
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
    """A process of its own, from its start to its end."""
    remove(target)
    command = [sys.executable, str(SCRIPTS / script), "--input", str(source), "--output", str(target), "--no-verify"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        appeared, peak = watch(process, target)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        sys.exit(f"{script} ended with exit code {code}")
    end = time.monotonic()
    return Measured(end - start, end - appeared, peak)


def watch(process: subprocess.Popen, target: Path) -> tuple[float, int]:
    """When its output appeared under a temporary name, and the peak of its RssAnon, looked at every 5 ms."""
    appeared, peak = math.inf, 0
    while process.poll() is None:
        if appeared == math.inf and any(target.parent.glob(f".{target.name}.partial-*")):
            appeared = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if "RssAnon:" in line)])
        time.sleep(0.005)
    return appeared, peak


def compare(one: Path, other: Path) -> int:
    """Tensors that are not there or not equal to the bit."""
    first, second = (Safetensors(Folder(path), [p.name for p in path.glob("*.safetensors")]) for path in (one, other))
    both = first.names() & second.names()
    return len(first.names() ^ second.names()) + sum(not equal(first.read(name), second.read(name)) for name in both)


def equal(one: Tensor, other: Tensor) -> bool:
    same = one.dtype is other.dtype and one.shape == other.shape
    return same and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def rows_of(name: str, size: int, ours: list[Measured], peer: list[Measured], full: bool) -> Iterator[dict[str, Any]]:
    whole, writing, theirs = (
        [size / 1e6 / seconds for seconds in measured]
        for measured in ([m.seconds for m in ours], [m.writing for m in ours], [m.seconds for m in peer])
    )
    if not full:
        yield row(f"{name}, whole process", whole, theirs, "MB/s")
    yield row(f"{name}, against cp and fsync", whole if full else writing, theirs, "MB/s", MIN_SPEED)
    yield row(f"{name}, most anonymous memory", max(measured.peak for measured in ours) / 1e9, None, "GB", MAX_MEMORY)


if __name__ == "__main__":
    main()
