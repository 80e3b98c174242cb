"""MindSpeed-MM's data.json as settings of ours: records, their images and videos, and how they are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.mindspeed_rules import BASIC, PREPROCESS, path
from nemo_vlm.porting.shell import Text
from nemo_vlm.porting.table import Item, Note, Rule, Values

FRAME_PAIR = 2  # Qwen2-VL's temporal patch
LEAST_PIXELS = 56**2  # of Hugging Face's processor, which comes behind theirs


def kind(values: Values, name: str) -> Iterator[Item]:
    """What records look like; packs are not theirs."""
    yield "data", "mllm" if values[name] == "messages" else "sharegpt"
    yield "model.data.packing", False
    yield "model.data.too_long", "truncate"


def side_pixels(value: str) -> int:
    """Of image_resolution: the longest side in the first versions, all pixels from 2.0.0 on."""
    return int(value) if int(value) > 4096 else int(value) ** 2


def most_pixels(key: str) -> Rule:
    def rule(values: Values, name: str) -> Iterator[Item]:
        yield f"model.data.{key}", side_pixels(values[name])
        if name.endswith("_resolution") and side_pixels(values[name]) != values.number(name):
            yield Note(
                f"{name}={values[name]}: there the longest side, resized by NEAREST; here {values[name]}^2 pixels, "
                "resized once, as Hugging Face does"
            )
        if key == "video_max_pixels" and not values[f"{PREPROCESS}.video_min_pixels"]:
            yield "model.data.video_min_pixels", LEAST_PIXELS

    return rule


def least_pixels(key: str) -> Rule:
    """Theirs come in front of Hugging Face's, which does not go below 56x56."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        yield f"model.data.{key}", max(values.number(name), LEAST_PIXELS)

    return rule


def most_frames(values: Values, name: str) -> Iterator[Item]:
    """There a video has no least number of frames."""
    yield "model.data.video_max_frames", values.number(name)
    yield "model.data.video_min_frames", min(values.number(name), FRAME_PAIR)


def files(values: Values, name: str) -> Iterator[Item]:
    """basic_parameters.dataset: files with commas between, their media beside dataset_dir or the script's folder."""
    found = [path(values, one) for one in values[name].split(",")]
    yield "model.data.data_path", found[0] if len(found) == 1 else found
    there = [one for one in found if Path(one.value).is_file()]
    folders = {media_folder(values, Path(one.value)) for one in there} or {path(values, ".")}
    if len(folders) > 1:
        raise ConfigError(f"{name}={values[name]}: their images are relative to different folders; train them apart")
    (folder,) = folders
    yield "model.data.image_folder", folder
    yield "model.data.video_folder", folder
    for one in found:
        if one not in there:
            yield Note(f"{one.value}: is not there yet; translate again when it is, its names decide image_folder")


def media_folder(values: Values, file: Path) -> Text:
    """Where the names in a file of records begin: at dataset_dir where the first of them is there."""
    folder = path(values, values[f"{BASIC}.dataset_dir"])
    with file.open(encoding="utf-8", errors="replace") as stream:
        first = re.search(r'"(?:images|videos)"\s*:\s*\[\s*"((?:[^"\\]|\\.)*)"', stream.read(1 << 20))
    if first and Path(folder.value, json.loads(f'"{first[1]}"')).exists():
        return folder
    return path(values, ".")


def first_records(values: Values, name: str) -> Iterator[Item]:
    drawn = values.number("--train-iters") * values.number("--global-batch-size")
    yield Note(
        f"{name}={values[name]}: there the run reads the first {values[name]} records alone, each about "
        f"{math.ceil(drawn / values.number(name))} times; here it reads all"
    )


def order(values: Values, name: str) -> Iterator[Item]:
    yield "model.data.dataloader_type", "cyclic" if values.true(name) else "single"


def batch_size(values: Values, name: str) -> Iterator[Item]:
    """The loader's own, which the first versions take; --micro-batch-size counts in the later ones."""
    if values.number(name) != values.number("--micro-batch-size"):
        raise ConfigError(
            f"{name}={values[name]}: --micro-batch-size is {values['--micro-batch-size']}; must say the same"
        )
    yield from ()


def workers(values: Values, name: str) -> Iterator[Item]:
    if not values["--num-workers"]:
        yield "model.data.num_workers", values.number(name)


def validation_share(values: Values, name: str) -> Iterator[Item]:
    if values[f"{BASIC}.val_dataset"]:
        yield Note(f"{name}={values[name]}: of no effect, val_dataset is there")
    else:
        yield "model.data.validation_split", values[name]
