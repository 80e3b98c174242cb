"""Checkpoints as Hugging Face's directories, made once each and kept in a cache folder.

CACHE/exports/KEY      a directory; the key is a digest of what the checkpoint holds, wherever it lies
CACHE/digests/STAMP    the digest of the tensors in files that have not been touched since: gigabytes are read once
CACHE/lock             held by the one process that reads or exports, while others wait
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_vlm.conversion.convert import Target, to_huggingface
from nemo_vlm.conversion.jobs import of_huggingface
from nemo_vlm.conversion.stream import Cast, Meter
from nemo_vlm.conversion.verify import check_tensors
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import remove_left, stamp, written_whole
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

log = logging.getLogger(__name__)

VERSION = 1  # counts up when the conversion makes something else of the same checkpoint


@dataclass(frozen=True)
class Cache:
    """The folder that exports are kept in."""

    home: Path

    @property
    def exports(self) -> Path:
        return self.home / "exports"

    @property
    def digests(self) -> Path:
        return self.home / "digests"


def huggingface(model: str, key: str, cache: Path | None = None) -> Path:
    """A model's directory in Hugging Face's layout; of another format, an export in the cache.

    Several processes may ask at the same time.

    Args:
        model: what open_source takes.
        key: the setting or flag that named it, for messages.
        cache: None: $NEMO_VLM_CACHE, or ~/.cache/nemo_vlm.
    Raises:
        ConfigError: as open_source; it has no tokenizer, changes meanwhile, or the cache cannot be written to.
        RunError: an export does not read back as what it was made of.
    """
    source = open_source(model, key)
    if source.tokenizer is None:
        raise ConfigError(f"{key}={model}: holds no tokenizer, without which it cannot be scored")
    return source.path if of_huggingface(source.path) else within(cache, source, key, exported)


def key_of(model: str, key: str, cache: Path | None = None) -> str:
    """Tells a checkpoint from others: the key of its export, which is not made; a stamp of Hugging Face's directory.

    Args and Raises:
        as huggingface.
    """
    source = open_source(model, key)
    return stamp(source.path) if of_huggingface(source.path) else within(cache, source, key, place_of).name


def within(cache: Path | None, source: Source, key: str, find: Callable[[Source, str, Cache], Path]) -> Path:
    """Find a place in the cache.

    Raises:
        ConfigError: it cannot be written to.
    """
    kept = Cache(Path(os.path.abspath(cache or os.environ.get("NEMO_VLM_CACHE") or Path.home() / ".cache/nemo_vlm")))
    try:
        for folder in (kept.exports, kept.digests):
            folder.mkdir(parents=True, exist_ok=True)
        return find(source, key, kept)
    except OSError as error:
        where = f"{key}={source}, --cache={kept.home}"
        raise ConfigError(f"{where}: the one cannot be exported to the other ({error})") from None


def exported(source: Source, key: str, cache: Cache) -> Path:
    """The export, which is made where it is not there yet."""
    if found := made_before(source, cache):
        return found
    with alone(cache.home / "lock", f"exports {source}"):
        if found := made_before(source, cache):  # while this process waited
            return found
        for left in cache.exports.glob(".*.partial-*"):
            remove_left(left)
        return make(source, key, cache)


def made_before(source: Source, cache: Cache) -> Path | None:
    """The export of what the source is known to hold, if there is one and nothing of it was lost."""
    memo = cache.digests / stamp(source.path)
    if not memo.is_file():
        return None
    place = cache.exports / name_of(source, memo.read_text())
    if not place.is_dir():
        return None
    try:
        open_source(place, "--cache")
    except ConfigError as error:
        log.warning("%s; it is made again", error)
        return None
    return place


def make(source: Source, key: str, cache: Cache) -> Path:
    """Read the source, and export it if nothing of the same content was.

    Raises:
        ConfigError: the source changes meanwhile.
    """
    before = stamp(source.path)
    source = open_source(source.path, key)  # what is there by now: another process may have been waited for

    def check(made: Path) -> None:
        check_tensors(source.reader, open_source(made, key).reader, None)
        check_unchanged(source, key, before)

    place = place_of(source, key, cache)
    if found := made_before(source, cache):  # of another path, with the same content
        return found
    shutil.rmtree(place, ignore_errors=True)
    to_huggingface(source, Target(place, check=check))
    log.info("exports kept in %s: %s; none is removed by itself", cache.exports, size_of(cache.exports))
    return place


def place_of(source: Source, key: str, cache: Cache) -> Path:
    """Where its export is kept, once it is made; reads the source, where nothing is remembered of it.

    Raises:
        ConfigError: as make.
    """
    before = stamp(source.path)
    memo = cache.digests / before
    if not memo.is_file():
        digest = digest_of_tensors(source)
        check_unchanged(source, key, before)
        with written_whole(memo) as file:
            file.write(digest)
    return cache.exports / name_of(source, memo.read_text())


def check_unchanged(source: Source, key: str, before: str) -> None:
    if stamp(source.path) != before:
        raise ConfigError(f"{key}={source}: was changed while it was read; try again when nobody writes to it")


def name_of(source: Source, tensors: str) -> str:
    """The key of an export: all that it is made of.

    Args:
        tensors: their digest.
    """
    files = {name: digest_of(span.bytes()) for name, span in source.files.items()}
    return digest_of(json.dumps([VERSION, source.tree, files, tensors], default=str).encode())


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def digest_of_tensors(source: Source) -> str:
    """Of their names, shapes, dtypes and values, in whatever format they are kept."""
    specs = Cast(source.reader, None).specs(sorted(source.reader.names()))
    found, meter = hashlib.sha256(repr(specs).encode()), Meter(specs, f"{source}")
    for _, part in meter.parts(source.reader):
        found.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
    log.info("read %s", meter.report())
    return found.hexdigest()


def size_of(exports: Path) -> str:
    sizes = [file.stat().st_size for file in exports.rglob("*") if file.is_file()]
    return f"{len(list(exports.iterdir()))} ({sum(sizes) / 1e6:,.1f} MB)"


@contextlib.contextmanager
def alone(lock: Path, doing: str) -> Iterator[None]:
    """One process at a time, of one machine or, where the file system passes locks on, of several.

    Args:
        doing: what those who wait are told.
    """
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waits for %s", lock.read_text())
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, which {doing}")
        file.flush()
        yield
