"""Records: JSON or JSONL, each a conversation in one of data.forms, and the images and videos that it speaks of.

A file is indexed once, and a record is parsed when it is drawn, so that memory does not grow with the data.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy
from torch.utils.data import Dataset

from nemo_vlm.batch import IMAGE_TAG, Sample, empty_sample
from nemo_vlm.data import spans
from nemo_vlm.data.cached import cached, of_kind
from nemo_vlm.data.dataset import Numbers, Origin
from nemo_vlm.data.forms import as_llava, has_answer, is_llava, parsed
from nemo_vlm.data.media import descriptor, open_folder
from nemo_vlm.errors import ConfigError, SampleError

IMAGE_IN_TEXT = re.compile(r"""<img src=["']([^"'\0]+)["'][^>]*>""")  # how SteerLM's records speak of images
KEY = "model.data.data_path"
LOOKED_AT = 100  # records, one of which must be whole when a file is opened


class Records(Protocol):
    """What a run reads records from, by their numbers: a file, or a folder of tars (data.webdataset).

    Attributes:
        about: the file beside which their lengths are kept, see data.cached.
        lengths_kind: the kind of these.
    """

    path: Path
    about: Path
    lengths_kind: str

    @property
    def media_version(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A record in LLaVA's form, whose `image` and `video` list files.

        Raises:
            SampleError: it cannot be used.
        """
        ...

    def name(self, number: int) -> Any: ...


