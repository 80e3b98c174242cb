"""Prompts: lines of JSON, or one from the command line.

A line is {"prompt": text with <image> where images go} or {"messages": [{"role", "content"}, ...]}, with `image`, a
path, or `images`, several, below the file's folder or image_folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from nemo_vlm.errors import ConfigError
from nemo_vlm.inference.settings import GenerateConfig


@dataclass(frozen=True)
class Prompt:
    """One line.

    Attributes:
        line: as it was given.
        called: what messages call it.
    """

    line: dict[str, Any]
    images: list[Path]
    called: str


def read_prompts(config: GenerateConfig) -> list[Prompt]:
    """All prompts, as far as they can be checked without the model.

    Raises:
        ConfigError: names the line.
    """
    if config.prompt is not None:
        images = [config.image] if isinstance(config.image, str) else list(config.image or ())
        line = {"prompt": config.prompt} | ({"images": images} if images else {})
        return [checked(line, Path(config.image_folder or ""), "prompt")]
    path = Path(str(config.prompt_file))
    folder = Path(config.image_folder) if config.image_folder else path.parent
    prompts = []
    for number, text in enumerate(read_lines(path), start=1):
        called = f"{path} line {number}"
        if text.strip():
            try:
                prompts.append(checked(json.loads(text), folder, called))
            except ValueError as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(f"{called}: not JSON ({error})") from None
    if not prompts:
        raise ConfigError(f"prompt_file={path}: holds no line")
    return prompts


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"prompt_file={path}: cannot be read ({reason})") from None


def checked(line: Any, folder: Path, called: str) -> Prompt:
    """The prompt of a line, its images found.

    Raises:
        ConfigError: it has another form, or an image is missing.
    """
    if problem := fault(line):
        raise ConfigError(f"{called}: {problem}")
    images = [folder / name for name in named_images(line)]
    for image in images:
        check_image(image, called)
    return Prompt(line, images, called)


def check_image(path: Path, called: str) -> None:
    """Only its beginning is read."""
    try:
        Image.open(path).close()
    except FileNotFoundError:
        raise ConfigError(f"{called}: {path}: the image does not exist; image_folder says where they stand") from None
    except OSError as error:
        raise ConfigError(f"{called}: {path}: not a readable image ({error})") from None


def named_images(line: dict[str, Any]) -> Sequence[str]:
    if line.get("image") is not None:
        return [line["image"]]
    return line.get("images") or []


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
    names = named_images(line)
    return None if isinstance(names, list) and all(isinstance(name, str) for name in names) else "images must be paths"


def is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, dict) for part in content))
