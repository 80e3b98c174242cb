"""The scripts of Pai-Megatron-Patch that make webdatasets; all become scripts/prepare_wds.py, or are not needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.flags import Converter, converted, given, taken
from nemo_vlm.porting.shell import Command, Text
from nemo_vlm.porting.table import Argument, Item, Rule, Values, rate, text

PREPARE, PLACE = "scripts/prepare_wds.py", "toolkits/multimodal_data_preprocessing"
PRETRAIN_JSON = "blip_laion_cc_sbu_558k.json"
SHARES = ("--train-split", "--val-split", "--test-split")


def beside(*flags: tuple[str, str]) -> Rule:
    """The rule of a folder: the flags that it stands for, and what is below it."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        for flag, below in flags:
            yield flag, Text(os.path.join(values[name], below) if below else values[name])

    return rule


def file(values: Values, name: str) -> Iterator[Item]:
    yield "--input", Text(os.path.join(values["--dataset-root"], values[name]))


def shard(values: Values, name: str) -> Iterator[Item]:
    yield "--max-samples-per-tar", int(float(values[name]))


def shares(values: Values, name: str) -> Iterator[Item]:
    yield "--split-ratio", ",".join(values[flag] for flag in SHARES)


LLAVA = Converter(
    f"{PLACE}/convert_llava_pretrain_to_wds.py",
    (
        Argument(
            "DIR",
            f"`--input DIR/{PRETRAIN_JSON}`, `--image-folder DIR`, `--output DIR/wds`",
            text,
            beside(("--input", PRETRAIN_JSON), ("--image-folder", ""), ("--output", "wds")),
        ),
    ),
    script=PREPARE,
)
CHATML = Converter(
    f"{PLACE}/convert_custom_dataset_to_wds_chatml.py",
    (
        given(
            "--dataset-root",
            "`--image-folder`, `--video-folder`, `--output`: its wds",
            text,
            beside(("--image-folder", ""), ("--video-folder", ""), ("--output", "wds")),
        ),
        given("--json", "`--input`", text, file, default="dataset.json"),
        given("--max-samples-per-tar", "`--max-samples-per-tar`", rate, shard, default="10000"),
        given("--train-split", "`--split-ratio 9,1,0`, with the next two", rate, shares, default="9"),
        given("--val-split", "as above", rate, default="1"),
        given("--test-split", "as above", rate, default="0"),
    ),
    script=PREPARE,
)
NOT_NEEDED = {
    "energon prepare": f"{PREPARE} runs it, and data=energon reads a folder that was prepared before as it is",
    f"{PLACE}/build_llava_frame_dataset.py": "videos are read as they are, model.data.video_fps frames a second; "
    f"where a text says `<image>` for its video, write `<video>`, and give the JSON to {PREPARE} with --video-folder",
    f"{PLACE}/replace_llava_image_key.py": f"{PREPARE} takes `image` as well as `images`",
}
CONVERTERS = (LLAVA, CHATML)


def named(words: Sequence[str]) -> Converter | None:
    """The script that a line starts.

    Raises:
        ConfigError: it is one that nothing takes the place of.
    """
    first = PurePath("".join(words[:1])).name
    for name, why in NOT_NEEDED.items():
        if first == PurePath(name).name.partition(" ")[0]:
            raise ConfigError(f"{first}: not needed; {why}")
    return next((one for one in CONVERTERS if PurePath(one.name).name == first), None)


def translate(converter: Converter, words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command of ours.

    Raises:
        ConfigError: a flag or a value that has nothing here.
    """
    if converter is LLAVA:
        if len(words) != 2:
            raise ConfigError(f"{words[0]}: takes one argument, the folder with {PRETRAIN_JSON}")
        texts = {"DIR": words[1]}
    else:
        texts = taken(converter.arguments, words[1:])
    settings, notes = converted(converter, words[0], Values(texts, {}))
    return Command(converter.script, settings), notes
