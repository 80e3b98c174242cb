"""What this machine lacks to run a layout; asked before any rank starts."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping

import torch

from nemo_vlm.config import RunConfig, StepConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, under_slurm
from nemo_vlm.mcore import npu
from nemo_vlm.mcore.cpu import DeviceType
from nemo_vlm.mcore.layers import kernels
from nemo_vlm.options import of_transformer_engine
from nemo_vlm.parallel import rank
from nemo_vlm.planning.activations import activation_bytes, buffer_bytes
from nemo_vlm.planning.hardware import GIB
from nemo_vlm.planning.memory import Holding, heaviest

log = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later
FLASH = ("flash_attn", "flash_attn_3", "flash_attn_interface")  # packages that Transformer Engine knows


def num_gpus(accelerator: str) -> int:
    """GPUs, or NPUs, that a run may use; 0 means the CPU.

    Raises:
        ConfigError: one is asked for and there is none.
    """
    if accelerator == "npu":
        return npu.start()
    found = torch.cuda.device_count() if accelerator != "cpu" else 0
    if accelerator == "gpu" and not found:
        raise ConfigError("trainer.accelerator=gpu: this machine has no visible CUDA device; auto or cpu runs here")
    return found


def device_type(accelerator: str, gpus: int) -> DeviceType:
    """What a run computes on that was asked for `accelerator` and found so many."""
    return "npu" if accelerator == "npu" else "cuda" if gpus else "cpu"


def check_machine(run: RunConfig, layout: Layout, gpus: int, env: Mapping[str, str], trains: bool = True) -> None:
    """Stop at the door, with one line, where this machine cannot take its part of the run.

    Raises:
        ConfigError: what is lacking, all of it.
    """
    check_kernels(run.step, gpus, env)
    need, (have, where) = heaviest(run, layout, trains), memory_here(layout, gpus)
    lacking = [
        *lacking_devices(layout, gpus),
        *lacking_nodes(layout, env),
        *lacking_memory(need, have, where, trains),
    ]
    if lacking:
        raise ConfigError(f"this machine cannot run it: {'; '.join(lacking)}")
    step = need.memory.total + (in_a_step(run, layout) if trains else 0)
    if step > have and rank.first(env):
        told = "a step may need up to %.1f GiB a rank (dry_run=true says for what), %s is %.1f GiB"
        log.warning(told, step / GIB, where, have / GIB)


def check_kernels(step: StepConfig, gpus: int, env: Mapping[str, str]) -> None:
    """Raises ConfigError for the first setting that asks for what this machine does not have."""
    te = gpus and kernels(step.transformer_impl) == "transformer_engine"
    for setting in of_transformer_engine(step):
        if not te:
            what = "Transformer Engine, which is not installed" if gpus else "Transformer Engine on a CUDA device"
            raise ConfigError(f"{setting}: needs {what}; leave it out")
    if step.attention_backend == "flash" and not any(map(importlib.util.find_spec, FLASH)):
        raise ConfigError("model.attention_backend=flash: flash-attn is not installed; auto takes what there is")
    if step.fp8 and (found := torch.cuda.get_device_capability(0)) < FP8_CAPABILITY:
        raise ConfigError(
            f"model.fp8=true: this GPU has compute capability {'.'.join(map(str, found))}, 8-bit floats need "
            f"{'.'.join(map(str, FP8_CAPABILITY))}; take trainer.precision=bf16 alone"
        )
    launched = "LOCAL_RANK" in env or under_slurm(env)  # where not, the supervisor says so (supervisor.queues)
    if step.ub_tp_comm_overlap and (env.get("CUDA_DEVICE_MAX_CONNECTIONS") or ("" if launched else "1")) != "1":
        raise ConfigError(
            "model.ub_tp_comm_overlap=true: needs CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment, which keeps "
            "communication in front of the products that it overlaps"
        )


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


def memory_here(layout: Layout, gpus: int) -> tuple[int, str]:
    """Bytes that a rank may have, and of what."""
    if gpus:
        return torch.cuda.get_device_properties(0).total_memory, "its GPU"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // layout.ranks_per_node, "its share of this CPU's memory"


def lacking_memory(need: Holding, have: int, where: str, trains: bool) -> list[str]:
    if need.memory.total <= have:
        return []
    return [
        f"a rank needs {need.memory.total / GIB:.1f} GiB for "
        f"{'weights, gradients and optimizer state' if trains else 'the weights'} of "
        f"{need.num_parameters / 1e9:.2f} B parameters, {where} is {have / GIB:.1f} GiB"
    ]


def in_a_step(run: RunConfig, layout: Layout) -> int:
    """Bytes that the rank with most activations needs for them where every row is as long as it may be."""
    stages = (activation_bytes(run, layout, stage) for stage in range(layout.pipeline))
    return buffer_bytes(run, layout) + max(sum(parts.values()) for parts in stages)
