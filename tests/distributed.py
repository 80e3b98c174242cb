"""Run a function on several ranks of this machine, as every distributed test does."""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh group, each with one thread.

    Returns:
        what each rank returned, in order of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, function, args, folder)
        mp.start_processes(_rank, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, function: Callable[..., Any], args: tuple, folder: str) -> None:
    gc.freeze()  # what the server imported is not searched for garbage again
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    meet = (Path(folder) / "ranks").as_uri()  # a port that was free may be another test's by now
    backend = "nccl" if world_size == 1 and torch.cuda.is_available() else "gloo"  # which sums no CUDA tensors
    torch.distributed.init_process_group(backend, meet, timedelta(minutes=2), world_size, rank)
    try:
        torch.save(function(*args), Path(folder) / str(rank))
        torch.distributed.barrier()  # a rank that leaves early breaks the groups that others are still making
    except Exception:
        traceback.print_exc()
        raise
    # Their groups end with the ranks: destroy_process_group() waits for the threads of each, which costs more time than
    # most tests compute.
