"""Records to a folder of tars (webdataset) for model.data.data_impl=energon, made ready by Megatron-Energon itself.

A sample is a record as `json`, and its images and videos as the bytes that they are: one image as `jpg`, several as
`0.jpg`, `1.png`, videos as `video0.mp4`, frames as `video0.00017.jpg` with their rate in `video0.json`. Samples of one
image and one turn are Energon's VQASample; others CrudeWebdataset, whose records data.energon_samples.crude reads.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import rich

from nemo_vlm.batch import HUMANS, IMAGE_TAG
from nemo_vlm.data.media import Frames, Source, opened
from nemo_vlm.data.records import RecordFile
from nemo_vlm.data.skipped import Skipped, made
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import folder_written_whole, remove_partial

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
LEAST_ENERGON = 7  # its sample types have other names before
QUESTION, ANSWER = ("json[conversations][0][value]", "json[conversations][1][value]")
Files = list[tuple[str, bytes]]  # of a sample, by what stands behind its key


@dataclass(frozen=True)
class Sharding:
    """How samples are spread over tars.

    Attributes:
        split: shares of the tars for each of PARTS.
    """

    max_samples_per_tar: int
    split: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.max_samples_per_tar < 1:
            raise ConfigError(f"--max-samples-per-tar={self.max_samples_per_tar}: must be 1 or more")
        if (
            len(self.split) != len(PARTS)
            or min(self.split) < 0
            or not math.isfinite(sum(self.split))
            or not self.split[0]
        ):
            raise ConfigError(f"--split-ratio={self.shown}: must be shares of train, val and test, as 9,1,0")

    @property
    def shown(self) -> str:
        return ",".join(f"{share:g}" for share in self.split)

    def num_tars(self, count: int) -> int:
        """Of so many samples: enough for the smallest part to have one.

        Raises:
            ConfigError: there are fewer samples than tars.
        """
        shares = [share for share in self.split if share]
        least = math.ceil(sum(shares) / min(shares)) if len(shares) > 1 else 1
        if count < least:
            raise ConfigError(f"--split-ratio={self.shown}: needs {least} records or more, and there are {count}")
        return max(least, math.ceil(count / self.max_samples_per_tar))

    def tars(self, count: int) -> dict[str, range]:
        """Which of so many tars are each part's; none is empty that has a share."""
        ends = [int(count * sum(self.split[: place + 1]) / sum(self.split)) for place in range(len(PARTS))]
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for place, share in enumerate(self.split):
            if share and not sizes[place]:
                sizes[sizes.index(max(sizes))] -= 1
                sizes[place] += 1
        firsts = [sum(sizes[:place]) for place in range(len(PARTS))]
        return {
            part: range(first, first + size) for part, first, size in zip(PARTS, firsts, sizes, strict=True) if size
        }


@dataclass
class Common:
    """What the samples so far have in common.

    Attributes:
        vqa: each is one image, a question and its answer.
        suffixes: of the images.
    """

    vqa: bool
    suffixes: dict[str, None]

    def add(self, record: dict[str, Any], files: Files) -> None:
        turns = record["conversations"]
        alone = len(record["image"]) == 1 and not record["video"] and not record["system"] and len(turns) == 2
        asked = turns[0]["from"].lower() in HUMANS and turns[0]["value"].count(IMAGE_TAG) == 1
        self.vqa = self.vqa and alone and asked
        self.suffixes |= {name: None for name, _ in files if "." not in name and name != "json"}

    @property
    def flags(self) -> list[str]:
        """What energon prepare is told."""
        if not self.vqa:
            return ["--sample-type", "CrudeWebdataset"]
        fields = {"image": ",".join(self.suffixes), "context": QUESTION, "answers": ANSWER}
        return ["--sample-type", "VQASample", "--field-map", json.dumps(fields)]


