"""Files and folders that appear whole or not at all, and survive a power cut."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL = ".{name}.partial-{writer}"  # beside the file while it is written
IDLE = 3600.0  # seconds; what another machine has not touched for so long is written no more


def partial_of(path: Path) -> Path:
    """On a disk that machines share, processes of several may have the same number."""
    return path.with_name(PARTIAL.format(name=path.name, writer=f"{socket.gethostname()}-{os.getpid()}"))


@contextmanager
def written_whole(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write, which takes its name, replacing what bore it, when all of it is on disk."""
    partial = partial_of(path)
    try:
        with open(partial, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name, that of an empty folder or of none, when all of it is on disk."""
    partial = partial_of(path)
    partial.mkdir()
    try:
        yield partial
        for entry in sorted(partial.rglob("*")):
            sync(entry)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def made_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` make a folder's content; nothing happens if it is there already. Several processes may want it."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        fill(partial)
        partial.chmod(0o755)
        os.replace(partial, folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Behind:
    """Brings a large file to the disk while more of it is made: the end need not wait for all, and memory stays free.

    A context; its file is written by `write`.
    """

    STEP = 128 * 2**20  # bytes between two flushes

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.thread = file, ThreadPoolExecutor(1)
        self.written, self.flush = 0, self.thread.submit(int)

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.thread.shutdown()
        if kind is None:
            self.flush.result()  # of its errors the system tells no later flush

    def write(self, content: memoryview, place: tuple[int, int] | None = None) -> None:
        """Write bytes.

        Args:
            place: where they stand in a file, its descriptor and their offset; the kernel then copies them.
        """
        self.file.write(content if place is None else content[self._copied(*place, len(content)) :])
        self.written += len(content)
        if self.written >= self.STEP:
            self.file.flush()
            self.flush.result()  # not faster than the disk; its errors are raised here
            self.written, self.flush = 0, self.thread.submit(os.fsync, self.file.fileno())

    def _copied(self, source: int, offset: int, count: int) -> int:
        """How many of these bytes the kernel has copied: all, but where a file system cannot."""
        self.file.flush()
        done, sent = 0, 1
        try:
            while sent and done < count:
                sent = os.sendfile(self.file.fileno(), source, offset + done, count - done)
                done += sent
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP):
                raise
        return done


def remove_partial(path: Path) -> None:
    """What killed processes left of such a file or folder; what others write, here or on another machine, stays."""
    for partial in path.parent.glob(PARTIAL.format(name=glob.escape(path.name), writer="*")):
        remove_left(partial)


def remove_left(partial: Path) -> None:
    """Remove it unless somebody else writes it."""
    host, _, process = partial.name.rpartition(".partial-")[2].rpartition("-")
    if host == socket.gethostname():
        writing = int(process) != os.getpid() and is_alive(int(process))
    else:
        writing = time.time() - max(file.stat().st_mtime for file in (partial, *partial.rglob("*"))) < IDLE
    if not writing:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def stamp(path: Path) -> str:
    """Tells a file or a folder's files, as they are now, from others: their names, sizes, times and places on disk."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(str(file), file.stat()) for file in files]
    known = repr([(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats])
    return hashlib.sha256(known.encode()).hexdigest()[:32]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def sync(path: Path) -> None:
    """A file's or folder's content to disk, so that the order of changes survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
