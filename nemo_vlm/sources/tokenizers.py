"""The tokenizer that `model.tokenizer.type` names: a directory's, a repository's in the cache, or a checkpoint's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_vlm.config import TokenizerConfig
from nemo_vlm.data.tokenizer import open_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.sources.opening import tokenizer_files
from nemo_vlm.sources.source import save_files


def load_tokenizer(config: TokenizerConfig) -> Any:
    """Open a tokenizer; nothing is downloaded.

    Raises:
        ConfigError: there is none, or it cannot report character offsets, which the label mask needs.
    """
    if config.type is None:
        raise ConfigError("model.tokenizer.type=null: give the directory of the model's tokenizer")
    if (Path(config.type) / "tokenizer.json").is_file() or not Path(config.type).exists():
        return open_tokenizer(config.type, config.type)
    with tempfile.TemporaryDirectory() as scratch:
        save_files(tokenizer_files(config.type), Path(scratch))
        return open_tokenizer(scratch, config.type)
