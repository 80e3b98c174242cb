"""Records: JSON or JSONL, each a conversation in one of data.forms, and the images and videos that it speaks of.

A file is indexed once, and a record is parsed when it is drawn, so that memory does not grow with the data.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from torch.utils.data import Dataset

from nemo_vlm.batch import IMAGE_TAG, Sample, empty_sample
from nemo_vlm.data import spans
from nemo_vlm.data.cached import cached, of_kind
from nemo_vlm.data.dataset import Origin
from nemo_vlm.data.forms import as_llava, has_answer, is_llava
from nemo_vlm.data.media import descriptor, open_folder
from nemo_vlm.errors import ConfigError, SampleError

IMAGE_IN_TEXT = re.compile(r"""<img src=["']([^"'\0]+)["'][^>]*>""")  # how SteerLM's records speak of images
KEY = "model.data.data_path"
LOOKED_AT = 100  # records, one of which must be whole when a file is opened


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
        try:
            record = json.loads(os.pread(descriptor(self.path), end - start, start))
            json.dumps(record, ensure_ascii=False).encode()  # a half of a surrogate pair cannot be
        except UnicodeEncodeError:
            problem = "half of a surrogate pair in a text"
        except ValueError as error:
            problem = f"not JSON ({error})"
        except RecursionError:
            problem = "nested too deeply"
        else:
            return record
        raise SampleError("broken_record", f"{self.path}: record {number}: {problem}")

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

    def __init__(
        self,
        path: Path,
        image_folder: str | None = None,
        video_folder: str | None = None,
        key: str = KEY,
        media: bool = True,
    ) -> None:
        self.media, self.keeps_folders = media, image_folder is None
        self.images = open_folder(image_folder or str(path.parent), "model.data.image_folder")
        self.videos = open_folder(video_folder or str(path.parent), "model.data.video_folder")
        super().__init__(path, key)
        self._look(key)

    def _look(self, key: str) -> None:
        faults = []
        for number in range(min(len(self), LOOKED_AT)):
            try:
                self[number]
                return
            except SampleError as error:
                faults.append(str(error))
        raise ConfigError(f"{key}={self.path}: {faults[0]}")

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A record whose `image` and `video` are lists of files, which need not exist.

        Raises:
            SampleError: broken_record, no_answer, or missing_image in a tar.
        """
        raw = self.raw(number)
        record = conversation(raw, f"{self.path}: record", number)
        if self.media and self.path.suffix == ".jsonl" and is_llava(raw):
            record = from_steerlm(record, self.keeps_folders)
        images = [self.images.file(name) for name in names(record.get("image"))]
        videos = [self.videos.file(name) for name in names(record.get("video"))]
        return {**record, "image": images, "video": videos}


def checked(path: Path) -> numpy.ndarray:
    """Raises:
    ValueError: there is no record.
    """
    found = spans.find(path)
    if not len(found):
        raise ValueError("it is empty")
    return found


def conversation(record: Any, called: str, number: int) -> dict[str, Any]:
    """A record in LLaVA's form, with an answer.

    Args:
        called: what messages call it, before its name.
    Raises:
        SampleError: broken_record or no_answer.
    """
    try:
        found = as_llava(record)
        check_files(found)
    except ValueError as error:
        raise SampleError("broken_record", f"{called} {name_of(record, number)}: {error}") from None
    if not has_answer(found["conversations"]):
        raise SampleError("no_answer", f"{called} {name_of(record, number)}: has no answer")
    return found


def check_files(record: dict[str, Any]) -> None:
    """Raises:
    ValueError: it names its images or videos in no known way.
    """
    for kind in ("image", "video"):
        entry = record.get(kind)
        if not isinstance(entry, str | list | None) or not all(map(is_name, entry or "")):
            raise ValueError(f"'{kind}' must be a file's name or a list of them")


def is_name(name: Any) -> bool:
    return isinstance(name, str) and "\0" not in name


def names(entry: str | list[str] | None) -> list[str]:
    return [name for name in ([entry] if isinstance(entry, str) else entry or []) if name]


def name_of(record: Any, number: int) -> Any:
    """What a message calls a record."""
    return record.get("id", number) if isinstance(record, dict) else number


def from_steerlm(record: dict[str, Any], keep_folders: bool) -> dict[str, Any]:
    """A record whose turns show images as <img src="..."> as one that lists them; others stay as they are.

    Every tag becomes a placeholder and every image is listed, so that both have one order and number.

    Args:
        keep_folders: look for the images where the tags say, not by their last names below the image folder.
    """
    images, turns = names(record.get("image")), []
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
        files: Sequence[RecordFile],
        chosen: Sequence[numpy.ndarray] | None,
        processor: Any,
        lengths: numpy.ndarray | None = None,
    ) -> None:
        self.files, self.processor, self.lengths = files, processor, lengths
        self.first = [0, *itertools.accumulate(len(file) for file in files)]
        chosen = [numpy.arange(len(file)) for file in files] if chosen is None else chosen
        self.parts = [first + some for first, some in zip(self.first[:-1], chosen, strict=True)]

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
        path, planned = self.files[file].path, int(self.lengths[sample.record, 0])
        tables = ", ".join(map(str, of_kind(path, "lengths")))
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
