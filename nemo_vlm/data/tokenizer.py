"""Tokenizers: loaded from a directory, or trained for a demo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_vlm.config import TokenizerConfig
from nemo_vlm.errors import ConfigError

SENTENCEPIECE = "tokenizer.model"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def tokenizer_exists(config: TokenizerConfig) -> bool:
    """Whether there is a directory, an archive, or a repository in the local cache, of the name; it is not opened."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if config.type is None:
        return False
    return Path(config.type).exists() or Path(HF_HUB_CACHE, f"models--{config.type.replace('/', '--')}").is_dir()


def located(config: TokenizerConfig) -> TokenizerConfig:
    """With its whole path, where it has one: checkpoints are opened from other folders too."""
    return replace(config, type=os.path.abspath(config.type)) if Path(str(config.type)).exists() else config


def name_sentencepiece(folder: Path) -> None:
    """Say of a SentencePiece model that stands alone that it is Llama's, as NeMo's are.

    transformers would take it for one without normalisation, and make other tokens.
    """
    described = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if (folder / SENTENCEPIECE).is_file() and not described:
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def open_tokenizer(place: str, called: str) -> Any:
    """A Hugging Face tokenizer from a directory or the local cache; nothing is downloaded.

    Args:
        called: what messages call the place.
    Raises:
        ConfigError: there is none, or it cannot report character offsets, which the label mask needs.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        raise ConfigError(
            f"model.tokenizer.type={called}: no tokenizer there, nor one of that name in the cache"
        ) from None
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise ConfigError(f"model.tokenizer.type={called}: a fast tokenizer (tokenizer.json) with an EOS is needed")
    tokenizer.name_or_path = called
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with Llama's special tokens and <image>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=special,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    unknown, start, end, pad, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        additional_special_tokens=[image],
        clean_up_tokenization_spaces=False,
    )
