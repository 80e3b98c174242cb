"""The time of a run's start as the version in its folder's name, the same on every rank."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from nemo_vlm.config import ExpManagerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout
from nemo_vlm.parallel import supervisor

VARIABLE = "NEMO_EXPM_VERSION"  # as NeMo's


def dated(config: ExpManagerConfig, layout: Layout, env: Mapping[str, str]) -> ExpManagerConfig:
    """exp_manager.version by exp_manager.use_datetime_version, unless the run's folder is settled without.

    Raises:
        ConfigError: ranks would be started by others, each at its own time.
    """
    settled = config.version is not None or config.explicit_log_dir is not None or config.resume_if_exists
    if not config.use_datetime_version or settled:
        return config
    alone = layout.world_size == 1 or (layout.num_nodes == 1 and supervisor.needed(layout.world_size, env))
    if VARIABLE not in env and not alone:
        raise ConfigError(
            "exp_manager.use_datetime_version=true: the ranks start at different times; "
            f"export {VARIABLE}=$(date +%F_%H-%M-%S), the same on every node"
        )
    return replace(config, version=env[VARIABLE] if VARIABLE in env else time.strftime("%Y-%m-%d_%H-%M-%S"))


def told(config: ExpManagerConfig, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of ranks, which are to have the same version."""
    return {**env, VARIABLE: str(config.version)} if config.use_datetime_version and config.version else dict(env)
