"""The tokenizer that `model.tokenizer.type` names: a directory's, a repository's in the cache, or a checkpoint's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_vlm.config import TokenizerConfig
from nemo_vlm.data.tokenizer import open_with
from nemo_vlm.errors import ConfigError
from nemo_vlm.sources.opening import tokenizer_files
from nemo_vlm.sources.source import save_files


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
