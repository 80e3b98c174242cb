"""Ascend NPUs as Lightning sees devices; untested on hardware, see mcore.npu."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.accelerators import Accelerator
from typing_extensions import override


class NpuAccelerator(Accelerator):
    """One NPU for each rank; mcore.npu has started torch_npu when it is made."""

    @override
    def setup_device(self, device: torch.device) -> None:
        torch.npu.set_device(device)

    @override
    def teardown(self) -> None:
        torch.npu.empty_cache()

    @staticmethod
    @override
    def parse_devices(devices: int) -> list[int]:
        return list(range(devices))

    @staticmethod
    @override
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("npu", number) for number in devices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        return torch.npu.device_count()

    @staticmethod
    @override
    def is_available() -> bool:
        return bool(NpuAccelerator.auto_device_count())

    @staticmethod
    @override
    def name() -> str:
        return "npu"

    @override
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return torch.npu.memory_stats(device)
