"""A rank's side of its supervisor: it ends when the supervisor does, and leaves its errors and its beats to it.

Where no supervisor has started this process (one rank, torchrun, Slurm), all of this does nothing, and a thread
watches for a hang instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_vlm import heartbeat
from nemo_vlm.errors import Failure, explain
from nemo_vlm.files import written_whole

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # ask a run to finish its step, save and end
VARIABLE = "NEMO_VLM_SUPERVISOR"  # pid:folder
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Files:
    """What a rank and its supervisor share."""

    folder: Path
    local_rank: int

    @property
    def beat(self) -> Path:
        return self.folder / f"{self.local_rank}.beat"

    @property
    def stack(self) -> Path:
        return self.folder / f"{self.local_rank}.stack"

    @property
    def report(self) -> Path:
        return self.folder / f"{self.local_rank}.json"


@dataclass(frozen=True)
class Report:
    """The error that ended a rank; `time` is time.monotonic()."""

    time: float
    message: str
    code: int
    trace: str


_files: Files | None = None


def attach(env: MutableMapping[str, str]) -> None:
    """Bind this process to the supervisor that started it, if one did."""
    global _files
    told = env.pop(VARIABLE, None)  # not for what this rank starts
    if told is None:
        return
    pid, _, folder = told.partition(":")
    end_with(int(pid))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training takes it over: end without a traceback
    _files = Files(Path(folder), int(env["LOCAL_RANK"]))
    heartbeat.record_to(_files.beat)
    # Answered by C code, so also where the main thread is stuck in a library that holds the interpreter's lock.
    faulthandler.register(signal.SIGUSR2, file=open(_files.stack, "a"), all_threads=False)  # noqa: SIM115


def end_with(parent: int) -> None:
    """Let this process be killed when its parent is gone, however that came to its end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=poll_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it went before we asked
        os._exit(1)


def poll_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def supervised() -> bool:
    return _files is not None


def first(env: Mapping[str, str]) -> bool:
    """Whether this process speaks for the whole run: the one that the user started, or the first of a launcher's."""
    numbers = [env.get(name) or "0" for name in ("RANK", "SLURM_PROCID", "NODE_RANK")]
    return not supervised() and numbers == ["0"] * len(numbers)


def fail(error: BaseException, world_size: int) -> None:
    """End one of several ranks at once: tearing down would wait for ranks that may be gone."""
    if supervised() or world_size > 1:
        leave(explain(error))


def leave(failure: Failure) -> None:
    """End this process at once, with its last words: a report where it is supervised, else a line on stderr."""
    if _files is None:
        sys.stderr.write(f"{prefix()}{failure.message}\n")
    else:
        report = Report(time.monotonic(), failure.message, failure.code, failure.trace)
        with contextlib.suppress(OSError), written_whole(_files.report) as file:  # a full disk: the exit code is left
            json.dump(asdict(report), file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure.code)


def prefix() -> str:
    """Which rank speaks, where torchrun or Slurm has started several."""
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    return f"rank {number}: " if number else ""


def watched(timeout: float) -> contextlib.AbstractContextManager[None]:
    """End this process when it hangs; a supervisor does that for its ranks."""
    if _files is not None:
        return contextlib.nullcontext()
    return heartbeat.watch(timeout, lambda found: leave(Failure(f"the run {found}")))
