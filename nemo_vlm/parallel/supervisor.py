"""The process that the user started, where a run has several ranks: it starts this node's, and ends them together.

Each rank repeats the command line in a session of its own, so that it can be killed with its loader's workers, and so
that Ctrl-C reaches the supervisor alone. The first sign of a failure ends the run, with one message: the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from nemo_vlm import heartbeat
from nemo_vlm.errors import Failure, RunError, Stopped
from nemo_vlm.layout import Layout, under_slurm
from nemo_vlm.parallel.rank import ENDING, VARIABLE, Files, Report

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
POLL = 0.1  # seconds
GRACE = 2.0  # after the first failure, for the others' reports
PATIENCE = 10.0  # the same, while all that is known is that contact was lost
ANSWER = 5.0  # for a rank to say where it hangs
LOST_CONTACT = re.compile(
    r"closed by peer|reset by peer|Connection refused|Broken pipe|Socket [Tt]imeout|pair closure|connectFullMesh"
    r"|ncclRemoteError|remote process exited|ncclSystemError|Timed out waiting|recvValue failed|DistNetworkError",
)
WAITING = (  # in frames of a rank that is in a collective, or reads what one brings: those of NCCL return at once
    "torch/distributed/",
    "p2p_communication",
    "mcore/groups.py",
    "mcore/clock.py",
    "optimizer/clip_grads.py",
    "_broadcast_sigterm_tensor",
)
# What is likelier the cause comes first. SIGABRT is how libraries give up, often because a peer is gone.
KILLED, STOPPED, ERROR, ABORTED, EXITED, LOST = range(6)


@dataclass(frozen=True)
class Ending:
    """How a rank came to its end."""

    kind: int
    time: float
    failure: Failure


@dataclass(frozen=True)
class Rank:
    """A process of this node; `number` counts over all nodes."""

    number: int
    files: Files
    process: subprocess.Popen

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def beat(self) -> heartbeat.Beat:
        return heartbeat.decode(self.files.beat.read_bytes())

    def ending(self, signals: Signals) -> Ending | None:
        """None while it runs, and after a good end."""
        code, beat = self.process.poll(), self.beat
        if self.files.report.exists():
            report = Report(**json.loads(self.files.report.read_text()))
            kind = LOST if LOST_CONTACT.search(report.message) else ERROR
            where = f" ({beat})" if beat.step is not None else ""
            message = f"rank {self.number}{where}: {report.message}"
            return Ending(kind, report.time, Failure(message, report.code, report.trace))
        if not code:
            return None
        kind, message = exit_status(self.number, code, signals)
        running = "before the first step" if beat.step is None else f"step {beat.step} was running"
        return Ending(kind, time.monotonic(), Failure(f"{message} ({running})"))


class Signals:
    """While inside, takes the signals that ask a run to end; each is handed on once, a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.forwarded: set[int] = set()

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._receive) for number in ENDING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)

    def forward(self, ranks: Iterable[Rank]) -> None:
        for number in set(self.received) - self.forwarded:
            self.forwarded.add(number)
            for rank in ranks:
                rank.process.send_signal(number)

    @property
    def impatient(self) -> bool:
        return self.received.count(signal.SIGINT) > 1


def exit_status(number: int, code: int, signals: Signals) -> tuple[int, str]:
    """The kind of end, and what to say, for a rank that has left no report."""
    if code > 0:
        return EXITED, f"rank {number} ended with exit code {code}"
    name = signal.Signals(-code).name
    if -code in signals.forwarded:
        return STOPPED, f"the run was stopped by {name}"
    hint = " (Linux does so when memory runs out)" if -code == signal.SIGKILL else ""
    return (
        ABORTED if -code == signal.SIGABRT else KILLED,
        f"rank {number} was killed by {name}{hint}; the run is stopped",
    )


def needed(world_size: int, env: Mapping[str, str]) -> bool:
    """Whether this process should start the ranks: there are several, and nobody else has started them."""
    return world_size > 1 and "LOCAL_RANK" not in env and not under_slurm(env)


def supervise(layout: Layout, hang_timeout: float, env: Mapping[str, str]) -> None:
    """Start this node's ranks and wait for their end.

    Raises:
        RunError: what went wrong first; every rank is gone then.
        Stopped: a signal has ended the run in good order.
    """
    with tempfile.TemporaryDirectory(prefix="nemo_vlm_") as folder, Signals() as signals:
        ranks: list[Rank] = []
        try:
            environment = common_environment(layout, folder, env)
            for local_rank in range(layout.ranks_per_node):
                ranks.append(start(local_rank, layout.ranks_per_node, Path(folder), environment))
            failure = wait(ranks, signals, layout.num_nodes, hang_timeout)
            if failure is not None and sys.stderr.isatty():
                sys.stderr.write("\n")  # below the progress bar
        finally:
            end(ranks)
    if failure is not None:
        raise RunError(failure)
    if signals.received:
        raise Stopped


