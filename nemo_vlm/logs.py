"""What a run says on its terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping

from nemo_vlm.checkpoints import make_run_folder
from nemo_vlm.config import ExpManagerConfig
from nemo_vlm.errors import explain

RANK_VARIABLES = (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"))
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
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.INFO if first else logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    for message in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message)


@contextlib.contextmanager
def kept(config: ExpManagerConfig, env: Mapping[str, str]) -> Iterator[None]:
    """Keep what the first rank of each node says in its run's folder, beside the terminal.

    Raises:
        ConfigError: the folder cannot be made.
    """
    number, local = (int(env.get(name) or env.get(slurm) or "0") for name, slurm in RANK_VARIABLES)
    if local or (number and config.log_global_rank_0_only):
        yield
        return
    name = f"nemo_log_globalrank-{number}_localrank-{local}.txt"
    file = logging.FileHandler(make_run_folder(config) / name)
    file.setFormatter(logging.Formatter("[%(asctime)s %(levelname)s] %(message)s"))
    logging.getLogger().addHandler(file)
    try:
        yield
    except Exception as error:
        file.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": explain(error).message}))
        raise
    finally:
        logging.getLogger().removeHandler(file)
        file.close()


def quieten_lightning() -> None:
    """Only warnings; to be called after Lightning is imported, which sets its levels then."""
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
