"""Records to MindSpeed-MM's mllm JSON: `messages` of role and content, and the `images` and `videos` they speak of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nemo_vlm.batch import HUMANS
from nemo_vlm.data.forms import SYSTEM
from nemo_vlm.data.media import Folder, Frames, opened
from nemo_vlm.data.records import RecordFile
from nemo_vlm.data.skipped import Skipped, made
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import remove_partial, written_whole


def prepare(file: RecordFile, output: Path, max_skip_fraction: float) -> str:
    """Write a list of all records that can be used, one a line.

    Returns:
        what was done.
    Raises:
        ConfigError: the images stand in a tar, or the output cannot be written.
        RuntimeError: too many records had to be left out, or a disk fails; nothing is written.
    """
    for folder in (file.images, file.videos):
        if not isinstance(folder, Folder):
            raise ConfigError(
                f"--image-folder, --video-folder: mllm JSON names files, which {folder.path} does not have"
            )
    skipped = Skipped("records", max_skip_fraction)
    remove_partial(output)

    def make(number: int) -> dict[str, Any]:
        try:
            return mllm(file[number], output.parent)
        except OSError as error:  # nothing of the output
            raise RuntimeError(f"{error.strerror}; nothing was written") from None

    try:
        with written_whole(output) as written:
            between = "[\n"
            for record in made(make, len(file), skipped, output.name):
                written.write(between + json.dumps(record, ensure_ascii=False))
                between = ",\n"
            skipped.check(finished=True)
            written.write("\n]\n")
    except OSError as error:
        raise ConfigError(f"--output={output}: cannot be written ({error.strerror})") from None
    return f"{output}: {skipped.kept} records; {skipped}"


def mllm(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A record in that form; what it has no images or videos of is left out.

    Args:
        folder: names of files below it are relative to it; others are whole.
    Raises:
        SampleError: a file does not exist.
    """
    said = [{"role": SYSTEM, "content": record["system"]}] if record["system"] else []
    for turn in record["conversations"]:
        role = "user" if turn["from"].lower() in HUMANS else "assistant"
        said.append({"role": role, "content": turn["value"]})
    files = {"images": record["image"], "videos": record["video"]}
    named = {kind: [name_of(source, kind[:-1], folder) for source in some] for kind, some in files.items() if some}
    return {**named, "messages": said}


def name_of(source: Path | Frames, kind: str, folder: Path) -> str:
    """Of frames it is that of their folder."""
    if not isinstance(source, Frames):
        opened(source, kind).close()
    path = source.files[0].parent if isinstance(source, Frames) else source
    whole, root = os.path.abspath(path), os.path.abspath(folder)
    return os.path.relpath(whole, root) if whole.startswith(f"{root}/") else whole
