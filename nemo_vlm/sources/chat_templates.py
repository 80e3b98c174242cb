"""Whose words a model is asked in: its source's chat template, or that of the run that trained it.

A run trains in model.data.conv_template. Where its tokenizer brings a chat template that asks in other words, its
checkpoints go without one: readers make it of the settings. One that asks alike is kept, which may know more, of tools.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_vlm.config import DataConfig, LanguageConfig
from nemo_vlm.data.tokenizer import SETTINGS, open_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.store import Folder
from nemo_vlm.models.chat import chat_template
from nemo_vlm.models.messages import templated
from nemo_vlm.sources.huggingface import companions
from nemo_vlm.sources.source import Source

CHAT = "chat_template.json"  # where transformers 4 kept the template of a processor
FILES = ("chat_template.", "additional_chat_templates/")

Messages = list[dict[str, Any]]


def take_processors(tokenizer: Any, source: Source) -> None:
    """Give a tokenizer without a chat template that of the processor, if the source has one."""
    if tokenizer.chat_template is None and CHAT in source.files:
        tokenizer.chat_template = source.read_json(CHAT)["chat_template"]


def leave_out_foreign(tokenizer: Any, model: LanguageConfig, data: DataConfig) -> str | None:
    """Take a chat template away that asks in other words than those of the training.

    Where the data are tokens, only what the settings name counts as its words.

    Returns:
        what there is to say about it, if it was taken.
    """
    known = data.has_records or data.conv_template is not None or data.system_message is not None
    if not known or tokenizer.chat_template is None or asks_alike(tokenizer, model, data):
        return None
    tokenizer.chat_template = None
    name = data.conv_template or model.conv_template
    return (
        f"the chat template of the tokenizer {tokenizer.name_or_path} asks in other words than this run trains: its "
        f"checkpoints have that of model.data.conv_template={name} instead"
    )


def asks_alike(tokenizer: Any, model: LanguageConfig, data: DataConfig) -> bool:
    """Whether a tokenizer's chat template makes the same prompts as the template of a training."""
    trained = copy.copy(tokenizer)
    trained.chat_template = chat_template(model, data, with_bos=True)
    try:
        return all(ids(said, tokenizer, model) == ids(said, trained, model) for said in conversations(model))
    except ConfigError:  # it refuses what the run's takes
        return False


def ids(messages: Messages, tokenizer: Any, model: LanguageConfig) -> list[int]:
    """A prompt's tokens as models.messages makes them, <image> standing for itself."""
    text, has_bos = templated(messages, tokenizer, model)
    return list(tokenizer(text, add_special_tokens=not has_bos)["input_ids"])


def conversations(model: LanguageConfig) -> Iterator[Messages]:
    """One turn and two, with and without a system message, the questions in parts and as texts."""
    tag = f"<image>{model.in_text.media_break}" if model.reads_media else ""
    parts = [{"type": "image"}] * model.reads_media + [{"type": "text", "text": "What is it?"}]
    for question in (parts, f"{tag}What is it?"):
        one: Messages = [{"role": "user", "content": question}]
        two = [*one, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "And why?"}]
        for turns in (one, two):
            yield from (turns, [{"role": "system", "content": "Be brief."}, *turns])


def with_template_of_training(source: Source) -> Source:
    """A training checkpoint whose tokenizer's files are as its run's archive would have them."""
    settings = source.files.get(SETTINGS)
    inside = settings is not None and b'"chat_template"' in settings.bytes()
    if not inside and not any(name.startswith(FILES) for name in source.files):
        return source
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "given"), Path(scratch, "made")
        tokenizer = open_tokenizer(str(source.save_files(given)), str(source))
        take_processors(tokenizer, source)
        if leave_out_foreign(tokenizer, source.model, source.settings["data"]) is None:
            return source
        tokenizer.save_pretrained(made)
        return replace(source, files=companions(Folder(made)))  # what is mapped outlives the folder
