"""Lines of flags, and scripts with constants: what is known of them is a table, whatever their order."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.table import Argument, Check, Item, Note, Rule, Values, nothing, one_of
from nemo_vlm.porting.table import unless_empty as maybe

switch = one_of("true", "false")  # of a flag: it has no value, and is there or is not


@dataclass(frozen=True)
class Converter:
    """One of theirs.

    Attributes:
        name: its script, or mm-convert's words.
        arguments: constants of the script, or flags.
        names: whose names its files have, where it writes Megatron's; empty: it does not.
        script: of ours.
    """

    name: str
    arguments: tuple[Argument, ...]
    names: str = ""
    script: str = "scripts/convert_megatron.py"


def given(name: str, here: str, check: Check, rule: Rule = nothing, unheeded: str = "", default: str = "") -> Argument:
    """One that need not be there."""
    return Argument(name, here, maybe(check), rule, unheeded, default)


def taken(arguments: Sequence[Argument], words: Sequence[str]) -> dict[str, str]:
    """The values of flags, with the defaults of those that are not there."""
    known, found, rest = {argument.name: argument for argument in arguments}, {}, list(words)
    while rest:
        name, joined, value = rest.pop(0).partition("=")
        argument = known.get(name) or unknown(name, known, "the script's command")
        if argument.check is switch:
            found[name] = "true"
        elif joined or rest:
            found[name] = value if joined else rest.pop(0)
        else:
            raise ConfigError(f"{name}: has no value")
    return {name: found.get(name, argument.default) for name, argument in known.items()}


def unknown(name: str, known: Mapping[str, Argument], where: str) -> Argument:
    close = difflib.get_close_matches(name, known, 1)
    raise ConfigError(f"{name}: not known in {where}" + (f"; did you mean {close[0]}?" if close else ""))


def looked_up(arguments: Sequence[Argument], file: str, found: Mapping[str, str]) -> dict[str, str]:
    """The values of a JSON's keys, with the defaults of those that are not there."""
    known = {argument.name: argument for argument in arguments}
    for name, value in found.items():
        if name not in known and value:
            unknown(name, known, file)
    return {name: found.get(name) or argument.default for name, argument in known.items()}


def converted(converter: Converter, name: str, values: Values) -> tuple[tuple[tuple[str, object], ...], list[str]]:
    """The flags of ours for values that are checked one by one, and what the user should know.

    Raises:
        ConfigError: a value that has nothing here, or none that says what is to be converted, and to what.
    """
    items: list[Item] = []
    for argument in converter.arguments:
        argument.check(argument.name, values[argument.name])
        items += argument.rule(values, argument.name) if values[argument.name] else ()
    settings = tuple(item for item in items if not isinstance(item, Note))
    for flag in ("--input", "--output"):
        if not any(found == flag for found, _ in settings):
            sources = " or ".join(one.name for one in converter.arguments if flag in one.here)
            raise ConfigError(f"{name}: does not say {sources}")
    return settings, [item.text for item in items if isinstance(item, Note)]