def prepare(file: RecordFile, output: Path, how: Sharding, max_skip_fraction: float) -> str:
    """Write the folder.

    Returns:
        what was done.
    Raises:
        ConfigError: Energon is not installed, or the folder cannot be made.
        RuntimeError: too many records had to be left out; nothing is written.
    """
    check_energon()
    check_output(output)
    count, skipped, common = how.num_tars(len(file)), Skipped("records", max_skip_fraction), Common(True, {})
    with folder_written_whole(output) as folder:
        for place, group in groupby(usable(file, skipped), lambda sample: sample[0] * count // len(file)):
            with tarfile.open(folder / tar_name(place), "w") as tar:
                for number, record, files in group:
                    common.add(record, files)
                    add(tar, f"{number:08d}", files)
        skipped.check(finished=True)
        found = {part: [n for n in tars if (folder / tar_name(n)).exists()] for part, tars in how.tars(count).items()}
        if empty := [part for part, tars in found.items() if not tars]:
            raise RuntimeError(f"{skipped}, all of {empty[0]}; nothing was written")
        finish(folder, found, common)
    shares = ", ".join(f"{part} {len(tars)}" for part, tars in found.items())
    return f"{output}: {skipped.kept} samples in {sum(map(len, found.values()))} tars ({shares}); {skipped}"


def check_energon() -> None:
    how = "pip install megatron-energon==7.4.1"
    try:
        version = importlib.metadata.version("megatron-energon")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"Megatron-Energon is not installed, which makes the tars ready: {how}") from None
    if int(version.partition(".")[0]) < LEAST_ENERGON:
        raise ConfigError(f"Megatron-Energon {version} is too old: {how}")


def check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output={output}: is there already; give another, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output={output}: its folder cannot be made ({error.strerror})") from None
    remove_partial(output)


def usable(file: RecordFile, skipped: Skipped) -> Iterator[tuple[int, dict[str, Any], Files]]:
    """Number, record and files of each that can be used."""

    def make(number: int) -> tuple[int, dict[str, Any], Files]:
        record = file[number]
        return number, record, list(files_of(record))

    return made(make, len(file), skipped, f"tars of {file.path.name}")


def files_of(record: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Raises SampleError: an image or a video cannot be read."""
    images: list[str] = []
    videos: list[str] = []
    alone = len(record["image"]) == 1 and not record["video"]
    for number, source in enumerate(record["image"]):
        images.append(suffix(source) if alone else f"{number}.{suffix(source)}")
        yield images[-1], content(source, "image")
    for number, source in enumerate(record["video"]):
        name = f"video{number}"
        if isinstance(source, Frames):
            yield f"{name}.json", json.dumps({"fps": str(source.fps)}).encode()
            for place, frame in enumerate(source.files):
                yield f"{name}.{place:05d}.{suffix(frame)}", content(frame, "video")
        else:
            name = f"{name}.{suffix(source)}"
            yield name, content(source, "video")
        videos.append(name)
    said = {name: value for name, value in record.items() if name not in ("image", "video")}
    yield "json", json.dumps({**said, "images": images, "videos": videos}, ensure_ascii=False).encode()


def suffix(source: Any) -> str:
    """Of a file's name, fit to be a part's."""
    found = PurePosixPath(str(source)).suffix.lower().removeprefix(".")
    return found if re.fullmatch("[a-z0-9]+", found) and found != "json" else "bin"


def content(source: Source, kind: str) -> bytes:
    with opened(source, kind) as file:
        return file.read()


def tar_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def add(tar: tarfile.TarFile, key: str, files: Files) -> None:
    for name, held in files:
        member = tarfile.TarInfo(f"{key}.{name}")
        member.size = len(held)
        tar.addfile(member, BytesIO(held))


def finish(folder: Path, parts: dict[str, list[int]], common: Common) -> None:
    """Let Energon write its files about the tars.

    Args:
        parts: the numbers of each part's tars.
    Raises:
        RuntimeError: it fails.
    """
    split = [f"{part}:shard-{{{tars[0]:06d}..{tars[-1]:06d}}}.tar" for part, tars in parts.items()]
    run = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder)]
    run += ["--non-interactive", "--no-progress", "--num-workers", str(len(os.sched_getaffinity(0))), *common.flags]
    run += [flag for one in split for flag in ("--split-parts", one)]
    log.info("energon prepare %s", " ".join(run[5:]))
    with rich.get_console().status("energon prepare indexes the tars"):
        done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode or not (folder / ".nv-meta/dataset.yaml").is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"energon prepare failed ({' '.join(last)}); nothing was written")
