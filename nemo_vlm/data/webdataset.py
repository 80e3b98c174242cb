"""Folders of tars (webdataset) that Megatron-Energon has prepared, read by the numbers of their samples.

Energon's own loader is not used, so that the order, blends, packs and resuming in any layout are what they are of JSON.
Of its files .nv-meta/dataset.yaml tells what a sample holds (data.energon_samples), and .nv-meta/split.yaml which tars
train and which validate. Each tar is indexed once, as data.media does with those of images.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy
import yaml
from rich.progress import track

from nemo_vlm.data.cached import cached, of_kind, prefix
from nemo_vlm.data.energon_samples import READERS, Form, Parts
from nemo_vlm.data.media import Member, walk
from nemo_vlm.data.records import conversation, look
from nemo_vlm.errors import ConfigError, SampleError

META = ".nv-meta"
NAME = re.compile(r"(?P<key>(?:.*/|)[^.]+)[.](?P<part>[^/]*)")  # of a file: its sample, and what it is there
ASIDE = re.compile(r"__[^/]*__($|/)")  # files that belong to no sample
BRACES = re.compile(r"\{([^{}]*)\}")
FOREIGN = re.compile(r"\\|\{[^}]*\{")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
KIND = "samples"


class Shard:
    """The samples of a tar, by number."""

    def __init__(self, path: Path, form: Form) -> None:
        self.path, self.form = path, form

    def __len__(self) -> int:
        return int(table(self.path)["sample"][-1]) + 1

    def parts(self, number: int) -> tuple[str, Parts]:
        """A sample's key, and its files."""
        rows, members, key = table(self.path), {}, ""
        first = bisect.bisect_left(rows["sample"], number)
        for name, offset, size, _ in rows[first : bisect.bisect_left(rows["sample"], number + 1)].tolist():
            match = NAME.fullmatch(os.fsdecode(name))
            assert match is not None
            key = match["key"]
            members[match["part"]] = Member(self.path, os.fsdecode(name), offset, size)
        return key, Parts(f"{self.path}: sample {key}", members)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A record in LLaVA's form, whose images and videos lie in the tar.

        Raises:
            SampleError: broken_record, no_answer, missing_image or missing_video.
        """
        key, parts = self.parts(number)
        raw, media = self.form.read(parts)
        record = conversation({"id": key, **raw}, f"{self.path}: sample", number)
        found = {kind: [parts.chosen(media, name, kind) for name in record[kind]] for kind in ("image", "video")}
        return {**record, **found}


class WebDataset:
    """The samples of one part of a prepared folder, by number, over all of its tars.

    Args:
        part: of split.yaml: train, val or test.
        key: the setting that named the folder, for messages.
    Attributes:
        excluded: numbers of the samples that split.yaml leaves out.
    Raises:
        ConfigError: the folder is not prepared, a tar cannot be read, or none of the first samples is whole.
    """

    def __init__(self, path: Path, key: str, part: str = "train") -> None:
        self.path, self.about, self.lengths_kind = path, path / META / "split.yaml", f"lengths_of_{part}"
        form, (names, excluded) = form_of(path, key), split_of(path, key, part)
        paths = [path / name for name in names if name not in excluded]
        known = len(paths) < 2 or bool(of_kind(paths[-1], KIND))
        for tar in track(paths, f"indexing {path.name}", disable=known):
            index(tar, f"{key}={path}")
        self.shards = [Shard(tar, form) for tar in paths]
        self.first = [0, *itertools.accumulate(map(len, self.shards))]
        sought = {str(path / name) for name in excluded}
        self.excluded = [number for number in range(len(self)) if self._called(number) in sought] if excluded else []
        if part == "train" and not len(self.kept):
            raise ConfigError(f"{key}={path}: its {META}/split.yaml leaves nothing to train on")
        if len(self):
            look(self, key)

    def _called(self, number: int) -> str:
        """What split.yaml calls a sample that it leaves out."""
        shard, inside = self.where(number)
        return f"{shard.path}/{shard.parts(inside)[0]}"

    def __len__(self) -> int:
        return self.first[-1]

    def where(self, number: int) -> tuple[Shard, int]:
        """The tar that a sample lies in, and its number there."""
        place = bisect.bisect_right(self.first, number) - 1
        return self.shards[place], number - self.first[place]

    @property
    def media_version(self) -> str:
        """Another one where a tar may hold something else, or is read otherwise."""
        return " ".join([str(self.shards[0].form), *(prefix(shard.path) for shard in self.shards)])

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Raises SampleError: as Shard."""
        shard, inside = self.where(number)
        return shard[inside]

    def name(self, number: int) -> Any:
        """The id of a sample, or its key where that can be read alone."""
        shard, inside = self.where(number)
        try:
            return shard[inside]["id"]
        except SampleError:
            return shard.parts(inside)[0]

    @cached_property
    def kept(self) -> numpy.ndarray:
        """Numbers of all samples but the excluded."""
        return numpy.setdiff1d(numpy.arange(len(self)), self.excluded)


