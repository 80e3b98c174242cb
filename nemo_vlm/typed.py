"""Plain mappings to frozen dataclasses: every key known, every value of the declared type, or a one-line error."""

from __future__ import annotations

import contextlib
import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nemo_vlm.config import (
    MODEL_BRANCHES,
    MODEL_SECTIONS,
    ExpManagerConfig,
    NemoConfig,
    RunConfig,
    SamplesConfig,
    TrainerConfig,
)
from nemo_vlm.config.checks import show
from nemo_vlm.errors import ConfigError

T = TypeVar("T")
MAX_LISTED = 30  # keys in a message


def read_run(tree: Mapping[str, Any], model_class: type) -> RunConfig:
    """The composed tree (`trainer`, `exp_manager`, `model`) as a RunConfig.

    Args:
        tree: plain containers, `samples` where there are some, as OmegaConf.to_container gives them.
        model_class: the family's architecture dataclass.
    Raises:
        ConfigError: an unknown key, a wrong type or a value that is not among the choices.
    """
    check_keys(tree, {"trainer", "exp_manager", "model", "samples"}, "")
    trainer = read(TrainerConfig, tree["trainer"], "trainer")
    check_repeated(tree["model"], tree["trainer"].get("precision"))
    return RunConfig(
        trainer=trainer,
        exp_manager=read(ExpManagerConfig, tree["exp_manager"], "exp_manager"),
        samples=read(SamplesConfig, tree.get("samples", {}), "samples"),
        **read_model(tree["model"], model_class),
    )


def check_repeated(model: Mapping[str, Any], precision: Any) -> None:
    """NeMo's own settings in the branch `model` that say what others say, too: of these, `trainer.precision`."""
    if model.get("cpu_offloading") is True and model.get("cpu_offloading_weights") is True:
        raise ConfigError("model.cpu_offloading_weights=true: weights stay on the GPU; give false, or leave it out")
    if (given := model.get("precision")) is not None and str(given) != str(precision):
        raise ConfigError(f"model.precision={given}: trainer.precision={precision}; give that alone")
    if model.get("moe_router_load_balancing_type") == "none" and model.get("moe_aux_loss_coeff"):
        raise ConfigError("model.moe_router_load_balancing_type=none: give model.moe_aux_loss_coeff=0 with it")


def read_model(tree: Mapping[str, Any], model_class: type) -> dict[str, Any]:
    """The branch `model` as RunConfig's fields: family, model, the other flat sections, the nested branches.

    NeMo's own settings are checked only: what passes changes nothing.
    """
    flat = {"model": model_class, **MODEL_SECTIONS}
    names = {section: {f.name for f in fields(cls)} for section, cls in flat.items()}
    theirs = {f.name for f in fields(NemoConfig)}
    check_keys(tree, {"family"}.union(MODEL_BRANCHES, theirs, *names.values()), "model")
    read(NemoConfig, pick(tree, theirs), "model")
    parts: dict[str, Any] = {section: read(cls, pick(tree, names[section]), "model") for section, cls in flat.items()}
    branches: dict[str, Any] = {
        branch: read(cls, tree.get(branch, {}), f"model.{branch}") for branch, cls in MODEL_BRANCHES.items()
    }
    return {"family": tree["family"], **parts, **branches}


def model_tree(run: RunConfig) -> dict[str, Any]:
    """The branch `model` of a run as plain containers: read_model's inverse."""
    tree: dict[str, Any] = {"family": run.family}
    for section in ("model", *MODEL_SECTIONS):
        tree |= plain(getattr(run, section))
    return tree | {branch: plain(getattr(run, branch)) for branch in MODEL_BRANCHES}


def defaults(model_class: type) -> dict[str, Any]:
    """The branch `model` with every default of a family, as plain containers."""
    flat = [plain_defaults(section) for section in (model_class, *MODEL_SECTIONS.values(), NemoConfig)]
    branches = {branch: plain_defaults(cls) for branch, cls in MODEL_BRANCHES.items()}
    return {key: value for section in flat for key, value in section.items()} | branches


def plain_defaults(section: type) -> dict[str, Any]:
    """A dataclass's declared defaults, before __post_init__ derives others from them."""
    out = {}
    for f in fields(section):
        value: Any = f.default_factory() if callable(f.default_factory) else f.default
        if is_dataclass(value):
            value = plain_defaults(type(value)) if f.default_factory is type(value) else plain(value)
        out[f.name] = value
    return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}


