"""Megatron-Core on Ascend NPUs, through torch_npu; nothing here has run on such a machine.

torch_npu is imported by `start` alone, which trainer.accelerator=npu calls in every process of a run. Its own shim
(torch_npu.contrib.transfer_to_npu) then takes torch.cuda.*, device="cuda" and NCCL for itself; what Megatron-Core needs
beyond it stands here, as found in MindSpeed's patches. No file of Megatron or torch_npu is edited.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_vlm.errors import ConfigError

_started: list[bool] = []  # holds something once this process computes on NPUs


def started() -> bool:
    return bool(_started)


def start() -> int:
    """Let this process compute on NPUs; idempotent.

    Returns:
        how many there are.
    Raises:
        ConfigError: torch_npu or what it stands on is not installed, or sees no NPU.
    """
    try:
        import torch_npu  # noqa: F401  it registers torch.npu
        from torch_npu.contrib import transfer_to_npu  # noqa: F401
    except (ImportError, OSError) as error:
        told = " ".join(str(error).split())
        advice = "it goes with Ascend's CANN; auto or cpu runs here"
        raise ConfigError(f"trainer.accelerator=npu: torch_npu cannot be imported ({told}); {advice}") from None
    npu: Any = torch.npu
    if not (count := npu.device_count()):
        raise ConfigError("trainer.accelerator=npu: this machine has no visible NPU; auto or cpu runs here")
    if not started():
        redirect(npu)
        _started.append(True)
    return count


def redirect(npu: Any) -> None:
    """What the shim leaves of CUDA in Megatron: type names that its optimizer compares, and the RNG tracker's state."""
    from megatron.core.tensor_parallel import random

    original = torch.Tensor.type

    def type_as_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(tensor, *args, **kwargs)
        return found.replace("torch.npu.", "torch.cuda.") if isinstance(found, str) else found

    torch.Tensor.type = type_as_cuda  # type: ignore[assignment, method-assign]
    random._get_cuda_rng_state = lambda *args, **kwargs: npu.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: npu.set_rng_state(state)