class JsonFile:
    """What a JSON list or JSONL holds, by number.

    Args:
        key: the setting that named the file, for messages.
    Raises:
        ConfigError: there is no such file, or it is no list of anything.
    """

    def __init__(self, path: Path, key: str = KEY) -> None:
        self.path = path
        try:
            self.index()
        except IsADirectoryError:
            raise ConfigError(
                f"{key}={path}: is a folder; one of tars goes with model.data.data_impl=energon"
            ) from None
        except OSError as error:
            raise ConfigError(f"{key}={path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ConfigError(f"{key}={path}: must be a list of conversations; {error}") from None

    def index(self) -> numpy.ndarray:
        """[records, 2] int64, mapped: where each begins and ends."""
        return cached(self.path, "index", "", lambda: checked(self.path))

    @cached_property
    def _spans(self) -> numpy.ndarray:
        return self.index()

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: what is mapped here is mapped anew there."""
        return {name: value for name, value in vars(self).items() if name != "_spans"}

    def __len__(self) -> int:
        return len(self._spans)

    def raw(self, number: int) -> Any:
        """A record as it stands in the file.

        Raises:
            SampleError: it is not JSON, or its texts are not Unicode.
        """
        start, end = map(int, self._spans[number])
        return parsed(os.pread(descriptor(self.path), end - start, start), f"{self.path}: record {number}")

    def name(self, number: int) -> Any:
        """A record's `id`, where it has one that can be read."""
        try:
            record = self.raw(number)
        except SampleError:
            return None
        return record.get("id") if isinstance(record, dict) else None


class RecordFile(JsonFile):
    """The records of a file, by number.

    Args:
        image_folder, video_folder: where the files stand that they name; None: beside the file.
        key: the setting that named the file, for messages.
        media: the records are for a model that sees; to another, an <img> in a text is that text.
    Raises:
        ConfigError: there is no such file, or it is no list of conversations.
    """

    lengths_kind = "lengths"

    def __init__(
        self,
        path: Path,
        image_folder: str | None = None,
        video_folder: str | None = None,
        key: str = KEY,
        media: bool = True,
    ) -> None:
        self.about, self.media, self.keeps_folders = path, media, image_folder is None
        self.images = open_folder(image_folder or str(path.parent), folder_key(key, "image"))
        self.videos = open_folder(video_folder or str(path.parent), folder_key(key, "video"))
        super().__init__(path, key)
        look(self, key)

    @property
    def media_version(self) -> str:
        """Another one where the files that the records name may hold something else."""
        return f"{self.images.version} {self.videos.version}"

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A record whose `image` and `video` are lists of files, which need not exist.

        Raises:
            SampleError: broken_record, no_answer; missing_image in a tar; missing_video or broken_video: frames are
                missing, or their rate.
        """
        raw = self.raw(number)
        record = conversation(raw, f"{self.path}: record", number)
        if self.media and self.path.suffix == ".jsonl" and is_llava(raw):
            record = from_steerlm(record, self.keeps_folders)
        images = [self.images.file(name) for name in record["image"]]
        videos = [self.videos.video(name) for name in record["video"]]
        return {**record, "image": images, "video": videos}


def folder_key(key: str, kind: str) -> str:
    """The setting or flag that stands beside the one that names the file."""
    if key.startswith("--"):
        return f"--{kind}-folder"
    group, dot, _ = key.rpartition(".")
    return f"{group}{dot}{kind}_folder"


def look(file: Records, key: str) -> dict[str, Any]:
    """The first record that is whole.

    Raises:
        ConfigError: none of the first is.
    """
    faults = []
    for number in range(min(len(file), LOOKED_AT)):
        try:
            return file[number]
        except SampleError as error:
            faults.append(str(error))
    raise ConfigError(f"{key}={file.path}: {faults[0]}")


def checked(path: Path) -> numpy.ndarray:
    """Raises:
    ValueError: there is no record.
    """
    found = spans.find(path)
    if not len(found):
        raise ValueError("it is empty")
    return found


def conversation(record: Any, called: str, number: int) -> dict[str, Any]:
    """A record in LLaVA's form, with an answer, and an `id`, which is its number where it has none.

    Args:
        called: what messages call it, before its name.
    Raises:
        SampleError: broken_record or no_answer.
    """
    try:
        found = as_llava(record)
    except ValueError as error:
        raise SampleError("broken_record", f"{called} {name_of(record, number)}: {error}") from None
    if not has_answer(found["conversations"]):
        raise SampleError("no_answer", f"{called} {name_of(record, number)}: has no answer")
    return {**found, "id": name_of(record, number)}


def name_of(record: Any, number: int) -> Any:
    """What messages call a record."""
    named = record.get("id") if isinstance(record, dict) else None
    return number if named is None else named


def from_steerlm(record: dict[str, Any], keep_folders: bool) -> dict[str, Any]:
    """A record whose turns show images as <img src="..."> as one that lists them; others stay as they are.

    Every tag becomes a placeholder and every image is listed, so that both have one order and number.

    Args:
        keep_folders: look for the images where the tags say, not by their last names below the image folder.
    """
    images, turns = list(record["image"]), []
    for turn in record["conversations"]:
        sources = IMAGE_IN_TEXT.findall(turn["value"])
        images += sources if keep_folders else [os.path.basename(source) for source in sources]
        turns.append({**turn, "from": turn["from"].lower(), "value": IMAGE_IN_TEXT.sub(IMAGE_TAG, turn["value"])})
    return {**record, "image": images, "conversations": turns}


def read_records(data_path: str, image_folder: str | None, key: str = KEY) -> list[dict[str, Any]]:
    """All records of a file that is small.

    Raises:
        ConfigError: as RecordFile, or a record is broken.
    """
    file = RecordFile(Path(data_path), image_folder, key=key)
    return [file[number] for number in range(len(file))]


def shifted(numbers: Numbers, first: int) -> Numbers:
    """Counted from there on."""
    if isinstance(numbers, range):
        return range(numbers.start + first, numbers.stop + first)
    return numbers + first


class RecordDataset(Dataset):
    """Samples made of records by a family's processor when they are drawn, by the records' numbers.

    A number counts over all files, records that do not belong to the dataset included: it does not change with what is
    left out.

    Args:
        chosen: for each file, which of its records belong to the dataset; None: all.
        lengths: [records, 2] as lengths.of_file, where an order or packing needs it.
    """

    packed = False  # a number is one sample, see data.dataset.Samples

    def __init__(
        self,
        files: Sequence[Records],
        chosen: Sequence[Numbers] | None,
        processor: Any,
        lengths: numpy.ndarray | None = None,
    ) -> None:
        self.files, self.processor, self.lengths = files, processor, lengths
        self.first = [0, *itertools.accumulate(len(file) for file in files)]
        chosen = [range(len(file)) for file in files] if chosen is None else chosen
        self.parts = [shifted(some, first) for first, some in zip(self.first[:-1], chosen, strict=True)]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def samples(self, number: int) -> list[Sample]:
        """One, see data.dataset.Samples."""
        return [self[number]]

    def origin(self, number: int) -> Origin:
        file, inside = self.where(number)
        return Origin(self.files[file].path, inside, self.files[file].name(inside))

    def where(self, number: int) -> tuple[int, int]:
        """The place of a record's file among the files, and its number there."""
        file = bisect.bisect_right(self.first, number) - 1
        return file, number - self.first[file]

    def outgrown(self, sample: Sample) -> str | None:
        """Of a sample that is longer than its record was when `lengths` was made: what to say of that."""
        if sample.record < 0 or self.lengths is None or len(sample.tokens) <= self.lengths[sample.record, 0]:
            return None
        file, inside = self.where(sample.record)
        records, planned = self.files[file], int(self.lengths[sample.record, 0])
        tables = ", ".join(map(str, of_kind(records.about, records.lengths_kind)))
        return f"record {inside}: {len(sample.tokens)} tokens, {planned} when it was measured; remove {tables}"

    def record(self, number: int) -> dict[str, Any]:
        """Raises:
        SampleError: as RecordFile.
        """
        file, inside = self.where(number)
        return self.files[file][inside]

    def __getitem__(self, number: int) -> Sample:
        """The sample of a record, or the empty one where none can be made of it; -1 stands for no record."""
        if number < 0:
            return empty_sample()
        try:
            return replace(self.processor.sample(self.record(number)), record=number)
        except SampleError as error:
            return empty_sample(number, f"{error.reason}: {error}")
