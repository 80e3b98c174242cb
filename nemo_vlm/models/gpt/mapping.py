"""Weights as in Hugging Face's LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.mapping import Rule
from nemo_vlm.models.gpt.config import Config
from nemo_vlm.models.rules import decoder_rules, llama_config, llama_fields

HF_TYPES = ("llama",)  # model_type in config.json
VISION_TYPES = ()
HF_VARIANTS: dict[str, str] = {}
MEGATRON_VARIANTS = {"language_model.": ""}  # our names' beginnings, and what they are in Megatron-Core's GPTModel


def rules(config: Config) -> list[Rule]:
    return decoder_rules(config, "language_model.", "model.", "lm_head.weight")


def hf_config(config: Config) -> dict[str, Any]:
    return llama_config(config)


def from_hf(hf: Mapping[str, Any], names: set[str], path: str) -> Config:
    """The config of an HF LlamaConfig whose defaults are filled in; see llava's for the arguments."""
    return Config(**llama_fields(hf, path))
