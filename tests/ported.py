"""A printed line of ours as what a shell and Hydra make of it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_vlm import layout as layouts
from nemo_vlm import options
from nemo_vlm.config import RunConfig
from nemo_vlm.door import CONF, store_defaults
from nemo_vlm.models.base import family
from nemo_vlm.porting.shell import Command
from nemo_vlm.training import schedules
from nemo_vlm.typed import read_run


def words_of(command: Command) -> list[str]:
    """As a shell splits the printed text."""
    shown = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True).stdout
    return shown.split("\0")[:-1]


def run_of(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The settings that a run of these overrides has, with all that is checked before it starts."""
    store_defaults()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree: Any = OmegaConf.to_container(compose(recipe, list(overrides)), resolve=True)
    kind = family(tree["model"]["family"], "config").Config
    run = read_run({key: tree[key] for key in ("trainer", "exp_manager", "model")}, kind)
    layouts.check(run)
    options.check(run)
    return schedules.settle_length(run, {word.partition("=")[0] for word in overrides})
