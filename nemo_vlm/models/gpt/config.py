"""A language model alone."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vlm.config import LanguageConfig

STARTS: dict[str, str | None] = {"restore_from_path": None}


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Llama, Qwen2.5, Qwen3: the language model's settings are all there is."""
