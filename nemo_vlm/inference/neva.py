"""Prompts as examples/neva_inference.py takes them: questions that are put into the model's conversation template.

A line is {"prompt" (or "text", or "question"): text with <image> or <video> where they go}, with `image` or `video` (or
`images`, `videos`), a path or several, below inference.media_base_path or the file's folder, and `system`, as a record.
What else it has is passed through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG, Sample
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference.generate import Answer
from nemo_vlm.inference.prompts import Prompt, misnamed, named, prompt_of, read_objects, with_placeholder
from nemo_vlm.inference.restore import Restored, terminators
from nemo_vlm.inference.settings import NevaInferenceConfig

TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}
QUESTIONS = ("prompt", "text", "question")  # fields that may hold it; the first that there is


@dataclass(frozen=True)
class NevaPrompts:
    """How examples/neva_inference.py reads prompts and writes answers."""

    config: NevaInferenceConfig

    def read(self) -> list[Prompt]:
        """All prompts, as far as they can be checked without the model.

        Raises:
            ConfigError: names the line.
        """
        path = Path(str(self.config.prompt_file))
        folder = Path(self.config.inference.media_folder or path.parent)
        return [self.checked(line, folder, called) for called, line in read_objects(path)]

    def checked(self, line: Any, folder: Path, called: str) -> Prompt:
        if problem := fault(line):
            raise ConfigError(f"{called}: {problem}")
        files = {kind: named(line, kind) for kind in TAGS}
        for kind, tag in TAGS.items():
            count = self.question(line).count(tag)
            if count != len(files[kind]):
                hint = "" if count else "; inference.insert_media_token=left puts them in front"
                raise ConfigError(f"{called}: {count} {tag} in the text, {len(files[kind])} of '{kind}'{hint}")
        return prompt_of({"prompt": asked(line)} | line, files, folder, called)

    def question(self, line: dict[str, Any]) -> str:
        """With its placeholders; those in front on a line of their own, as in LLaVA's data."""
        kind = self.config.inference.media_type
        text = with_placeholder(asked(line), TAGS[kind], len(named(line, kind)), self.config)
        return re.sub(r"^((?:<image>|<video>)+) *(?!<image>|<video>)(?=\S)", r"\1\n", text)

    def record(self, prompt: Prompt) -> dict[str, Any]:
        """As a record of LLaVA's data, without an answer."""
        turn = {"from": "human", "value": self.question(prompt.line)}
        return {
            "id": prompt.called,
            "system": prompt.line.get("system"),
            "conversations": [turn],
            "image": prompt.images,
            "video": prompt.videos,
        }

    def encode(self, prompt: Prompt, restored: Restored) -> tuple[Tensor, list[Any]]:
        """Ids [s], and the images and videos that they speak of.

        Raises:
            SampleError: an image or a video cannot be read, or the text is too long.
            ConfigError: the model reads text only, and there are some.
        """
        tokens, media = restored.processor.asked(self.record(prompt))
        if len(media) != (given := len(prompt.images) + len(prompt.videos)):
            raise ConfigError(f"the model reads text only, there are {given} images")
        return tokens, media

    def end_strings(self, restored: Restored) -> tuple[str, ...]:
        return self.config.inference.end_strings + terminators(restored.config, restored.data)

    def line(self, prompt: Prompt, sample: Sample, answer: Answer, restored: Restored) -> dict[str, Any]:
        """NeMo's fields beside the line's own, and the answer's ids; the question stays, `text` is the answer."""
        text = answer.text(restored.tokenizer).strip()
        return {
            **prompt.line,
            "full_text": restored.processor.text.prompt_text(self.record(prompt)) + answer.text(restored.tokenizer),
            "text": text,
            "model_id": self.config.source[1],
            "answer_id": prompt.line.get("answer_id", 0),
            "metadata": prompt.line.get("metadata", {}),
            "token_ids": answer.tokens.tolist(),
        }


def asked(line: dict[str, Any]) -> str:
    """The question as a line has it."""
    return next(line[key] for key in QUESTIONS if key in line)


def fault(line: Any) -> str | None:
    """What is wrong with the form of a line."""
    if not isinstance(line, dict) or not any(key in line for key in QUESTIONS):
        return "must have a 'prompt' ('text', 'question')"
    if not all(isinstance(line[key], str) for key in QUESTIONS if key in line):
        return "'prompt' ('text', 'question') must be text"
    if not isinstance(line.get("system"), str | None):
        return "'system' must be text"
    return misnamed(line)
