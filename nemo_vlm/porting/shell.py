"""A command line of ours as text that a shell reads: one setting a line, everything in the quotes that it needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

PLAIN = re.compile(r"[A-Za-z0-9_./:+-]+")  # what Hydra reads as the text that it is, or as the number
WORDS = re.compile(r"null|true|false|nan|[+-]?(inf|[0-9][0-9_]*(\.[0-9_]*)?(e[+-]?[0-9]+)?|\.[0-9]+(e[+-]?[0-9]+)?)")


@dataclass(frozen=True)
class Text:
    """A value that is text whatever it looks like: a path named 7, or one with spaces."""

    value: str

    def __str__(self) -> str:
        """As Hydra wants it; its quotes take a backslash only in front of quotes and at the end."""
        if PLAIN.fullmatch(self.value) and not WORDS.fullmatch(self.value.lower()) and not self.value.endswith(":"):
            return self.value
        escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), self.value)
        return f"'{escaped}'"


@dataclass(frozen=True)
class Command:
    """A line of ours.

    Attributes:
        settings: overrides of an example, or the flags of a script, whose names begin with --.
        variables: set for the command.
        without: taken out of its environment.
    """

    script: str
    settings: tuple[tuple[str, object], ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """What stands behind the script's name, a setting an entry."""
        return [
            f"{key} {quote(raw(value))}" if key.startswith("--") else quote(f"{key}={show(value)}")
            for key, value in self.settings
        ]

    def __str__(self) -> str:
        front = ["env", *(f"-u {name}" for name in self.without)] if self.without else []
        front += [f"{name}={quote(value)}" for name, value in self.variables.items()]
        return " \\\n    ".join([" ".join([*front, "python", self.script]), *self.words])


def quote(word: str) -> str:
    """A word in the quotes that the shell needs; double ones where it has single ones, which are easier to read so."""
    return f'"{word}"' if "'" in word and not set('"$`\\!') & set(word) else shlex.quote(word)


def raw(value: object) -> str:
    """For argparse, which reads no quotes of its own."""
    return value.value if isinstance(value, Text) else str(value)


def show(value: object) -> str:
    """For Hydra."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(show, value))}]"
    return str(value)