def common_environment(layout: Layout, folder: str, env: Mapping[str, str]) -> dict[str, str]:
    """What all ranks of this node are told; LOCAL_RANK, added for each, makes Lightning take them as started.

    The ranks of a single node meet on it, whatever MASTER_ADDR a script exports that was written for another machine.
    FSDP's messages would wait in a GPU's only queue, which a script may ask for.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    defaults = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"} | queues(layout)
    given = {key: value for key, value in env.items() if value or key not in defaults}
    if layout.num_nodes == 1:
        given["MASTER_ADDR"] = defaults["MASTER_ADDR"]
    if layout.fsdp is not None and given.get(QUEUES) == "1":
        del given[QUEUES]
    return defaults | given | {"WORLD_SIZE": str(layout.world_size), VARIABLE: f"{os.getpid()}:{folder}"}


def queues(layout: Layout) -> dict[str, str]:
    """One queue of a GPU keeps messages in front of the products that they run beside, which Megatron counts on."""
    return {QUEUES: "1"} if layout.fsdp is None and layout.tensor * layout.context > 1 else {}


def start(local_rank: int, ranks_per_node: int, folder: Path, env: Mapping[str, str]) -> Rank:
    number = int(env["NODE_RANK"]) * ranks_per_node + local_rank
    files = Files(folder, local_rank)
    heartbeat.create(files.beat)
    own = {"LOCAL_RANK": str(local_rank), "RANK": str(number)}
    return Rank(number, files, subprocess.Popen(command(), env={**env, **own}, start_new_session=True))


def command() -> list[str]:
    """The command line of this process, as a list; a module that was started by -m stays one."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    as_module = spec is not None and spec.origin == sys.argv[0]
    script = ["-m", spec.name] if as_module else [os.path.abspath(sys.argv[0])]
    return [sys.executable, *script, *sys.argv[1:]]


def wait(ranks: list[Rank], signals: Signals, num_nodes: int, hang_timeout: float) -> Failure | None:
    """Until all ranks have ended well (None), or one has not."""
    while True:
        signals.forward(ranks)
        if signals.impatient:
            return Failure("the run was stopped by a second SIGINT")
        if any(rank.ending(signals) for rank in ranks):
            return cause(ranks, signals, num_nodes)
        running = [rank for rank in ranks if rank.running]
        if not running:
            return None
        if time.monotonic() - latest(running) > hang_timeout and (found := culprit(running, num_nodes, hang_timeout)):
            return found
        time.sleep(POLL)


def cause(ranks: list[Rank], signals: Signals, num_nodes: int) -> Failure:
    """Why the run ends: of all endings that are known after a short while, the likeliest to have led to the others."""
    began = time.monotonic()
    while True:
        endings = [ending for rank in ranks if (ending := rank.ending(signals))]
        first = min(endings, key=lambda ending: (ending.kind, ending.time))
        waited = time.monotonic() - began
        if waited > (PATIENCE if first.kind == LOST else GRACE) or not any(rank.running for rank in ranks):
            break
        time.sleep(POLL)
    if first.kind == LOST and num_nodes > 1:
        message = f"contact to another node was lost, the run is stopped; {first.failure.message}"
        return replace(first.failure, message=message)
    return first.failure


def latest(ranks: list[Rank]) -> float:
    """When the run last moved: a rank alone may be silent for long, while another writes the archive."""
    return max(rank.beat.time for rank in ranks)


def culprit(ranks: list[Rank], num_nodes: int, hang_timeout: float) -> Failure | None:
    """Who stands still: a rank that does not answer, else one that does not wait for others, else the oldest beat.

    None where the run has moved on meanwhile.
    """
    before = latest(ranks)
    for rank in ranks:
        if rank.files.stack.exists():  # else it is not ready for the signal, which would end it
            os.truncate(rank.files.stack, 0)
            rank.process.send_signal(signal.SIGUSR2)
    time.sleep(ANSWER)
    if latest(ranks) > before:
        return None
    stacks = {rank.number: read_stack(rank.files.stack) for rank in ranks}
    guilty = min(ranks, key=lambda r: (bool(stacks[r.number]), waits_for_others(stacks[r.number]), r.beat.time))
    frames = stacks[guilty.number]
    if not frames:
        return Failure(
            f"rank {guilty.number} does not answer, and the run has stood still for {hang_timeout:g} s; "
            f"the rank was last at: {guilty.beat}"
        )
    message = f"rank {guilty.number} has {heartbeat.describe(guilty.beat, hang_timeout, frames)}"
    if waits_for_others(frames):
        place = "another node" if num_nodes > 1 else "each other"
        message = f"all ranks of this node wait for {place}; {message}"
    return Failure(message)


def read_stack(path: Path) -> list[str]:
    """The innermost frames of what faulthandler wrote."""
    text = path.read_text() if path.exists() else ""
    frames = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', text, re.MULTILINE)
    return [f"{file}:{line} {name}" for file, line, name in frames[: heartbeat.FRAMES]]


def waits_for_others(frames: list[str]) -> bool:
    """Whether a rank stands in a collective or a transfer between stages."""
    return any(place in frame for frame in frames for place in WAITING)


def end(ranks: list[Rank]) -> None:
    """Kill what is left of the ranks, their loaders' workers included."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()
