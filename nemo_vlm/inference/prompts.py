"""Prompts as examples/generate.py takes them: raw texts or messages, from a file or the command line.

A line is {"prompt": text with <image> and <video> where they go} or {"messages": [{"role", "content"}, ...]}, with
`image`, a path, or `images`, several, and likewise `video` and `videos`, below the file's folder or image_folder. A
video is a file, or a folder of its frames, as in data. A message's content is a text, or a list of its parts, of which
those of images and videos may name their files themselves: {"type": "image", "image": path}, {"type": "video", "video":
path or a list of frames}. How many pixels and frames are seen is the model's: a part cannot say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG, Sample
from nemo_vlm.data.forms import MEDIA
from nemo_vlm.data.media import Folder, Frames, opened
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.inference.generate import Answer
from nemo_vlm.inference.restore import Restored
from nemo_vlm.inference.settings import AskConfig, GenerateConfig
from nemo_vlm.models.messages import encode_messages, media_in, tagged

KINDS = "text", *MEDIA  # of the parts of a message
ADDRESS = re.compile("(?:^|/)(?:https?:/|data:)")


@dataclass(frozen=True)
class Prompt:
    """One of those that are to be answered.

    Attributes:
        line: as it was given.
        images, videos: that it names.
        called: what messages call it.
    """

    line: dict[str, Any]
    images: list[Path]
    videos: list[Path | Frames]
    called: str


@dataclass(frozen=True)
class RawPrompts:
    """How examples/generate.py reads prompts and writes answers."""

    config: GenerateConfig

    def read(self) -> list[Prompt]:
        """All prompts, as far as they can be checked without the model.

        Raises:
            ConfigError: names the line.
        """
        config = self.config
        if config.prompt is not None:
            given = {"image": config.image, "video": config.video}
            files = {MEDIA[kind]: named(given, kind) for kind in MEDIA if given[kind]}
            line = {"prompt": config.prompt} | files
            return [checked(line, Path(config.image_folder or config.inference.media_folder or ""), "prompt")]
        path = Path(str(config.prompt_file))
        folder = Path(config.image_folder or config.inference.media_folder or path.parent)
        return [checked(line, folder, called) for called, line in read_objects(path)]

    def encode(self, prompt: Prompt, restored: Restored) -> tuple[Tensor, list[Any]]:
        """Ids [s], and the images and videos that they speak of, in their order.

        Raises:
            SampleError: an image or a video cannot be read, or the text is too long.
            ConfigError: the template refuses the messages, or the text speaks of more or fewer than there are.
        """
        if "messages" in prompt.line:
            messages = prompt.line["messages"]
            return encode_messages(messages, prompt.images, prompt.videos, restored.processor)
        text = tagged(prompt.line["prompt"], restored.config)
        text = with_placeholder(text, IMAGE_TAG, len(prompt.images), self.config)
        text = with_placeholder(text, VIDEO_TAG, len(prompt.videos), self.config)
        media = media_in(text, prompt.images, prompt.videos, restored.config)
        return restored.processor.tokens(text, media), media

    def end_strings(self, restored: Restored) -> tuple[str, ...]:
        return self.config.inference.end_strings

    def line(self, prompt: Prompt, sample: Sample, answer: Answer, restored: Restored) -> dict[str, Any]:
        """The prompt's line with its answer."""
        return prompt.line | {
            "text": answer.text(restored.tokenizer),
            "token_ids": answer.tokens.tolist(),
            "prompt_token_ids": sample.tokens.tolist(),
        }


def with_placeholder(text: str, tag: str, count: int, config: AskConfig) -> str:
    """The text; where it has no such tag for its files, with one for each, as inference.insert_media_token says."""
    if config.inference.inserted is None or tag in text or not count:
        return text
    return f"{tag * count}\n{text}" if config.inference.inserted == "left" else f"{text}\n{tag * count}"


def read_objects(path: Path) -> list[tuple[str, Any]]:
    """What the JSON lines of a file hold, or its one list, and what messages call each.

    Raises:
        ConfigError: names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"prompt_file={path}: cannot be read ({reason})") from None
    if text.lstrip().startswith("["):
        found = [(f"{path} entry {number}", one) for number, one in enumerate(parsed(text, str(path)), start=1)]
    else:
        lines = [(f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
        found = [(called, parsed(line, called)) for called, line in lines if line.strip()]
    if not found:
        raise ConfigError(f"prompt_file={path}: holds no prompt")
    return found


def parsed(text: str, called: str) -> Any:
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is legal JSON, but no text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{called}: not JSON that can be read ({error})") from None
    return found


def checked(line: Any, folder: Path, called: str) -> Prompt:
    """The prompt of a line, its images and videos found.

    Raises:
        ConfigError: it has another form, or one of them is missing.
    """
    if problem := fault(line):
        raise ConfigError(f"{called}: {problem}")
    return prompt_of(line, {kind: named(line, kind) or in_messages(line, kind) for kind in MEDIA}, folder, called)


def prompt_of(line: dict[str, Any], files: Mapping[str, list[Any]], folder: Path, called: str) -> Prompt:
    """The prompt of a line, which has the right form.

    Args:
        files: names of its images ("image") and videos ("video"), or lists of those of a video's frames.
    Raises:
        ConfigError: an image or a video is missing.
    """
    images = [image_of(folder, name, called) for name in files["image"]]
    return Prompt(line, images, [video_of(folder, name, called) for name in files["video"]], called)


def check_file(path: Path, kind: str, called: str, where: str) -> None:
    """What is in it is found out later, and costs no other prompt its answer.

    Args:
        where: files stand, to be told where this does not.
    Raises:
        ConfigError: it is missing.
    """
    try:
        opened(path, kind).close()
    except SampleError as error:
        advice = "; addresses are not read" if ADDRESS.search(str(path)) else where
        missing = "is a folder, not a file" if path.is_dir() else f"the {kind} does not exist{advice}"
        raise ConfigError(f"{called}: {f'{path}: {missing}' if error.of_media else error}") from None
    except OSError as error:
        raise ConfigError(f"{called}: {error.strerror}") from None


def local(name: str) -> str:
    """A file's name, which Qwen's examples have as an address."""
    return name.removeprefix("file://")


def image_of(folder: Path | None, name: str, called: str) -> Path:
    """An image's file; see video_of."""
    path = (folder or Path()) / local(name)
    check_file(path, "image", called, advice_on(folder))
    return path


