"""Where a run's first weights come from: what those checkpoints decide about its settings, and their tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import getitem
from typing import Any

from nemo_vlm.config import LanguageConfig, RunConfig
from nemo_vlm.config.data import RATES
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.grown import grown
from nemo_vlm.formats.reader import Reader, chosen
from nemo_vlm.models.base import family, starts
from nemo_vlm.sources import adapters
from nemo_vlm.sources.megatron import EMBEDDINGS, HEAD
from nemo_vlm.sources.opening import located, open_source
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import as_float, model_tree, plain, read

# Settings of how a model is trained. All others beside them are its architecture and what it sees of images and videos,
# which its weights decide.
TRAINING = {
    "encoder_seq_length",
    "max_visual_tokens",
    "make_vocab_size_divisible_by",
    "init_method_std",
    "moe_aux_loss_coeff",
    "freeze",
    "lr_ratio",
    "vision_encoder_lr_ratio",
    "freeze_mm_mlp_adapter",
    "mm_mlp_adapter_lr_ratio",
    "from_pretrained",
    "pretrain_mm_mlp_adapter",
    "llm",
}
EXPERTS = {"num_moe_experts", "moe_ffn_hidden_size"}  # null says that there are none; of others, that nothing is known


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

    def take_views(self, values: Mapping[str, Any]) -> None:
        """Settings of the data about images and videos, where neither the user nor a preset says anything.

        Args:
            values: those that differ from the family's defaults.
        """
        data = self.tree["data"]
        said = {key for key in data if data[key] is not None or f"model.data.{key}" in self.given}
        for key, value in values.items():
            instead = ("num_frames",) if key in RATES else RATES if key == "num_frames" else ()
            if not said & {key, *instead}:
                self.changed.append(f"model.data.{key}={value}")
                data[key] = value

    def drop_experts(self) -> None:
        """The preset's auxiliary loss goes with its experts, where a checkpoint has none."""
        key, off = "moe_aux_loss_coeff", LanguageConfig.moe_aux_loss_coeff
        if self.tree["num_moe_experts"] is None and f"model.{key}" not in self.given and self.tree[key] != off:
            self.changed.append(f"model.{key}={off} (not {self.tree[key]})")
            self.tree[key] = off

    def _take(self, tree: dict[str, Any], values: dict[str, Any], source: Source, path: str) -> None:
        for name, value in values.items():
            key = f"{path}.{name}"
            if name in TRAINING or value is None and name not in EXPERTS:
                continue
            if isinstance(value, dict) and isinstance(tree[name], dict):
                self._take(tree[name], value, source, key)
            elif not same(tree[name], value):
                if key in self.given:
                    raise ConfigError(f"{key}={tree[name]}: {source} has {value}")
                if tree[name] is not None:
                    self.changed.append(f"{key}={value} (not {tree[name]})")
                tree[name] = value


def same(given: Any, value: Any) -> bool:
    """YAML reads 1e-5 as a text."""
    return given == value or isinstance(value, float) and as_float(given) == value


