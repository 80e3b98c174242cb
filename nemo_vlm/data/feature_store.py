"""What a frozen vision tower has made of images and videos, kept on disk: HOME/VERSION/AB/CONTENT.safetensors.

VERSION is a digest of the tower's weights and of how it is shown images, CONTENT one of a file's bytes, whatever it is
called and wherever it lies. A file appears whole: ranks, workers and machines may read and write the same at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nemo_vlm.config import DataConfig
from nemo_vlm.data.media import Frames, Source, opened
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import remove_left, written_whole

log = logging.getLogger(__name__)

MOST_WAITING = 32  # files that are still to be written


def home_of(data: DataConfig) -> Path:
    """HOME; by default beside what else is kept of checkpoints."""
    default = Path(os.environ.get("NEMO_VLM_CACHE") or Path.home() / ".cache/nemo_vlm", "vision")
    return Path(data.vision_cache_dir or default)


def make_home(data: DataConfig) -> None:
    """Where features are to be kept.

    Raises:
        ConfigError: it cannot be made, or not be written to.
    """
    if not data.cache_vision_features:
        return
    home = home_of(data)
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise ConfigError(f"model.data.vision_cache_dir={home}: cannot be written to ({error.strerror})") from None


def content(media: Source | Frames, kind: str) -> str:
    """A digest of an image's or a video's bytes, 32 hexadecimal digits.

    Args:
        kind: image or video.
    Raises:
        SampleError: there is no such file.
    """
    found = hashlib.blake2b(kind.encode(), digest_size=16)
    if isinstance(media, Frames):
        found.update(repr((media.fps, [content(frame, kind) for frame in media.files])).encode())
        return found.hexdigest()
    with opened(media, kind) as file:
        while part := file.read(2**22):
            found.update(part)
    return found.hexdigest()


class FeatureStore:
    """The features of one tower.

    Args:
        folder: HOME/VERSION.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> tuple[Tensor, Tensor] | None:
        """Features [patches, width] and grids [views, 3]; None where there are none, or not whole ones."""
        try:
            found = load_file(self.path(key))
            return found["features"], found["grids"]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            log.warning("%s: not readable (%s); it is made again", self.path(key), error)
            return None

    def write(self, key: str, features: Tensor, grids: Tensor) -> int:
        """Its bytes."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, "wb") as file:
            return file.write(save({"features": features.contiguous(), "grids": grids.contiguous()}))

    def remove_left(self) -> None:
        """What killed processes left of files; what others write stays."""
        for left in self.folder.glob("??/.*.partial-*"):
            with contextlib.suppress(FileNotFoundError):  # it has just become whole
                remove_left(left)


class Writer:
    """Writes into a store while training goes on, and no further ahead of the disk than memory allows.

    A disk that is full, or may not be written to, ends the writing and not the run.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.thread = store, ThreadPoolExecutor(1)
        self.waiting: deque[Future[int]] = deque()
        self.bytes, self.failed = 0, False

    def write(self, key: str, features: Tensor, grids: Tensor) -> None:
        if not self.failed:
            self.waiting.append(self.thread.submit(self.store.write, key, features, grids))
            self.wait(MOST_WAITING)

    def wait(self, most: int = 0) -> None:
        """Until no more than so many files are left to be written."""
        while len(self.waiting) > most:
            try:
                self.bytes += self.waiting.popleft().result()
            except OSError as error:
                if not self.failed:
                    log.warning(
                        "model.data.cache_vision_features: no more is kept in %s (%s)", self.store.folder, error
                    )
                self.failed = True


def version_of(tensors: Iterable[tuple[str, Tensor]], about: Any) -> str:
    """A digest of a tower's weights and of what else its features depend on, 32 hexadecimal digits.

    Args:
        about: whose repr tells it.
    """
    found = hashlib.sha256(repr(about).encode())
    for name, tensor in tensors:
        found.update(repr((name, tensor.shape, tensor.dtype)).encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
