"""What this machine lacks to run a layout; asked before any rank starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from nemo_vlm.config import RunConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, under_slurm
from nemo_vlm.planning.memory import heaviest

GIB = 1024**3


def num_gpus(accelerator: str) -> int:
    """GPUs that a run may use; 0 means the CPU.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    found = torch.cuda.device_count() if accelerator != "cpu" else 0
    if accelerator == "gpu" and not found:
        raise ConfigError("trainer.accelerator=gpu: this machine has no visible CUDA device; auto or cpu runs here")
    return found


def check_machine(run: RunConfig, layout: Layout, gpus: int, env: Mapping[str, str], trains: bool = True) -> None:
    """Stop at the door, with one line, where this machine cannot take its part of the run.

    Raises:
        ConfigError: what is lacking, all of it.
    """
    lacking = [
        *lacking_devices(layout, gpus),
        *lacking_nodes(layout, env),
        *lacking_memory(run, layout, gpus, trains),
    ]
    if lacking:
        raise ConfigError(f"this machine cannot run it: {'; '.join(lacking)}")


def lacking_devices(layout: Layout, gpus: int) -> list[str]:
    if gpus and layout.ranks_per_node > gpus:
        return [f"{layout.ranks_per_node} ranks a node need as many GPUs, {gpus} are visible"]
    return []


def lacking_nodes(layout: Layout, env: Mapping[str, str]) -> list[str]:
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not env.get(key)]
    launched = "LOCAL_RANK" in env or under_slurm(env)  # torchrun, or a rank that the supervisor started
    if launched:
        return []
    if layout.num_nodes > 1 and missing:
        return [f"trainer.num_nodes={layout.num_nodes} needs {', '.join(missing)} in the environment"]
    lacking, limits = [], {"NODE_RANK": layout.num_nodes, "MASTER_PORT": 2**16}
    for key, limit in limits.items():
        value = env.get(key) or "0"
        if not value.isdigit() or int(value) >= limit:
            lacking.append(f"{key}={value} must be a number below {limit}")
    return lacking


def lacking_memory(run: RunConfig, layout: Layout, gpus: int, trains: bool) -> list[str]:
    need = heaviest(run, layout, trains)
    if gpus:
        have, where = torch.cuda.get_device_properties(0).total_memory, "its GPU"
    else:
        have, where = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // layout.ranks_per_node,
            "its share of this CPU's memory",
        )
    if need.memory.total <= have:
        return []
    return [
        f"a rank needs {need.memory.total / GIB:.1f} GiB for "
        f"{'weights, gradients and optimizer state' if trains else 'the weights'} of "
        f"{need.num_parameters / 1e9:.2f} B parameters, {where} is {have / GIB:.1f} GiB"
    ]
