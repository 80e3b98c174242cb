"""Prompts as examples/generate.py takes them: raw texts or messages, from a file or the command line.

A line is {"prompt": text with <image> where images go} or {"messages": [{"role", "content"}, ...]}, with `image`, a
path, or `images`, several, below the file's folder or image_folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, Sample
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.inference.generate import Answer
from nemo_vlm.inference.restore import Restored
from nemo_vlm.inference.settings import AskConfig, GenerateConfig
from nemo_vlm.models.conversation import chat_text
from nemo_vlm.models.images import image_size

FILES = ("image", "images")  # fields of a line that name some


@dataclass(frozen=True)
class Prompt:
    """One of those that are to be answered.

    Attributes:
        line: as it was given.
        images: and videos, that it names.
        called: what messages call it.
    """

    line: dict[str, Any]
    images: list[Path]
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
            images = [config.image] if isinstance(config.image, str) else list(config.image or ())
            line = {"prompt": config.prompt} | ({"images": images} if images else {})
            return [checked(line, Path(config.image_folder or config.inference.media_folder or ""), "prompt")]
        path = Path(str(config.prompt_file))
        folder = Path(config.image_folder or config.inference.media_folder or path.parent)
        return [checked(line, folder, called) for called, line in read_objects(path)]

    def encode(self, prompt: Prompt, restored: Restored) -> tuple[Tensor, list[Any]]:
        """Ids [s] and images; a chat template that writes BOS itself gets no second one, as in HF's processors.

        Raises:
            ConfigError: names the line.
        """
        line, tokenizer = prompt.line, restored.tokenizer
        try:
            if "prompt" in line:
                text = with_placeholder(line["prompt"], IMAGE_TAG, len(prompt.images), self.config)
                return restored.processor.tokens(text, prompt.images), prompt.images
            text = chat_text(line["messages"], tokenizer)
            has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
            return restored.processor.tokens(text, prompt.images, add_special_tokens=not has_bos), prompt.images
        except ConfigError as error:
            raise ConfigError(f"{prompt.called}: {error}") from None

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
    """The text; where it has no placeholder for its images, with one for each, as inference.insert_media_token says."""
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
    """The prompt of a line, its images found.

    Raises:
        ConfigError: it has another form, or an image is missing.
    """
    if problem := fault(line):
        raise ConfigError(f"{called}: {problem}")
    images = [folder / name for key in FILES for name in named(line, key)]
    for image in images:
        check_image(image, called)
    return Prompt(line, images, called)


def check_image(path: Path, called: str) -> None:
    """Only its beginning is read.

    Raises:
        ConfigError: it is missing, or no image that can be read.
    """
    try:
        image_size(path)
    except SampleError as error:
        missing = f"{path}: the image does not exist; inference.media_base_path says where they stand"
        raise ConfigError(f"{called}: {missing if error.reason == 'missing_image' else error}") from None
    except OSError as error:
        raise ConfigError(f"{called}: {error.strerror}") from None


def named(line: dict[str, Any], key: str) -> list[str]:
    """The files that a line names, a path or several."""
    given = line.get(key)
    return [given] if isinstance(given, str) and given else list(given or ())


def misnamed(line: dict[str, Any], keys: Iterable[str]) -> str | None:
    """What is wrong with the form in which a line names files."""
    for key in keys:
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
    if line.get("image") is not None and line.get("images") is not None:
        return "has both 'image' and 'images'"
    return misnamed(line, FILES)


def is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, dict) for part in content))
