"""Prompts as examples/generate.py takes them: raw texts or messages, from a file or the command line.

A line is {"prompt": text with <image> and <video> where they go} or {"messages": [{"role", "content"}, ...]}, with
`image`, a path, or `images`, several, and likewise `video` and `videos`, below the file's folder or image_folder. A
video is a file, or a folder of its frames, as in data. A message's content is a text, or a list of its parts, of which
those of images and videos may name their files themselves: {"type": "image", "image": path}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG, Sample
from nemo_vlm.config import LanguageConfig
from nemo_vlm.data.forms import MEDIA
from nemo_vlm.data.media import Folder, Frames, opened
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.inference.generate import Answer
from nemo_vlm.inference.restore import Restored
from nemo_vlm.inference.settings import AskConfig, GenerateConfig
from nemo_vlm.models.conversation import chat_text
from nemo_vlm.models.multimodal import in_order


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
            return encode_messages(prompt, restored)
        text = tagged(prompt.line["prompt"], restored.config)
        text = with_placeholder(text, IMAGE_TAG, len(prompt.images), self.config)
        text = with_placeholder(text, VIDEO_TAG, len(prompt.videos), self.config)
        media = media_of(prompt, text, restored.config)
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


def encode_messages(prompt: Prompt, restored: Restored) -> tuple[Tensor, list[Any]]:
    """As RawPrompts.encode, of a line with messages.

    A chat template that writes BOS itself gets no second one, as in HF's processors.
    """
    tokenizer, config = restored.tokenizer, restored.config
    text = tagged(chat_text(prompt.line["messages"], tokenizer, config.in_text.media_break), config)
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    media = media_of(prompt, text, config)
    return restored.processor.tokens(text, media, add_special_tokens=not has_bos), media


def tagged(text: str, config: LanguageConfig) -> str:
    """The text with <image> and <video> where the model's own placeholders stand, bare or with what is around them."""
    media = config.in_text
    text = text.replace(media.image_text, IMAGE_TAG).replace(media.image_token, IMAGE_TAG)
    if media.video_placeholder == media.image_token:
        return text
    return text.replace(media.video_text, VIDEO_TAG).replace(media.video_placeholder, VIDEO_TAG)


def media_of(prompt: Prompt, text: str, config: LanguageConfig) -> list[Any]:
    """A prompt's images and videos as the text speaks of them; of a model that reads text only, all.

    Raises:
        ConfigError: it speaks of more or fewer.
    """
    if not config.reads_media:  # its processor says so
        return [*prompt.images, *prompt.videos]
    return in_order(text, prompt.images, prompt.videos)


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


def prompt_of(line: dict[str, Any], files: Mapping[str, list[str]], folder: Path, called: str) -> Prompt:
    """The prompt of a line, which has the right form.

    Args:
        files: names of its images ("image") and videos ("video").
    Raises:
        ConfigError: an image or a video is missing.
    """
    images = [folder / name for name in files["image"]]
    for image in images:
        check_file(image, "image", called)
    return Prompt(line, images, [video_of(folder, name, called) for name in files["video"]], called)


def check_file(path: Path, kind: str, called: str) -> None:
    """What is in it is found out later, and costs no other prompt its answer.

    Raises:
        ConfigError: it is missing.
    """
    try:
        opened(path, kind).close()
    except SampleError as error:
        missing = f"{path}: the {kind} does not exist; inference.media_base_path says where they stand"
        raise ConfigError(f"{called}: {missing if error.of_media else error}") from None
    except OSError as error:
        raise ConfigError(f"{called}: {error.strerror}") from None


def video_of(folder: Path, name: str, called: str) -> Path | Frames:
    """A video file, which is not opened, or frames.

    Raises:
        ConfigError: there is neither.
    """
    try:
        video = Folder(folder).video(name)
    except SampleError as error:
        raise ConfigError(f"{called}: {error}") from None
    if isinstance(video, Path):
        check_file(video, "video", called)
    return video


def named(line: Mapping[str, Any], kind: str) -> list[str]:
    """The images or videos that a line names."""
    given = line.get(kind) or line.get(MEDIA[kind]) or []
    return [given] if isinstance(given, str) else list(given)


def in_messages(line: Mapping[str, Any], kind: str) -> list[str]:
    """Those that parts of its messages name, as in Qwen's examples."""
    contents = [message["content"] for message in line.get("messages", ())]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part[kind].removeprefix("file://") for part in parts if isinstance(part.get(kind), str)]


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
        return "each of 'messages' needs 'role', a text, and 'content', a text or a list of parts"
    return misnamed(line)


def is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, dict) for part in content))
