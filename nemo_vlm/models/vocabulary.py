"""What a tokenizer decides about a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from nemo_vlm.config import LanguageConfig
from nemo_vlm.errors import ConfigError

C = TypeVar("C", bound=LanguageConfig)


def settle_vocabulary(config: C, tokenizer: Any) -> C:
    """The config with a vocabulary that the tokenizer fits into."""
    size = len(tokenizer)
    if config.vocab_size is not None and config.vocab_size < size:
        raise ConfigError(f"model.vocab_size={config.vocab_size}: the tokenizer has {size} tokens")
    return replace(config, vocab_size=config.vocab_size or size)


def token_id(tokenizer: Any, token: str, key: str) -> int:
    """The id of a token that must be in the vocabulary."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ConfigError(
            f"{key}={token}: the tokenizer {tokenizer.name_or_path} has no such token; "
            f"model.tokenizer.additional_special_tokens=['{token}', ...] adds it, beside all others that the tokenizer "
            "lacks, or scripts/add_special_tokens.py for good"
        )
    return found
