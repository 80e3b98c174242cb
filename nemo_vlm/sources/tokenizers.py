"""The tokenizer that `model.tokenizer.type` names: a directory's, a repository's in the cache, or a checkpoint's.

With a checkpoint's come the chat template and the tokens that end its answers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_vlm.config import TokenizerConfig
from nemo_vlm.data.tokenizer import open_with
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.chat import chat_template, ends_of_answers
from nemo_vlm.sources.chat_templates import take_processors
from nemo_vlm.sources.opening import tokenizer_files
from nemo_vlm.sources.source import Source, save_files

GENERATION = "generation_config.json"  # Hugging Face's defaults of generation, of which the EOS count here


def load_tokenizer(config: TokenizerConfig) -> Any:
    """Open a tokenizer; nothing is downloaded.

    Raises:
        ConfigError: there is none.
    """
    if config.place is None:
        raise ConfigError("model.tokenizer.type=null: give the directory of the model's tokenizer")
    if config.type is None or (Path(config.type) / "tokenizer.json").is_file() or not Path(config.type).exists():
        return open_with(config, config.type)
    with tempfile.TemporaryDirectory() as scratch:
        return open_with(config, save_files(tokenizer_files(config.type), Path(scratch)))


def tokenizer_of(source: Source) -> Any:
    """Where it has no chat template: with that of the processor, or of the run that trained the model."""
    if source.tokenizer is None:
        raise ConfigError(f"{source}: holds no tokenizer")
    tokenizer = load_tokenizer(TokenizerConfig(source.tokenizer))
    take_processors(tokenizer, source)
    if tokenizer.chat_template is None and "conv_template" in source.tree.get("data", {}):
        tokenizer.chat_template = chat_template(source.model, source.settings["data"], with_bos=True)
    return tokenizer


def stop_ids(source: Source, tokenizer: Any) -> set[int]:
    """The EOS of the checkpoint's generation_config.json, as transformers' generate, else of tokenizer and template."""
    eos = source.read_json(GENERATION).get("eos_token_id") if GENERATION in source.files else None
    found = eos if isinstance(eos, list) else [eos]
    given = {token for token in found if token is not None}
    return given or {tokenizer.eos_token_id, *ends_of_answers(source.model, source.settings["data"], tokenizer)}
