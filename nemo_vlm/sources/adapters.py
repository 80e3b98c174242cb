"""The adapter that a run with LoRA starts from, and the frozen base beside which it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.config import RunConfig
from nemo_vlm.config.peft import trains
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.base import starts
from nemo_vlm.sources.opening import open_adapter
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import model_tree, plain

KEY = "model.peft.restore_from_path"
SHAPE = ("variant", "target_modules", "adapter_dim", "alpha")  # settings that an adapter's tensors go with


def named(tree: Mapping[str, Any]) -> str | None:
    """What the branch `model` gives as model.peft.restore_from_path."""
    peft = tree.get("peft")
    return peft.get("restore_from_path") if isinstance(peft, Mapping) else None


def first_adapter(path: str) -> Source:
    """What model.peft.restore_from_path names."""
    return open_adapter(path, KEY)


def shape_of(source: Source) -> dict[str, dict]:
    """What an adapter decides about the branch `model.peft` of the run that starts from it."""
    known = plain(source.settings["peft"].lora_tuning)
    return {"lora_tuning": {key: known[key] for key in SHAPE}}


def check_base(run: RunConfig) -> None:
    """Raises ConfigError where adapters would be trained beside frozen weights that nothing but a seed brings."""
    if run.peft.lora is None:
        return
    parts = {"language_model", *run.model.parts}
    brought = [parts if module is None else {module} for _, module, _ in starts(model_tree(run))]
    frozen = {part for part in parts if not trains(f"{part}.", run.model)}
    if missing := sorted(frozen.difference(*brought)):
        raise ConfigError(
            f"model.peft.peft_scheme=lora: adapters train beside frozen weights, and nothing brings those of "
            f"{' and '.join(missing)}; give model.restore_from_path"
        )
