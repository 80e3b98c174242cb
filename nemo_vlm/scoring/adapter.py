"""VLMEvalKit's model class around an Answerer: asked in the harness's words, answering with this framework's pixels.

vlmeval is imported when its checkout stands on sys.path, which scoring.vlmevalkit sees to.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_vlm.errors import SampleError, explain
from nemo_vlm.scoring.answerer import Answerer

log = logging.getLogger(__name__)

NAME = "NemoVLM"  # by which a --config of VLMEvalKit's names the class


class OfDataset:
    """Frames of a video, or of a second: infinitely many where its dataset says nothing.

    VLMEvalKit sets such an attribute to what its dataset says, or to None, but only where it finds a number.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.kept = f"_{name}"

    def __get__(self, model: Any, owner: type) -> Any:
        return vars(model).get(self.kept) or math.inf

    def __set__(self, model: Any, number: float | None) -> None:
        vars(model)[self.kept] = number


def model_class() -> Any:
    """The class, for supported_VLM and as an attribute of vlmeval.vlm."""
    from vlmeval.inference import FAIL_MSG
    from vlmeval.vlm.base import BaseModel

    class NemoVLM(BaseModel):
        """A Hugging Face directory of a family that is known here; greedy."""

        INTERLEAVE = True
        nframe, fps = OfDataset(), OfDataset()

        def __init__(self, model_path: str, dtype: str = "auto", max_new_tokens: int = 512) -> None:
            super().__init__()
            self.answerer = Answerer(Path(model_path), dtype, max_new_tokens=max_new_tokens)
            self.wording = wording(self.answerer.family)
            self.VIDEO_LLM = self.answerer.family != "llava"  # else it is shown a video's frames as images
            self.worded: str | None = None  # the dataset that is asked in the family's words
            self.told = False

        def set_dump_image(self, dump_image_func: Any) -> None:
            """Given the dataset's, before the first of its questions, but for a dataset of videos."""
            dataset = dump_image_func.__self__
            self.wording.set_dump_image(dump_image_func)
            worded = dataset.TYPE != "MT" and self.wording.use_custom_prompt(dataset.dataset_name)
            self.worded = dataset.dataset_name if worded else None

        def use_custom_prompt(self, dataset: str) -> bool:
            """A dataset of videos or of several turns has its own words."""
            return dataset == self.worded

        def build_prompt(self, line: Any, dataset: str) -> list[dict[str, Any]]:
            return list(self.wording.build_prompt(line, dataset))

        def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            return self.chat_inner([{"role": "user", "content": message}], dataset)

        def chat_inner(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            """An answer that fails is one of the harness's failed answers, which --reuse asks for again.

            Raises:
                SampleError: a conversation is too long, whose first turns the harness then leaves out.
            """
            try:
                self.answerer.see_videos(*[None if n == math.inf else n for n in (self.nframe, self.fps)])
                return self.answerer.answer([in_parts(message) for message in messages]).strip()
            except Exception as error:
                if len(messages) > 1 and isinstance(error, SampleError) and error.reason == "too_long":
                    raise
                if not self.told:
                    log.error("an answer failed, as others may: %s", explain(error).message)
                self.told = True
                return str(FAIL_MSG)

    return NemoVLM


def wording(family: str) -> Any:
    """How the checkout itself asks a family's models: an object with use_custom_prompt and build_prompt."""
    if family == "qwen2_vl":
        from vlmeval.vlm.qwen2_vl.prompt import Qwen2VLPromptMixin

        return Qwen2VLPromptMixin()
    if family == "qwen3_vl":
        from vlmeval.vlm.qwen3_vl.prompt import Qwen3VLPromptMixin

        return Qwen3VLPromptMixin()
    from vlmeval.vlm.llava import LLaVA

    return LLaVA.__new__(LLaVA)  # its __init__ opens a checkpoint of another format


def in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """VLMEvalKit's parts, each of a type and a value, as a chat template's."""
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    return {**message, "content": [{"type": part["type"], part["type"]: part["value"]} for part in content]}