def settle(tree: Mapping[str, Any], given: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The branch `model` with the architecture, and the tokenizer, of the checkpoints that it names.

    It is not read into dataclasses before: what a preset says need not go together with what the user gives, where a
    checkpoint decides both.

    Args:
        given: keys that the user has set by hand.
    Returns:
        the branch, and what the checkpoints have decided otherwise than the presets.
    Raises:
        ConfigError: a checkpoint contradicts what was set by hand, or holds no such part.
    """
    taken, named = Taken(deepcopy(dict(tree)), given), starts(tree)
    views: dict[str, Any] = {}
    for key, module, path in named:
        source = open_source(path, key)
        taken.take(architecture(source, module, str(tree["family"]), key), source)
        if module in (None, "vision_model"):
            views = views_of(source)
        by_hand = {"model.tokenizer.type", "model.tokenizer.model"} & set(given)
        if source.tokenizer and module in (None, "language_model") and not by_hand:
            taken.tree["tokenizer"]["type"] = source.tokenizer
    taken.take_views(views)
    if tree["num_moe_experts"] is not None:
        taken.drop_experts()
    for key, module, path in named:
        if module == "vision_projection":
            check_projector(open_source(path, key), taken.tree, key)
    if adapter := adapters.named(tree):
        source = adapters.first_adapter(adapter)
        taken.take({"peft": adapters.shape_of(source)}, source)
    return taken.tree, taken.changed


def views_of(source: Source) -> dict[str, Any]:
    """What a checkpoint knows of how images and videos are seen, as far as that is not its family's default."""
    known, data = source.model.media_settings, source.settings["data"]
    found = {key: getattr(data, key) for key in known.keys() - TRAINING}
    return {key: value for key, value in sorted(found.items()) if value not in (None, known[key])}


def check_projector(source: Source, tree: Mapping[str, Any], key: str) -> None:
    """Raises ConfigError where its first or last layer has another width than the tower or the language model."""
    layer = re.compile(r"vision_projection\.(merger\.)?\d+\.weight")
    weights = sorted(name for name in source.reader.names() if layer.fullmatch(name))
    config = family(str(tree["family"]), "config").Config
    mm_cfg = read(config, {"mm_cfg": tree["mm_cfg"]}, "model").mm_cfg  # parts that do not fit make no whole yet
    inner, outer = mm_cfg.projector_input_size, tree["hidden_size"]
    shapes = [source.reader.shape(name) for name in weights]
    if shapes and (shapes[-1][0], shapes[0][1]) != (outer, inner):
        raise ConfigError(
            f"{key}={source}: leads from width {shapes[0][1]} to {shapes[-1][0]}, this model's from {inner} to {outer}"
        )


def without_absent(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The branch `model` without the checkpoints that are not here, for a plan; and a line about each."""
    kept, notes = deepcopy(dict(tree)), []
    adapter = adapters.named(tree)
    named = [(key, path) for key, _, path in starts(tree)]
    for key, path in named + ([(adapters.KEY, adapter)] if adapter else []):
        if located(path) is None:
            *groups, name = key.split(".")[1:]
            reduce(getitem, groups, kept)[name] = None
            notes.append(f"{key}={path}: not here; planned from the preset")
    return kept, notes


def with_tokenizer(run: RunConfig, tokenizer: Any) -> tuple[RunConfig, str | None]:
    """The run with what its tokenizer decides about the model, and what there is to say about that.

    The vocabulary of a language model that a checkpoint brings grows to the tokenizer's, whose new tokens begin as the
    mean of the old ones (see formats.grown).
    """
    model, note, size = run.model, None, len(tokenizer)
    brought = any(module in (None, "language_model") for _, module, _ in starts(model_tree(run)))
    if brought and model.vocab_size is not None and model.vocab_size < size:
        note = f"the tokenizer has {size} tokens, the checkpoint {model.vocab_size}: the others are added"
        model = replace(model, vocab_size=size)
    return replace(run, model=family(run.family, "processor").settle(model, tokenizer)), note


def architecture(source: Source, module: str | None, family: str, key: str) -> dict[str, Any]:
    """What a checkpoint knows of a model's architecture, or of one module's.

    Raises:
        ConfigError: it is of another family, or has no such module.
    """
    if module is not None and module not in source.parts:
        raise ConfigError(f"{key}={source}: holds no {module}, but {', '.join(sorted(source.parts))}")
    if module is None and "num_layers" not in source.tree:
        raise ConfigError(f"{key}={source}: holds no whole model, but {', '.join(sorted(source.parts))}")
    if module != "language_model" and source.family != family:
        what = module or "model"
        raise ConfigError(f"{key}={source}: holds a {what} of the family {source.family}, this run's is {family}")
    known = plain(source.model)
    if module == "language_model":
        return {f.name: known[f.name] for f in fields(LanguageConfig)}
    if module == "vision_model":
        tower = known["mm_cfg"]["vision_encoder"]
        return {"mm_cfg": {"vision_encoder": {k: v for k, v in tower.items() if k != "vision_select_layer"}}}
    if module == "vision_projection":
        return {"mm_cfg": {key: known["mm_cfg"][key] for key in known["mm_cfg"].keys() & {"mm_mlp_adapter_type"}}}
    return known


def owners(named: Iterable[tuple[str, str | None, str]]) -> dict[str, Source]:
    """The checkpoint that brings each top-level module; of two that hold it, the later.

    Args:
        named: as models.base.starts gives them.
    """
    found: dict[str, Source] = {}
    for key, module, path in named:
        source = open_source(path, key)
        found |= dict.fromkeys(sorted(source.parts) if module is None else [module], source)
    return found


def first_weights(run: RunConfig) -> dict[str, Reader]:
    """The tensors that checkpoints bring, for each top-level module that they have; the others are drawn."""
    brought = owners(starts(model_tree(run)))
    found: dict[str, Reader] = {name: chosen(source.reader, [f"{name}."]) for name, source in brought.items()}
    if (language := found.get("language_model")) and run.model.vocab_size is not None:
        found["language_model"] = grown(language, (EMBEDDINGS, HEAD), run.model.vocab_size)
    return found
