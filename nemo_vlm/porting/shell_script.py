"""The command that a shell script would start, from its text: variables and arithmetic are followed, nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from nemo_vlm.errors import ConfigError

ASSIGNMENT = re.compile(
    r"""^[ \t]*(?P<exported>export[ \t]+)?(?P<name>[A-Za-z_]\w*)=(?P<value>"(?:[^"\\]|\\.)*"|'[^']*'|[^\n]*)""",
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(r"^[ \t]*torchrun\b(?P<words>(?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)
REFERENCE = re.compile(
    r"\$\(\((?P<sum>(?:[^()]|\([^()]*\))*)\)\)|\$\{(?P<braced>\w+)(?::?-(?P<default>[^}]*))?\}|\$(?P<plain>\w+)"
)
SUM = re.compile(r"[\d\s()+*/%-]+")


class Script:
    """What a script sets and starts.

    Attributes:
        exported: names of the variables that its command sees.
        words: of its torchrun, without what becomes of its output.
    """

    def __init__(self, name: str, text: str, given: Mapping[str, str]) -> None:
        """
        Args:
            name: for messages.
            text: the script.
            given: variables whose values take the place of the script's own.
        Raises:
            ConfigError: no torchrun, or it takes a variable whose value is not known without running something.
        """
        text = text.replace("\r\n", "\n")
        command = COMMAND.search(text)
        if command is None:
            raise ConfigError(f"{name}: no torchrun in it; must be a script that starts a training")
        self.values: dict[str, str | ConfigError] = dict(given)
        self.exported: list[str] = []
        for found in ASSIGNMENT.finditer(text, 0, command.start()):
            if found["name"] not in given:
                self.values[found["name"]] = self.assigned(found["name"], found["value"])
            if found["exported"]:
                self.exported.append(found["name"])
        started = re.split(r"\s(?:[12&]?>|\||&)", command["words"].replace("\\\n", " "))[0]
        self.words = shlex.split(self.expand(started))

    def assigned(self, name: str, value: str) -> str | ConfigError:
        """A variable's value, or what to say where it is asked for."""
        quote = value[:1] if value[:1] in ("'", '"') else ""
        text = value[1:-1] if quote else re.sub(r"(^|[ \t])#.*|;.*", "", value).strip()
        if quote == "'":
            return text
        if re.search(r"`|\$\((?!\()", text):
            return ConfigError(f"{name}={text}: is a command, and none is run here; give --env {name}=...")
        try:
            return self.expand(text)
        except ConfigError as error:
            return error

    def expand(self, text: str) -> str:
        """References and sums by their values."""
        return REFERENCE.sub(self.value_of, text.replace("\\\n", " "))

    def value_of(self, found: re.Match[str]) -> str:
        if found["sum"] is not None:
            inside = re.sub(r"(?<![\w$])([A-Za-z_]\w*)", r"$\1", found["sum"])  # bash takes names with and without $
            return str(result(self.expand(inside), found["sum"].strip()))
        name = found["braced"] or found["plain"]
        value = self.values.get(name, found["default"])
        if isinstance(value, ConfigError):
            raise value
        if value is None:
            raise ConfigError(f"{name}: the script does not set it; give --env {name}=...")
        return value


def result(text: str, asked: str) -> int:
    """What bash's arithmetic makes of whole numbers, but for a division that leaves something."""
    if not SUM.fullmatch(text):
        raise ConfigError(f"$(({asked})): {text} must be a sum of whole numbers")
    tokens = re.findall(r"\d+|[()+*/%-]", text)
    try:
        value, rest = added(tokens)
    except ConfigError:
        raise
    except (IndexError, ValueError, ZeroDivisionError):
        rest = tokens
    if rest:
        raise ConfigError(f"$(({asked})): {text} must be a sum of whole numbers")
    return value


def added(tokens: list[str]) -> tuple[int, list[str]]:
    """The value of a sum, and the tokens behind it."""
    value, tokens = multiplied(tokens)
    while tokens and tokens[0] in "+-":
        sign, (more, tokens) = tokens[0], multiplied(tokens[1:])
        value += more if sign == "+" else -more
    return value, tokens


def multiplied(tokens: list[str]) -> tuple[int, list[str]]:
    value, tokens = single(tokens)
    while tokens and tokens[0] in "*/%":
        sign, (more, tokens) = tokens[0], single(tokens[1:])
        if sign == "/" and value % more:
            raise ConfigError(f"{value}/{more}: leaves {value % more}, which the script drops; must divide")
        value = {"*": lambda a, b: a * b, "/": lambda a, b: a // b, "%": lambda a, b: a % b}[sign](value, more)
    return value, tokens


def single(tokens: list[str]) -> tuple[int, list[str]]:
    if tokens[0] != "(":
        return int(tokens[0]), tokens[1:]
    value, rest = added(tokens[1:])
    if rest[0] != ")":
        raise ValueError(rest[0])
    return value, rest[1:]