def index(tar: Path, called: str) -> numpy.ndarray:
    """Raises ConfigError: it is no uncompressed tar of samples."""
    try:
        return cached(tar, KIND, "", lambda: samples(tar))
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{called}: {tar.name} is not an uncompressed tar of samples ({error})") from None


@cache
def table(tar: Path) -> numpy.ndarray:
    return cached(tar, KIND, "", lambda: samples(tar))


def samples(tar: Path) -> numpy.ndarray:
    """[files] of name, offset, size and the number of the sample, as Energon counts them; in the order of the tar."""
    found: list[tuple[bytes, int, int, int]] = []
    number, last = -1, None
    for name, offset, size in walk(tar):
        match = NAME.fullmatch(name)
        if match is None or ASIDE.match(name):
            continue
        number, last = number + (match["key"] != last), match["key"]
        found.append((os.fsencode(name), offset, size, number))
    if not found:
        raise tarfile.TarError("it holds no file of a name as KEY.jpg")
    width = max(len(name) for name, *_ in found)
    return numpy.array(found, [("name", f"S{width}"), ("offset", "i8"), ("size", "i8"), ("sample", "i4")])


def form_of(folder: Path, key: str) -> Form:
    """What .nv-meta/dataset.yaml says of the samples, in the form before Energon 7 or in the one since.

    Raises:
        ConfigError: it cannot be used.
    """
    called, said = f"{key}={folder}: its {META}/dataset.yaml", meta(folder, key, "dataset.yaml")
    if "sample_loader" in said:
        raise ConfigError(f"{called} names a sample_loader, code that is not run here; give it a field_map")
    kind = (said.get("sample_type") or said).get("__class__")
    if kind not in READERS:
        raise ConfigError(f"{called} has samples of the class {kind}; known are {', '.join(READERS)}")
    read, needed = READERS[kind]
    fields = said.get("field_map") or {}
    if missing := [field for field in needed if not isinstance(fields.get(field), str)]:
        raise ConfigError(f"{called} has no field_map of {', '.join(missing)}, which {kind} needs")
    return Form(read, fields)


def split_of(folder: Path, key: str, part: str) -> tuple[list[str], set[str]]:
    """The tars of one part, and what is left out: tars, and samples as TAR/KEY.

    Raises:
        ConfigError: .nv-meta/split.yaml does not say.
    """
    said = meta(folder, key, "split.yaml")
    parts, excluded = said.get("split_parts"), said.get("exclude") or []
    if not isinstance(parts, dict) or not all(isinstance(names, list) for names in [*parts.values(), excluded]):
        raise ConfigError(f"{key}={folder}: its {META}/split.yaml must have split_parts, lists of tars")
    try:
        tars, without = ([name for one in names for name in expanded(one)] for names in (parts.get(part, []), excluded))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}={folder}: its {META}/split.yaml: {error}") from None
    return tars, set(without)


def meta(folder: Path, key: str, name: str) -> dict[str, Any]:
    """Raises ConfigError: there is no such file, or it is none of Energon's."""
    path = folder / META / name
    try:
        said = yaml.safe_load(path.read_bytes())
    except OSError as error:
        how = "scripts/prepare_wds.py or energon prepare writes it"
        raise ConfigError(f"{key}={folder}: its {META}/{name} cannot be read ({error.strerror}); {how}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{key}={folder}: its {META}/{name} is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(said, dict):
        raise ConfigError(f"{key}={folder}: its {META}/{name} must be a mapping")
    return said


def expanded(pattern: str) -> Iterator[str]:
    """What a name with braces stands for, as in a shell: {a,b}, {000..011} and {9..1..2}.

    Raises:
        ValueError: its braces are others, one inside another say.
    """
    match = BRACES.search(pattern)
    if FOREIGN.search(pattern) or (match is None and set(pattern) & set("{}")):
        raise ValueError(f"{pattern} is not understood; {{a,b}} and {{000..011}} are, not one inside another")
    if match is None:
        yield pattern
        return
    front, behind = pattern[: match.start()], pattern[match.end() :]
    for option in options(match[1]):
        yield from expanded(front + option + behind)


def options(inside: str) -> list[str]:
    """What braces stand for; a range may count down, and in steps. Raises ValueError: neither list nor range."""
    if "," in inside:
        return inside.split(",")
    match = RANGE.fullmatch(inside)
    if match is None:
        raise ValueError(f"{{{inside}}} is not understood; {{a,b}} and {{000..011}} are")
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1) or 1
    padded = any(re.match("-?0.", end) for end in match.groups()[:2])
    width = max(len(match[1]), len(match[2])) if padded else 0
    numbers = range(first, last + 1, step) if first < last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]
