"""Accelerators by name: what their data sheets promise, and what of it products and networks reach.

One table for the plan's times, its limits of memory and the peak that MFU is taken against.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vlm.errors import ConfigError

GIB = 1024**3
NETWORK = 50e9  # bytes a second and direction of a GPU's share of 400 Gb/s adapters, one a GPU: an assumption


@dataclass(frozen=True)
class Hardware:
    """One accelerator of a node of eight.

    Attributes:
        bf16_tflops, fp8_tflops: dense peaks; without 8-bit products the second is None.
        memory: bytes that a process sees.
        hbm: bytes a second of its memory.
        link: bytes a second and direction between the accelerators of a node (NVLink, HCCS).
        network: the same to other nodes.
        products: share of the peak that large products with weights reach, in bf16 and in 8 bits.
        attention: share of the bf16 peak that attention's products reach; also those of an expert's few tokens.
    """

    name: str
    bf16_tflops: float
    fp8_tflops: float | None
    memory: float
    hbm: float
    link: float
    network: float = NETWORK
    products: tuple[float, float] = (0.67, 0.6)
    attention: float = 0.45


# The vendors' data sheets of the SXM modules (HGX boards); Ascend: Atlas 800T A2 (910B2).
HARDWARE = {
    one.name: one
    for one in (
        Hardware("h100", 989.4, 1978.9, 79.1 * GIB, 3.35e12, 450e9),
        Hardware("h200", 989.4, 1978.9, 139.8 * GIB, 4.8e12, 450e9),
        Hardware("b200", 2250.0, 4500.0, 178.3 * GIB, 7.7e12, 900e9),
        Hardware("a100", 312.0, None, 79.1 * GIB, 2.04e12, 300e9),
        Hardware("910b", 376.0, None, 61.0 * GIB, 1.6e12, 196e9, 25e9),  # 200 Gb/s RoCE each
    )
}


SLOWER = ("h100 pcie", "h100 nvl", "h200 nvl")  # than the module of that name


def named(name: str) -> Hardware:
    """Raises ConfigError for one that is not in the table."""
    if name.lower() not in HARDWARE:
        raise ConfigError(f"hardware={name}: must be one of {', '.join(HARDWARE)}")
    return HARDWARE[name.lower()]


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device as its driver calls it; None for one that is not in the table."""
    called = device_name.lower()
    if any(card in called for card in SLOWER):
        return None
    return next((one.bf16_tflops for name, one in HARDWARE.items() if name in called), None)