def plain(value: Any) -> Any:
    """Dataclasses and tuples as plain containers, fit for YAML or JSON."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def read(section: type[T], tree: Mapping[str, Any], path: str) -> T:
    """One dataclass from a mapping; `path` is the key that leads to it, for messages."""
    hints = get_type_hints(section)
    check_keys(tree, set(hints), path)
    own = {key: merged(value, tree[key]) for key, value in own_defaults(section).items() if key in tree}
    given = {**tree, **own}
    return section(**{key: convert(value, hints[key], f"{path}.{key}".lstrip(".")) for key, value in given.items()})


def own_defaults(section: Any) -> dict[str, Any]:
    """Branches of a dataclass whose default is not that of their own class."""
    factories = {f.name: f.default_factory for f in fields(section) if callable(f.default_factory)}
    made = {name: factory() for name, factory in factories.items() if factory not in (list, dict)}
    return {name: plain(value) for name, value in made.items() if factories[name] is not type(value)}


def merged(defaults: Any, given: Any) -> Any:
    """What is given of a branch over its defaults; what is no branch stays as it is given."""
    if not isinstance(defaults, Mapping) or not isinstance(given, Mapping):
        return given
    return {**defaults, **{key: merged(defaults.get(key), value) for key, value in given.items()}}


def pick(tree: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key in names}


def check_keys(tree: Any, known: set[str], path: str) -> None:
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{path}={tree!r}: a group of settings is expected here, with the keys {', '.join(sorted(known))}"
        )
    for key in tree:
        if key not in known:
            raise ConfigError(unknown_key(f"{path}.{key}".lstrip("."), known))


def unknown_key(path: str, known: set[str]) -> str:
    """The message for a key that does not exist, with the nearest that does."""
    key = path.rpartition(".")[2]
    nearest = difflib.get_close_matches(key, sorted(known), 1, cutoff=0.5)
    if nearest:
        return f"{path}: unknown key '{key}'; did you mean '{nearest[0]}'?"
    listed = ", ".join(sorted(known)) if len(known) <= MAX_LISTED else "--cfg job shows them all"
    return f"{path}: unknown key '{key}'; known: {listed}"


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the declared type. YAML's 1e-3 (text) and whole floats count as numbers; a bool never does."""
    if is_dataclass(hint):
        return read(hint, value, path)  # type: ignore[arg-type]
    if get_origin(hint) in (Union, types.UnionType):
        return convert_union(value, get_args(hint), path)
    if get_origin(hint) is tuple:
        return convert_tuple(value, get_args(hint), path)
    if get_origin(hint) is Literal:
        return convert_choice(value, get_args(hint), path)
    if hint is type(None) and value is None:
        return None
    if hint is float:
        number = as_float(value)
        if number is not None and not math.isnan(number):
            return number
    elif type(value) is hint:
        return value
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    raise ConfigError(f"{path}={show(value)}: must be {name(hint)}")


def convert_union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    for option in sorted(options, key=lambda option: type(value) is not option):  # 1.0 is not 1 where both may stand
        with contextlib.suppress(ConfigError):
            return convert(value, option, path)
    raise ConfigError(f"{path}={show(value)}: must be {' or '.join(name(option) for option in options)}")


def convert_tuple(value: Any, items: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if isinstance(value, list | tuple):
        if items[-1] is Ellipsis:
            return tuple(convert(item, items[0], f"{path}[{i}]") for i, item in enumerate(value))
        if len(items) == len(value):
            return tuple(
                convert(item, hint, f"{path}[{i}]") for i, (item, hint) in enumerate(zip(value, items, strict=True))
            )
    count = "" if items[-1] is Ellipsis else f"{len(items)} "
    raise ConfigError(f"{path}={show(value)}: must be a list of {count}values, each {name(items[0])}")


def convert_choice(value: Any, choices: tuple[str, ...], path: str) -> str:
    text = str(value) if isinstance(value, str) or type(value) is int else None  # YAML reads precision: 32 as a number
    if text in choices:
        return text
    raise ConfigError(f"{path}={show(value)}: must be one of {', '.join(choices)}")


def as_float(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) else None


def name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list" if get_args(hint)[-1] is Ellipsis else f"a list of {len(get_args(hint))} values"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return names.get(hint, str(hint))
