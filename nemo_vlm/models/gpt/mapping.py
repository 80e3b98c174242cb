"""Weights as in Hugging Face's LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM and Qwen3MoeForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.mapping import Rule, Variant
from nemo_vlm.models.gpt.config import Config
from nemo_vlm.models.hf_decoder import CLASSES, decoder_config, decoder_fields
from nemo_vlm.models.rules import decoder_rules, single_experts

HF_TYPES = tuple(CLASSES)  # model_type in config.json
VISION_TYPES = ()
HF_VARIANTS: dict[str, str] = {}
MEGATRON_VARIANTS = {"megatron": Variant({"language_model.": ""}, pads=True)}  # in Megatron-Core's GPTModel


def rules(config: Config) -> list[Rule]:
    return decoder_rules(config, "language_model.", "model.", "lm_head.weight", single_experts)


def hf_config(config: Config) -> dict[str, Any]:
    return decoder_config(config)


def from_hf(hf: Mapping[str, Any], names: set[str], path: str) -> Config:
    """The config of an HF class whose defaults are filled in; see llava's for the arguments."""
    return Config(**decoder_fields(hf, path))
