"""What is found out about a data file in one pass over it, kept as .npy beside it, or in the user's cache folder.

An array is made once, by one process of a machine while the others wait, appears whole, and is mapped by all: ranks and
workers share its memory. Its name tells which version of the file it is about, and goes with that version.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy

from nemo_vlm.files import written_whole

log = logging.getLogger(__name__)


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
        log.info("%s: one pass over it for its %s, which is kept", path, kind)
        store(path, version, make())
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


def store(path: Path, version: str, array: numpy.ndarray) -> None:
    """Write it where that is allowed; what is about an older version of the file goes."""
    refused: OSError | None = None
    for home in homes(path):
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(Path(f"{home}{prefix(path)}-{version}"), "wb") as file:
                numpy.save(file, array)
        except OSError as error:
            refused = error
            continue
        for old in glob.glob(f"{glob.escape(str(home))}*-*-*.npy"):
            if not old.startswith(f"{home}{prefix(path)}-"):
                os.unlink(old)
        return
    assert refused is not None
    raise refused


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; where the file system knows no locks, several do the same work and write the same."""
    with open(path, "rb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
