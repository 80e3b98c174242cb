"""Tokenizers: loaded from files, or trained for a demo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_vlm.config import TokenizerConfig
from nemo_vlm.errors import ConfigError

SENTENCEPIECE, SETTINGS = "tokenizer.model", "tokenizer_config.json"
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2-VL's of images and videos
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
QWEN2 = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen2-VL's, which takes a list of images, videos and texts too
QWEN2_VL = (
    "{% macro said(content) %}"
    "{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' or 'image' in part %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endmacro %}"
) + QWEN2.replace("message['content']", "said(message['content'])")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def tokenizer_exists(config: TokenizerConfig) -> bool:
    """Whether there is a file, a directory, or a repository in the local cache, of the name; it is not opened."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if config.place is None:
        return False
    return Path(config.place).exists() or Path(HF_HUB_CACHE, f"models--{config.place.replace('/', '--')}").is_dir()


def located(config: TokenizerConfig) -> TokenizerConfig:
    """With its whole paths, where it has some: checkpoints are opened from other folders too."""
    paths = {name: getattr(config, name) for name in ("type", "model", "vocab_file", "merge_file")}
    whole = {name: os.path.abspath(path) for name, path in paths.items() if path is not None and Path(path).exists()}
    return replace(config, **whole)


def name_sentencepiece(folder: Path) -> None:
    """Say of a SentencePiece model that stands alone that it is Llama's, as NeMo's are.

    transformers would take it for one without normalisation, and make other tokens.
    """
    described = any((folder / name).is_file() for name in (SETTINGS, "tokenizer.json"))
    if (folder / SENTENCEPIECE).is_file() and not described:
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        (folder / SETTINGS).write_text(json.dumps(settings))


def open_with(config: TokenizerConfig, place: str | Path | None) -> Any:
    """The tokenizer of some settings.

    Args:
        place: where that of `model.tokenizer.type` is, if that is given.
    Raises:
        ConfigError: there is none.
    """
    if config.model is not None:
        return open_model(config)
    if config.vocab_file is not None:
        return open_vocabulary(config)
    return open_tokenizer(str(place), str(config.type), config)


def open_tokenizer(place: str, called: str, config: TokenizerConfig = TokenizerConfig()) -> Any:
    """A tokenizer in Hugging Face's layout, from a directory or the local cache; nothing is downloaded.

    Args:
        called: what messages call the place.
        config: what else the user wants of it.
    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    folder = Path(place)
    try:
        if is_ours(folder) or (not config.use_fast and (folder / SENTENCEPIECE).is_file()):
            from nemo_vlm.data.sentencepiece import SentencePieceTokenizer

            tokenizer = SentencePieceTokenizer.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError):
        raise ConfigError(
            f"model.tokenizer.type={called}: no tokenizer there, nor one of that name in the cache"
        ) from None
    return completed(tokenizer, called, config)


def open_model(config: TokenizerConfig) -> Any:
    """A SentencePiece model that stands alone, without Hugging Face's configuration.

    Raises:
        ConfigError: there is none.
    """
    from nemo_vlm.data.sentencepiece import SentencePieceTokenizer

    try:
        tokenizer = SentencePieceTokenizer(str(config.model), config.sentencepiece_legacy)
    except (OSError, RuntimeError):
        raise ConfigError(f"model.tokenizer.model={config.model}: no SentencePiece model there") from None
    return completed(tokenizer, str(config.model), config)


def open_vocabulary(config: TokenizerConfig) -> Any:
    """A byte-level BPE as GPT-2's, of vocab.json and merges.txt.

    Raises:
        ConfigError: they are not there, or not what they should be.
    """
    from transformers import GPT2Tokenizer

    try:
        tokenizer = GPT2Tokenizer(config.vocab_file, config.merge_file, **config.roles)
    except Exception as error:  # the tokenizers library raises no other class
        message = " ".join(str(error).split())
        raise ConfigError(f"model.tokenizer.vocab_file={config.vocab_file}: no vocabulary there ({message})") from None
    return completed(tokenizer, str(config.vocab_file), config)


def completed(tokenizer: Any, called: str, config: TokenizerConfig) -> Any:
    """With the roles and the tokens that the user gives it.

    Raises:
        ConfigError: it has no EOS, or is of a kind whose texts cannot be put together from pieces.
    """
    if not tokenizer.is_fast and not hasattr(tokenizer, "piece"):  # SentencePieceTokenizer's
        kind = type(tokenizer).__name__
        raise ConfigError(f"model.tokenizer.type={called}: a {kind}; tokenizer.json or a SentencePiece model is needed")
    tokenizer.add_special_tokens(config.roles)
    tokenizer.add_tokens([token for token in config.added if token not in tokenizer.get_vocab()], special_tokens=True)
    if tokenizer.eos_token is None:
        raise ConfigError(f"model.tokenizer.special_tokens.eos_token=null: the tokenizer {called} has no EOS; name it")
    tokenizer.name_or_path = called
    return tokenizer


def is_ours(folder: Path) -> bool:
    """Whether a SentencePieceTokenizer has been saved there: a LlamaTokenizer that transformers has not."""
    path = folder / SETTINGS
    settings = json.loads(path.read_text()) if path.is_file() else {}
    return (settings.get("backend"), settings.get("tokenizer_class")) == ("sentencepiece", "LlamaTokenizer")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with Llama's special tokens and <image>."""
    from transformers import PreTrainedTokenizerFast

    unknown, start, end, pad, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=trained(texts, vocab_size, SPECIAL_TOKENS),
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        additional_special_tokens=[image],
        clean_up_tokenization_spaces=False,
    )


def train_chat_tokenizer(texts: Iterable[str], vocab_size: int, of_vision: Sequence[str] = ()) -> Any:
    """A byte-level BPE tokenizer with the control tokens and the chat template of Qwen2's.

    Args:
        of_vision: special tokens; with them it is as Qwen2-VL's.
    """
    from transformers import PreTrainedTokenizerFast

    end_of_text, *of_turns = CONTROL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=trained(texts, vocab_size, (*CONTROL_TOKENS, *of_vision)),
        eos_token=end_of_text,
        pad_token=end_of_text,
        additional_special_tokens=[*of_turns, *of_vision],
        clean_up_tokenization_spaces=False,
        chat_template=QWEN2_VL if of_vision else QWEN2,
    )


def trained(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Any:
    """A tokenizers.Tokenizer: byte-level BPE, the special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=list(special),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe
