"""Run a function on several gloo ranks of this machine, as every distributed test does."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# Ranks are forked from a server that has imported the heavy modules once; it holds no threads and no groups.
multiprocessing.set_forkserver_preload(["nemo_vlm.mcore.engine", "nemo_vlm.mcore.vit", "transformers", "pytest"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo group, each with one thread.

    Returns:
        what each rank returned, in order of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, _free_port(), function, args, folder)
        mp.start_processes(_rank, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=2))
    try:
        torch.save(function(*args), Path(folder) / str(rank))
    except Exception:
        traceback.print_exc()
        raise
    finally:
        torch.distributed.destroy_process_group()
