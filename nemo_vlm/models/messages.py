"""Messages as a prompt: the text that a chat template makes of them, as tokens, and what is seen, in its order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG
from nemo_vlm.config import LanguageConfig
from nemo_vlm.data.media import Source
from nemo_vlm.models.base import Processor
from nemo_vlm.models.conversation import chat_text, in_text
from nemo_vlm.models.multimodal import in_order


def encode_messages(
    messages: Sequence[Mapping[str, Any]], images: Iterable[Source], videos: Iterable[Any], processor: Processor
) -> tuple[Tensor, list[Any]]:
    """Ids [s] up to where the answer begins, and the images and videos that they speak of, in their order.

    A chat template that writes BOS itself gets no second one, as in HF's processors.

    Raises:
        ConfigError: the template refuses the messages, or they speak of more images or videos than there are, or fewer.
        SampleError: a file cannot be read, or the text is too long.
    """
    tokenizer, config = processor.tokenizer, processor.config
    said = "".join(in_text(message, "")["content"] for message in messages)
    media = media_in(tagged(said, config), images, videos, config)
    if config.in_text.video_placeholder == config.in_text.image_token:
        messages = [with_images(message) for message in messages]
    text, has_bos = templated(messages, tokenizer, config)
    return processor.tokens(text, media, add_special_tokens=not has_bos), media


def templated(messages: Sequence[Mapping[str, Any]], tokenizer: Any, config: LanguageConfig) -> tuple[str, bool]:
    """The text that the chat template makes of messages, with tags; and whether BOS stands in front of it."""
    text = tagged(chat_text(messages, tokenizer, config.in_text.media_break), config)
    return text, tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def with_images(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message to a model that takes a video for a row of images, whose chat template may know no other word."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content.replace(VIDEO_TAG, IMAGE_TAG)}
    return {**message, "content": [{"type": "image"} if is_video(part) else part for part in content]}


def is_video(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "video" or "video" in part


def tagged(text: str, config: LanguageConfig) -> str:
    """The text with <image> and <video> where the model's own placeholders stand, bare or with what is around them."""
    media = config.in_text
    text = text.replace(media.image_text, IMAGE_TAG).replace(media.image_token, IMAGE_TAG)
    if media.video_placeholder == media.image_token:
        return text
    return text.replace(media.video_text, VIDEO_TAG).replace(media.video_placeholder, VIDEO_TAG)


def media_in(text: str, images: Iterable[Source], videos: Iterable[Any], config: LanguageConfig) -> list[Any]:
    """Images and videos as a text with tags speaks of them; of a model that reads text only, all.

    Raises:
        ConfigError: it speaks of more or fewer.
    """
    if not config.reads_media:  # its processor says so
        return [*images, *videos]
    return in_order(text, images, videos)
