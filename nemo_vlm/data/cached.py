"""What is found out about a data file in one pass over it, kept as .npy beside it, or in the user's cache folder.

An array is made once, by one process of a machine while the others wait, appears whole, and is mapped by all: ranks and
workers share its memory. Its name tells which version of the file it is about, and it goes with that version, or when
one of its kind is made for other settings.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy

from nemo_vlm.files import written_whole

log = logging.getLogger(__name__)

NAME = re.compile(r"(?P<version>[0-9a-f]{12})-(?P<kind>[a-z_]+)-[0-9a-f]{12}\.npy")  # behind the name's beginning


def cached(path: Path, kind: str, settings: str, make: Callable[[], numpy.ndarray]) -> numpy.ndarray:
    """A non-empty array about a file, mapped from disk.

    Args:
        kind: what the array is, for its name.
        settings: all that it depends on beside the file.
        make: called where there is none.
    """
    version = f"{kind}-{digest(settings)}.npy"
    with contextlib.suppress(FileNotFoundError):
        return opened(path, version)
    with alone(path):
        with contextlib.suppress(FileNotFoundError):
            return opened(path, version)
        log.info("%s: one pass over it, to keep its %s", path, kind.replace("_", " "))
        store(path, kind, settings, make())
        return opened(path, version)


def homes(path: Path) -> Iterator[Path]:
    """Beginnings of the names of the arrays about a file, the best place first."""
    yield path.parent / f".{path.name}."
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nemo_vlm")
    yield cache / f"{digest(os.path.abspath(path))}."


def prefix(path: Path) -> str:
    """Tells this version of the file from others."""
    stat = path.stat()
    return digest(f"{stat.st_size} {stat.st_mtime_ns}")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def opened(path: Path, version: str) -> numpy.ndarray:
    """Raises:
    FileNotFoundError: it was not made yet.
    """
    for home in homes(path):
        with contextlib.suppress(OSError):
            return numpy.load(f"{home}{prefix(path)}-{version}", mmap_mode="r")
    raise FileNotFoundError(path)


def store(path: Path, kind: str, settings: str, array: numpy.ndarray) -> None:
    """Write it where that is allowed; what is about an older version of the file, or of its kind, goes."""
    refused: OSError | None = None
    for home in homes(path):
        new = Path(f"{home}{prefix(path)}-{kind}-{digest(settings)}.npy")
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(new, "wb") as file:
                numpy.save(file, array)
        except OSError as error:
            refused = error
            continue
        for old, match in stored(home):
            if old != new and (match["version"] != prefix(path) or match["kind"] == kind):
                old.unlink(missing_ok=True)
        return
    assert refused is not None
    raise refused


def stored(home: Path) -> list[tuple[Path, re.Match[str]]]:
    """The arrays whose names begin so, with what the rest of their names says."""
    found = []
    for path in home.parent.iterdir():
        if path.name.startswith(home.name) and (match := NAME.fullmatch(path.name.removeprefix(home.name))):
            found.append((path, match))
    return found


def of_kind(path: Path, kind: str) -> list[Path]:
    """The arrays of a kind about a file."""
    homes_there = [home for home in homes(path) if home.parent.is_dir()]
    return [array for home in homes_there for array, match in stored(home) if match["kind"] == kind]


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; where the file system knows no locks, several do the same work and write the same."""
    with open(path, "rb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
