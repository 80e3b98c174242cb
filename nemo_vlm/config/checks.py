"""What the settings' dataclasses check and derive with."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

from nemo_vlm.errors import ConfigError


def demand(condition: bool, key: str, value: Any, right: str) -> None:
    """Raise the one-line error for a value that is out of range."""
    if not condition:
        raise ConfigError(f"{key}={value}: must be {right}")


def demand_name(key: str, name: str) -> None:
    """Raise the one-line error for what is no plain name of a file or folder: it would lead elsewhere."""
    plain = name not in ("", ".", "..") and not {"/", "\0"} & set(name)
    demand(plain, key, name, "the plain name of a file or folder, without /")


def show(value: Any) -> str:
    """A value as the user wrote it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def only(value: Any, instead: str) -> Any:
    """The field of a setting that can have no other value here; `instead` says what to do for what another would."""
    return field(default=value, metadata={"instead": instead})


def refuse_others(config: Any, path: str) -> None:
    """Raise the one-line error for a field made by `only` that has another value."""
    for f in fields(config):
        value = getattr(config, f.name)
        if "instead" in f.metadata and value != f.default:
            raise ConfigError(f"{path}.{f.name}={show(value)}: {f.metadata['instead']}")


def seconds(key: str, duration: str | None) -> float | None:
    """NeMo's DD:HH:MM:SS as seconds.

    Raises:
        ConfigError: it has another form.
    """
    if duration is None:
        return None
    fields = duration.split(":")
    if len(fields) != 4 or not all(field.isdigit() for field in fields):
        raise ConfigError(f"{key}={duration}: must be DD:HH:MM:SS, days to seconds, as 00:03:55:00")
    days, hours, minutes, rest = map(int, fields)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    demand(total > 0, key, duration, "longer than nothing")
    return float(total)


def fill(config: Any, **values: Any) -> None:
    """Set those fields of a frozen dataclass that are None: values that follow from the others."""
    for name, value in values.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)
