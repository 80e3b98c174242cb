"""Runs for benchmarks that start no example: read from recipes and presets, without data or tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_vlm import layout as layouts
from nemo_vlm import options
from nemo_vlm.config import RunConfig
from nemo_vlm.door import CONF, store_defaults
from nemo_vlm.models.base import family
from nemo_vlm.typed import read_run

VOCABULARY = 152064  # where neither preset nor tokenizer tells one


def settled(recipe: str, settings: str) -> RunConfig:
    """The run as the product reads it, checked by its rules; the vocabulary's last token stands for what is seen."""
    store_defaults()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree: Any = OmegaConf.to_container(compose(recipe, settings.split()), resolve=True)
    kind = family(tree["model"]["family"], "config").Config
    run = read_run({key: tree[key] for key in ("trainer", "exp_manager", "model")}, kind)
    layouts.check(run)
    options.check(run)
    size = run.model.vocab_size or VOCABULARY
    model: Any = replace(run.model, vocab_size=size)
    if model.media is not None:
        keys = ("image_token_index", "video_token_index")
        ids = {key: size - 1 for key in keys if hasattr(model.media, key)}
        model = replace(model, mm_cfg=replace(model.media, **ids))
    return replace(run, model=model)
