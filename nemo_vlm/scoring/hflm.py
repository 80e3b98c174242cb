"""lm-eval's model of Hugging Face, whose processes share the questions wherever they run."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM


class Shared(HFLM):
    """On several nodes and on CPUs, too: lm-eval itself shares among the GPUs of one node (HFLM.__init__)."""

    @classmethod
    def of(cls, path: Path, dtype: str, batch_size: int) -> Any:
        """The model of a directory, on a GPU where there is one."""
        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate leaves several processes strangers
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = cls(pretrained=str(path), dtype=dtype, device=device, batch_size=batch_size)
        if model.is_one_of_several:
            atexit.register(model.accelerator.end_training)  # NCCL warns of groups that nobody ended
        return model

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index) if self.is_one_of_several else 0

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes) if self.is_one_of_several else 1

    @property
    def is_one_of_several(self) -> bool:
        """Whether a launcher started more than one process; lm-eval keeps the accelerator only then."""
        return hasattr(self, "accelerator")
