"""Copies in the host's memory of what a checkpoint holds, taken while the next step already runs.

Nothing of it changes before that step's update, which waits for the copy (Engine.reader): saving holds training up only
where copying takes longer than the forward and the backward pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nemo_vlm.mcore import cpu
from nemo_vlm.mcore.weights import Bounds, Part


class Staging:
    """Room for one checkpoint of this rank, kept to the run's end for the next ones; pinned where there is a GPU."""

    def __init__(self) -> None:
        self.room: dict[tuple[str, Bounds], Tensor] = {}

    def copy(self, parts: list[Part], ready: torch.cuda.Event | None) -> list[Part]:
        """The parts as they are at `ready`; to be called in a thread beside the training.

        Args:
            ready: of the stream that computes; None on a CPU.
        """
        if ready is None:
            return [self._copy(part) for part in parts]
        stream = torch.cuda.Stream()
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            copies = [self._copy(part) for part in parts]
        stream.synchronize()
        return copies

    def _copy(self, part: Part) -> Part:
        key, data = (part.name, part.bounds), part.data
        room = self.room.get(key)
        if room is None or room.shape != data.shape:  # the state of random number generators has no fixed length
            room = torch.empty(data.shape, dtype=data.dtype, pin_memory=torch.cuda.is_available())
            self.room[key] = room
        room.copy_(data, non_blocking=True)
        return replace(part, data=room)


def prepare_thread(device: torch.device) -> None:
    """A new thread would use the first GPU, whatever its rank's, and as many cores as the training."""
    torch.set_num_threads(1)
    if device != cpu.CPU:
        torch.cuda.set_device(device.index)


def now() -> torch.cuda.Event | None:
    """When the kernels that are queued are done; None on a CPU, where they are."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
