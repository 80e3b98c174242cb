"""What a run says, kept in its folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

from nemo_vlm.checkpoints import make_run_folder
from nemo_vlm.config import ExpManagerConfig
from nemo_vlm.errors import explain

RANK_VARIABLES = (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"))


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
