"""Answers of a Hugging Face directory: transformers' model, and this framework's processor for tokens and pixels.

So a model is asked in the tokens and shown the pixels that it was trained with, whatever its class would make of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG, Sample, collate
from nemo_vlm.config import LanguageConfig
from nemo_vlm.config.data import RATES
from nemo_vlm.conversion.huggingface import misread
from nemo_vlm.conversion.verify import stock_model
from nemo_vlm.data.media import Folder, Frames
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.base import family
from nemo_vlm.models.messages import encode_messages
from nemo_vlm.script import PRECISIONS
from nemo_vlm.sources.huggingface import is_huggingface, open_huggingface
from nemo_vlm.sources.source import Source
from nemo_vlm.sources.tokenizers import stop_ids, tokenizer_of

IS_5 = int(transformers.__version__.split(".")[0]) >= 5

Message = Mapping[str, Any]


class Answerer:
    """A model that answers one prompt after another, greedily.

    Args:
        path: Hugging Face's directory.
        dtype: of script.PRECISIONS; auto: as the weights are stored.
        device: torch's name of it; None: cuda where there is one; of several GPUs each has a part of the model.
        max_new_tokens: of an answer; it has fewer where the model's context ends.
    Raises:
        ConfigError: the directory holds no model with a tokenizer that is known here, or transformers misreads it.
        RunError: it lacks tensors.
    """

    def __init__(self, path: Path, dtype: str = "auto", device: str | None = None, max_new_tokens: int = 512) -> None:
        source = checked(path)
        if dtype not in PRECISIONS:
            raise ConfigError(f"--precision={dtype}: must be one of {', '.join(PRECISIONS)}")
        parts, self.family, self.max_new_tokens = family(source.family, "processor"), source.family, max_new_tokens
        self.tokenizer = tokenizer_of(source)
        self.config: LanguageConfig = parts.settle(source.model, self.tokenizer)
        self.data = source.settings["data"]
        self.processor = parts.Processor(self.config, self.data, self.tokenizer)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        several = "auto" if device is None and torch.cuda.device_count() > 1 else None
        model = stock_model(source, path, PRECISIONS[dtype] or "auto", "sdpa", several)
        self.model = model if several else model.to(self.device)
        self.model.generation_config = greedy(stop_ids(source, self.tokenizer), self.tokenizer)

    def answer(self, messages: Sequence[Message]) -> str:
        """What the model says next, without special tokens.

        Args:
            messages: {"role", "content": a text or a list of its parts}, of which each is {"type": "text", "text"},
                {"type": "image", "image": path} or {"type": "video", "video": path or list of the paths of frames}.
        Raises:
            ConfigError: the chat template refuses them, a file cannot be read, or they are too long for the model.
        """
        return self.tokenizer.decode(self.tokens(self.sample(messages)), skip_special_tokens=True)

    def see_videos(self, num_frames: int | None, fps: float | None) -> None:
        """From now on, so many frames of each video, or so many of each of its seconds; neither: as in training."""
        data = self.data
        if num_frames is not None:
            data = replace(data, num_frames=num_frames, **dict.fromkeys(RATES))
        elif fps is not None:
            data = replace(data, num_frames=None, video_fps=fps)
        self.processor = family(self.family, "processor").Processor(self.config, data, self.tokenizer)

    def sample(self, messages: Sequence[Message]) -> Sample:
        """The prompt's ids and pixels, as the processor of the training makes them.

        Raises:
            ConfigError: as answer.
        """
        media = [part for message in messages for part in media_parts(message)]
        images = [part["image"] for part in media if part["type"] == "image"]
        videos = [video_of(part["video"]) for part in media if part["type"] == "video"]
        said = [plain(message, self.config) for message in messages]
        ids, seen = encode_messages(said, images, videos, self.processor)
        return Sample(ids, torch.zeros_like(ids), self.processor.pixels(seen))

    @torch.inference_mode()
    def tokens(self, prompt: Sample) -> Tensor:
        """Ids [n] of the answer, on the CPU, the one that ended it included."""
        count = len(prompt.tokens)
        limit = min(self.max_new_tokens, self.config.encoder_seq_length - count)
        found = self.model.generate(**self.inputs(prompt), max_new_tokens=limit)
        return found[0, count:].cpu()

    def inputs(self, prompt: Sample) -> dict[str, Tensor]:
        """What transformers' generate is given.

        The positions of M-RoPE are ours: transformers 5 takes a video for as long as it is high or wide. transformers 4
        counts as we do, and cannot be told.
        """
        found: dict[str, Tensor] = family(self.family, "tiny").hf_inputs(self.config, collate([prompt]))
        if not IS_5:
            found = {name: value for name, value in found.items() if name not in ("position_ids", "mm_token_type_ids")}
        pixels = {name: value.to(self.model.dtype) for name, value in found.items() if value.is_floating_point()}
        whole = found | pixels | {"attention_mask": torch.ones_like(found["input_ids"])}
        return {name: value.to(self.device) for name, value in whole.items()}


def checked(path: Path) -> Source:
    """The directory, opened.

    Raises:
        ConfigError: it is none of Hugging Face's, or transformers would take its weights for others.
    """
    if not is_huggingface(path):
        raise ConfigError(f"{path}: not a directory of Hugging Face (config.json)")
    source = open_huggingface(path)
    if IS_5 and (wrong := misread(family(source.family, "mapping").rules(source.model))):
        raise ConfigError(f"{path}: {wrong}")
    return source


def greedy(stop_ids: set[int], tokenizer: Any) -> transformers.GenerationConfig:
    """Instead of a checkpoint's own settings, which may draw, or punish repetition."""
    pad = min(stop_ids) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return transformers.GenerationConfig(do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=pad)


def media_parts(message: Message) -> list[dict[str, Any]]:
    """What of a message is no text."""
    content = message["content"]
    return [] if isinstance(content, str) else [part for part in content if part["type"] != "text"]


def plain(message: Message, config: LanguageConfig) -> dict[str, Any]:
    """A message for the chat template. Only its parts are media: a tag that a question spells out is cut in two."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": cut(content, config)}
    texts = [{"text": cut(part["text"], config)} if part["type"] == "text" else {} for part in content]
    return {**message, "content": [{"type": part["type"], **text} for part, text in zip(content, texts, strict=True)]}


def cut(text: str, config: LanguageConfig) -> str:
    if not config.reads_media:
        return text
    for tag in {IMAGE_TAG, VIDEO_TAG, config.in_text.image_token, config.in_text.video_placeholder}:
        text = text.replace(tag, f"{tag[0]} {tag[1:]}")
    return text


def video_of(given: str | Path | Sequence[str | Path]) -> Path | Frames:
    """A video's file, or its frames."""
    return Folder(Path()).video(str(given)) if isinstance(given, str | Path) else Frames(tuple(given))
