"""The settings that an archive carries: its source's, completed by the defaults and by what the user gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nemo_vlm.errors import ConfigError
from nemo_vlm.models.base import family
from nemo_vlm.sources.source import Source
from nemo_vlm.sources.starting import Taken, architecture
from nemo_vlm.typed import defaults


def archive_tree(source: Source) -> dict[str, Any]:
    """The branch `model` with every key."""
    return merged(defaults(family(source.family, "config").Config), source.tree)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings one over the other, group by group."""
    groups = [key for key in base.keys() & over.keys() if isinstance(base[key], dict) and isinstance(over[key], dict)]
    return base | over | {key: merged(base[key], over[key]) for key in groups}


def with_settings(source: Source, settings: dict[str, Any], called: str) -> Source:
    """The source with settings of the user's.

    Raises:
        ConfigError: one is unknown, of the wrong type, or contradicts the weights.
    """
    made = replace(source, tree=merged(source.tree, settings))
    try:
        made.settings  # noqa: B018
        known = architecture(source, None, source.family, called)
        Taken(merged(archive_tree(source), settings), set(leaves(settings, "model"))).take(known, source)
    except ConfigError as error:
        raise ConfigError(f"{called}: {error}") from None
    return made


def leaves(tree: dict[str, Any], path: str) -> Iterator[str]:
    """The keys of all values."""
    for name, value in tree.items():
        key = f"{path}.{name}"
        yield from leaves(value, key) if isinstance(value, dict) else [key]


def read_hparams(path: Path) -> dict[str, Any]:
    """The branch `model` of a YAML, or all of it where it has no such branch.

    Raises:
        ConfigError: there is none, or it is not plain YAML.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--hparams_file={path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--hparams_file={path}: not plain YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--hparams_file={path}: holds no settings")
    return tree["model"] if isinstance(tree.get("model"), dict) else tree
