"""Where a run's first weights come from: what those checkpoints decide about its settings, and their tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nemo_vlm.config import LanguageConfig, RunConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Reader, chosen
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import plain, read

RESTORE = "model.restore_from_path"
# Settings of how a model is trained. All others beside them are its architecture, which its weights decide.
TRAINING = {
    "encoder_seq_length",
    "make_vocab_size_divisible_by",
    "init_method_std",
    "freeze",
    "lr_ratio",
    "vision_encoder_lr_ratio",
    "freeze_mm_mlp_adapter",
    "mm_mlp_adapter_lr_ratio",
    "from_pretrained",
}


@dataclass
class Taken:
    """Settings while checkpoints decide about them.

    Attributes:
        given: keys that the user has set by hand, which may not contradict.
        changed: what a checkpoint has decided otherwise than the presets.
    """

    tree: dict[str, Any]
    given: Collection[str]
    changed: list[str] = field(default_factory=list)

    def take(self, values: dict[str, Any], source: Source) -> None:
        self._take(self.tree, values, source, "model")

    def _take(self, tree: dict[str, Any], values: dict[str, Any], source: Source, path: str) -> None:
        for name, value in values.items():
            key = f"{path}.{name}"
            if isinstance(value, dict):
                self._take(tree[name], value, source, key)
            elif name not in TRAINING and value is not None and tree[name] != value:
                if key in self.given:
                    raise ConfigError(f"{key}={tree[name]}: {source} has {value}")
                if tree[name] is not None:
                    self.changed.append(f"{key}={value} (not {tree[name]})")
                tree[name] = value


def settle(run: RunConfig, given: Collection[str]) -> tuple[RunConfig, list[str]]:
    """The run with the architecture, and the tokenizer, of the checkpoints that it starts from.

    Args:
        given: keys that the user has set by hand.
    Returns:
        the run, and what the checkpoints have decided otherwise than the presets.
    Raises:
        ConfigError: a checkpoint contradicts what was set by hand, or holds no such part.
    """
    taken, tokenizer = Taken(plain(run.model), given), run.tokenizer
    for key, module, source in sources(run):
        taken.take(architecture(source, module, run.family, key), source)
        if source.tokenizer and module in (None, "language_model") and "model.tokenizer.type" not in given:
            tokenizer = replace(tokenizer, type=source.tokenizer)
    model = read(type(run.model), taken.tree, "model")
    return replace(run, model=model, tokenizer=tokenizer), taken.changed


def sources(run: RunConfig) -> list[tuple[str, str | None, Source]]:
    """The checkpoints that a run starts from: the key that names it, the module it is for (None: all), the source.

    What is restored comes last, over the parts that were given for themselves, as in NeMo.
    """
    found: list[tuple[str, str | None, Source]] = []
    for module, (key, path) in run.model.pretrained.items():
        if path is not None:
            found.append((key, module, open_source(path, key)))
    if run.start.restore_from_path is not None:
        found.append((RESTORE, None, open_source(run.start.restore_from_path, RESTORE)))
    return found


def architecture(source: Source, module: str | None, family: str, key: str) -> dict[str, Any]:
    """What a checkpoint knows of a model's architecture, or of one module's.

    Raises:
        ConfigError: it is of another family, or has no such module.
    """
    if module is not None and module not in source.parts:
        raise ConfigError(f"{key}={source}: holds no {module}, but {', '.join(sorted(source.parts))}")
    if module is None and "num_layers" not in source.tree:
        raise ConfigError(f"{key}={source}: holds no whole model, but {', '.join(sorted(source.parts))}")
    if module is None and source.family != family:
        raise ConfigError(f"{key}={source}: holds a model of the family {source.family}, this run's is {family}")
    known = plain(source.model)
    if module == "language_model":
        return {f.name: known[f.name] for f in fields(LanguageConfig)}
    if module == "vision_model":
        tower = known["mm_cfg"]["vision_encoder"]
        return {"mm_cfg": {"vision_encoder": {k: v for k, v in tower.items() if k != "vision_select_layer"}}}
    return known


def first_weights(run: RunConfig) -> dict[str, Reader]:
    """The tensors that checkpoints bring, for each top-level module that they have; the others are drawn."""
    found: dict[str, Reader] = {}
    for _, module, source in sources(run):
        for name in sorted(source.parts) if module is None else [module]:
            found[name] = chosen(source.reader, [f"{name}."])
    return found
