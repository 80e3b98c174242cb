"""What a run says on its terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

UNHELPFUL_WARNINGS = (  # true of every run here, and of no use to its user
    ".*`LightningModule.configure_optimizers` returned `None`",
    ".*does not have many workers",
    ".*`training_step` returned `None`",
    ".*smaller than the logging interval",
    ".*isinstance.treespec, LeafSpec",
    ".*full scope is deprecated",
    ".*Falling back to local implementations",
    ".*CUDA_DEVICE_MAX_CONNECTIONS",
    ".*across ranks is zero",
    ".*attribute of a Tensor that is not a leaf",
    ".*reduce_scatter_tensor. is deprecated",
    ".*all_gather_into_tensor. is deprecated",
)


def set_up_logging() -> None:
    """Our own lines, from the first rank of each node; of the libraries' warnings the helpful ones."""
    first = (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.INFO if first else logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    for message in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message)


def quieten_lightning() -> None:
    """Only warnings; to be called after Lightning is imported, which sets its levels then."""
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def only_warnings(quiet: bool) -> Iterator[None]:
    """Say no more than warnings for a while, where what is printed is for programs."""
    ours, level = logging.getLogger("nemo_vlm"), logging.getLogger("nemo_vlm").level
    ours.setLevel(logging.WARNING if quiet else level)
    try:
        yield
    finally:
        ours.setLevel(level)