def video_of(folder: Path | None, name: str | list[str], called: str) -> Path | Frames:
    """A video's file, or frames.

    Args:
        folder: where it stands, which is the settings' affair; None: names are paths.
        called: what messages call it.
    Raises:
        ConfigError: there is neither.
    """
    place = folder or Path()
    try:
        if isinstance(name, list):
            video: Path | Frames = Frames(tuple(place / local(frame) for frame in name))
        else:
            video = Folder(place).video(local(name))
    except SampleError as error:
        raise ConfigError(f"{called}: {error}") from None
    for file in [video] if isinstance(video, Path) else video.files:
        check_file(file, "video", called, advice_on(folder))
    return video


def advice_on(folder: Path | None) -> str:
    return "" if folder is None else "; inference.media_base_path says where they stand"


def named(line: Mapping[str, Any], kind: str) -> list[str]:
    """The images or videos that a line names."""
    given = line.get(kind) or line.get(MEDIA[kind]) or []
    return [given] if isinstance(given, str) else list(given)


def in_messages(line: Mapping[str, Any], kind: str) -> list[Any]:
    """Those that parts of its messages name, as in Qwen's examples; a video may be a list of its frames."""
    return [part[kind] for part in parts_of(line) if kind_of(part) == kind and part.get(kind) is not None]


def parts_of(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of those of its messages that consist of parts."""
    contents = [message["content"] for message in line.get("messages", ())]
    return [part for content in contents if isinstance(content, list) for part in content]


def misnamed(line: Mapping[str, Any]) -> str | None:
    """What is wrong with the form in which a line names files."""
    for kind, plural in MEDIA.items():
        if line.get(kind) is not None and line.get(plural) is not None:
            return f"has both '{kind}' and '{plural}'"
        for key in (kind, plural):
            given = line.get(key)
            if not isinstance(given, str | list | None) or not all(isinstance(name, str) for name in given or ""):
                return f"'{key}' must be a path or a list of paths"
    return None


def fault(line: Any) -> str | None:
    """What is wrong with the form of a line."""
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        return "must have either 'prompt' or 'messages'"
    if "prompt" in line and not isinstance(line["prompt"], str):
        return "'prompt' must be text"
    if "messages" in line and not (isinstance(line["messages"], list) and line["messages"]):
        return "'messages' must be a list"
    if not all(is_message(message) for message in line.get("messages", [])):
        return (
            "each of 'messages' needs 'role', a text, and 'content', a text or a list of parts: texts, images, videos"
        )
    if problem := misnamed(line) or unheeded(line):
        return problem
    twice = [kind for kind in MEDIA if named(line, kind) and in_messages(line, kind)]
    return f"'{twice[0]}' stands beside 'messages' and in them" if twice else None


def is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(is_part(part) for part in content))


def is_part(part: Any) -> bool:
    """A text, or an image or a video, named there or beside the messages."""
    kind = kind_of(part)
    if kind is None:
        return False
    if kind == "text":
        return isinstance(part.get("text"), str)
    given = part.get(kind)
    in_frames = kind == "video" and isinstance(given, list) and all(isinstance(frame, str) for frame in given)
    return isinstance(given, str | None) or (in_frames and bool(given))


def kind_of(part: Any) -> str | None:
    """What a part of a message is, one of KINDS; None: none of them."""
    if not isinstance(part, dict):
        return None
    kind = part.get("type") or next((kind for kind in KINDS if kind in part), None)
    return kind if kind in KINDS else None


def unheeded(line: Mapping[str, Any]) -> str | None:
    """What a part of its messages says that nothing here would heed."""
    for part in parts_of(line):
        if more := sorted(part.keys() - {"type", kind_of(part)}):
            settled = "pixels and frames are as in training (model.data.max_pixels, video_fps, num_frames, ...)"
            return f"a part of 'messages' has '{more[0]}' beside '{kind_of(part)}'; {settled}"
    return None
