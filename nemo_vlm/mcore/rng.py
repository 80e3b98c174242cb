"""The state of every random number generator of a rank, as one tensor."""

from __future__ import annotations

import io
import random

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import convert_cuda_rng_state

from nemo_vlm.mcore.weights import Part


def rng_part(rank: int) -> Part:
    """This rank's generators: Python's, torch's, CUDA's, and those of Megatron's tensor parallelism."""
    buffer = io.BytesIO()
    states = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": {key: convert_cuda_rng_state(state) for key, state in get_cuda_rng_tracker().get_states().items()},
    }
    torch.save(states, buffer)
    data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    return Part(name(rank), tuple(data.shape), (slice(0, len(data)),), data)


def empty_part(rank: int, shape: tuple[int, ...]) -> Part:
    """To be filled from a checkpoint."""
    return Part(name(rank), shape, (slice(0, shape[0]),), torch.empty(shape, dtype=torch.uint8))


def restore_rng(part: Part) -> None:
    states = torch.load(io.BytesIO(part.data.numpy().tobytes()), weights_only=True)
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tracker, for_graphs = get_cuda_rng_tracker(), get_cuda_rng_tracker().use_cudagraphable_rng
    tracker.set_states({key: convert_cuda_rng_state(state, for_graphs) for key, state in states["tracker"].items()})


def name(rank: int) -> str:
    return f"rng.rank_{rank:05d}"
