"""The product's commands, in processes forked from one that has imported the heavy modules (see conftest.py).

A forked command gets a true one's arguments, environment, folder and output, and ends with its exit code; the ranks
that it starts are processes of their own as well, forked before it has done anything. What a fork leaves out, the
interpreter's start and the imports, is most of a short run's time. `forked=False` is the command line as it is typed,
and so is one that begins with a flag of the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

LAUNCHERS = ("MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "NODE_RANK", "SLURM_", "TORCHELASTIC_", "NEMO_")
PATIENCE = 300.0  # seconds
CONTEXT = multiprocessing.get_context("forkserver")


class Command:
    """A command that runs, with the part of subprocess.Popen's interface that tests use; `ranks` are forked ahead."""

    def __init__(self, *command: str, cwd: Path, ranks: int = 4, forked: bool = True, **env: str) -> None:
        self.arguments, self.folder = command, tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)} | env
        if forked and command[0].endswith(".py"):
            self.process = CONTEXT.Process(target=become, args=(list(command), cwd, environment, ranks, self.files))
            self.process.start()
        else:
            with open(self.files[0], "w") as out, open(self.files[1], "w") as err:
                full = [sys.executable, *command]
                self.process = subprocess.Popen(full, cwd=cwd, env=environment, stdout=out, stderr=err)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self, timeout: float = PATIENCE) -> int:
        end = self.process.wait if isinstance(self.process, subprocess.Popen) else self.process.join
        end(timeout)
        if self.returncode is None:
            raise TimeoutError(" ".join(self.arguments))
        return self.returncode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read_text() if file.exists() else "" for file in self.files)
        return out, err

    def processes(self) -> list[int]:
        """All that belong to it, by where their errors go: itself, its ranks, their loaders' workers."""
        found = []
        for link in Path("/proc").glob("[0-9]*/fd/2"):
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                found += [int(link.parts[2])] * (os.readlink(link) == str(self.files[1]))
        return found

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, if it still runs, and remove what it has printed."""
        self.process.kill()
        self.wait()
        self.folder.cleanup()


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command from its start to its end; `more` is Command's."""
    started = Command(*command, **more)
    try:
        out, err = started.communicate()
        return subprocess.CompletedProcess(command, started.wait(), out, err)
    finally:
        started.end()


def become(command: list[str], cwd: Path, env: dict[str, str], ranks: int, outputs: list[Path]) -> NoReturn:
    """Make this forked process the command."""
    gc.freeze()  # a true command searches for garbage in less than what the server imported
    multiprocessing.set_start_method(None, force=True)  # a true command starts its loader's workers by the default
    os.chdir(cwd)
    take_environment(env)
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    Rank.spares = [spare() for _ in range(ranks)]
    subprocess.Popen = Rank  # type: ignore[misc]
    execute(command)


def take_environment(env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def execute(command: list[str]) -> NoReturn:
    """Run a script as the interpreter does, and end this process."""
    code: Any = 0
    sys.argv = command
    sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def spare() -> tuple[int, int]:
    """A process that waits to be told which rank it is: its number, and where it listens."""
    listens, speaks = os.pipe()
    child = os.fork()
    if child:
        os.close(listens)
        return child, speaks
    os.close(speaks)
    with open(listens) as told:
        line = told.readline()
    if not line:  # the command has ended without it
        os._exit(0)
    os.setsid()
    command, env = json.loads(line)
    take_environment(env)
    execute(command)


class Rank(subprocess.Popen):
    """What a command's supervisor starts: a spare process where one is left, else a new one."""

    spares: list[tuple[int, int]] = []

    def _execute_child(self, args: Any, *others: Any) -> None:
        if not self.spares or args[0] != sys.executable:
            return super()._execute_child(args, *others)
        self.pid, speaks = self.spares.pop(0)
        self._child_created = True
        env = dict(os.environ) if others[5] is None else others[5]
        with open(speaks, "w") as told:
            told.write(json.dumps([args[1:], env]) + "\n")
