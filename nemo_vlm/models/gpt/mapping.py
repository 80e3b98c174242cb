"""Weights as in Hugging Face's LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from nemo_vlm.mapping import Rule
from nemo_vlm.models.gpt.config import Config
from nemo_vlm.models.rules import decoder_rules, llama_config


def rules(config: Config) -> list[Rule]:
    return decoder_rules(config, "language_model.", "model.", "lm_head.weight")


def hf_config(config: Config) -> dict[str, Any]:
    return llama_config(config)
