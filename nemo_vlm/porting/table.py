"""What a foreign command line consists of, as data: its arguments in their order, and the variables that it reads.

An argument is a name, a check and a rule. The rule yields what takes its place here: settings, and notes for stderr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class Note:
    """What the user should know of the translation."""

    text: str


@dataclass(frozen=True)
class Size:
    """A model size: the name of its file in conf/model, its decoder layers, and the experts of a layer."""

    model: str
    layers: int
    experts: int = 0


GROUPS = ("model", "data")
Item = tuple[str, object] | Note  # ("model.seed", 1), or ("--input", "a") for a script that takes flags
Check = Callable[[str, str], None]  # of an argument's name and value


@dataclass(frozen=True)
class Values:
    """What was typed, by the original's names; a variable that is not set, or an argument left out, is empty.

    Attributes:
        tokenizer: --tokenizer of our script.
        folder: what paths are relative to.
    """

    texts: Mapping[str, str]
    sizes: Mapping[str, Size]
    tokenizer: str = ""
    folder: str = ""

    def __getitem__(self, name: str) -> str:
        return self.texts[name]

    def __contains__(self, name: str) -> bool:
        return name in self.texts

    def number(self, name: str) -> int:
        return int(self.texts[name])

    def true(self, name: str) -> bool:
        return self.texts[name] == "true"

    @property
    def size(self) -> Size:
        return self.sizes[self.texts["MODEL_SIZE"]]


Rule = Callable[[Values, str], Iterable[Item]]  # of all values and the argument's own name


def nothing(values: Values, name: str) -> Iterator[Item]:
    """The rule of an argument that other rules use."""
    yield from ()


def in_order(items: Iterable[Item]) -> tuple[tuple[str, object], ...]:
    """The settings of a command, groups first, over which the others count."""
    settings = [item for item in items if not isinstance(item, Note)]
    return tuple(sorted(settings, key=lambda item: GROUPS.index(item[0]) if item[0] in GROUPS else len(GROUPS)))


@dataclass(frozen=True)
class Argument:
    """A positional argument, or a variable of the environment.

    Attributes:
        here: what replaces it, for --help and the documentation.
        unheeded: what is done with the values that the original passes over in silence, for the documentation.
        default: of a variable that is not set.
    """

    name: str
    here: str
    check: Check
    rule: Rule = nothing
    unheeded: str = ""
    default: str = ""


@dataclass(frozen=True)
class Workflow:
    """A script of the other system.

    Attributes:
        name: how it is called here.
        script: what it is called there.
        optional: how many of the last arguments may be left out.
        command: the script of ours that does the same, by the values.
        fixed: what it always sets.
    """

    name: str
    script: str
    arguments: tuple[Argument, ...]
    variables: tuple[Argument, ...]
    sizes: Mapping[str, Size]
    command: Callable[[Values], str]
    fixed: tuple[Item, ...] = ()
    optional: int = 0

    @property
    def names(self) -> list[str]:
        return [argument.name for argument in self.arguments]


def to(key: str) -> Rule:
    """The rule of an argument whose value stays as it is."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        yield key, values[name]

    return rule


def whole(least: int) -> Check:
    def check(name: str, value: str) -> None:
        if not (value.isascii() and value.isdecimal() and int(value) >= least):
            raise ConfigError(f"{name}={value}: must be a whole number from {least} on")

    return check


def rate(name: str, value: str) -> None:
    try:
        right = math.isfinite(float(value)) and float(value) >= 0
    except ValueError:
        right = False
    if not right:
        raise ConfigError(f"{name}={value}: must be a number, 0 or more")


def one_of(*choices: str) -> Check:
    def check(name: str, value: str) -> None:
        if value not in choices:
            raise ConfigError(f"{name}={value}: must be {' or '.join([', '.join(choices[:-1]), choices[-1]])}")

    return check


def text(name: str, value: str) -> None:
    if not value.strip():
        raise ConfigError(f"{name}={value}: must not be empty")
    if "${" in value:
        raise ConfigError(f"{name}={value}: the settings would read ${{ as a reference; must be a path without it")


truth = one_of("true", "false")


def unless_empty(check: Check) -> Check:
    """The check of a variable, which need not be set."""

    def checked(name: str, value: str) -> None:
        if value:
            check(name, value)

    return checked
