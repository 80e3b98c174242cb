"""What stands on the command line, before Hydra reads it."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection

FREE_TEXT = ("prompt", "model.data.splits_string")  # settings whose value may be any text


def quoted(argument: str) -> str:
    """An override whose value is any text, in the quotes without which Hydra reads its own grammar into it."""
    key, equals, text = argument.partition("=")
    if key not in FREE_TEXT or not equals or text[:1] in ("'", '"'):
        return argument
    text = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return f'{key}="{text}"'


def beside(argument: str, keys: Collection[str]) -> str:
    """An override of a key that no recipe has, in the form in which Hydra takes it."""
    return f"++{argument}" if argument.partition("=")[0] in keys else argument


def given_keys() -> set[str]:
    """The settings on the command line."""
    return {argument.lstrip("+").partition("=")[0] for argument in sys.argv[1:] if is_override(argument)}


def is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))
