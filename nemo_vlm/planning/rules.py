"""What of a plan goes against a rule of thumb: it runs, but slower or less surely than another would."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_vlm.layout import Layout
from nemo_vlm.planning.communication import Case
from nemo_vlm.planning.hardware import GIB

RESERVE = 0.08  # of the memory: the driver's context, communication's buffers, fragments
LONGEST_BUBBLE = 0.2


def broken(case: Case, most: float, bubble: float) -> list[str]:
    """One line each.

    Args:
        most: bytes of the rank that holds most.
        bubble: share of the pipeline's time in which a rank waits.
    """
    return [*of_memory(case, most), *of_nodes(case.layout), *of_pipeline(case, bubble), *of_products(case)]


def of_memory(case: Case, most: float) -> Iterator[str]:
    name, have = case.hardware.name, case.hardware.memory
    if most > have:
        yield f"memory: a rank needs {most / GIB:.1f} GiB, {name} has {have / GIB:.1f}"
    elif most > have * (1 - RESERVE):
        reserve = f"{100 * RESERVE:.0f} % are left for the driver, communication and fragments"
        yield f"memory: a rank needs {most / GIB:.1f} of the {have / GIB:.1f} GiB of {name}; {reserve}"


def of_nodes(layout: Layout) -> Iterator[str]:
    """Groups that speak in every layer should stay on a node."""
    node = layout.ranks_per_node
    sizes = {
        "tensor": layout.tensor,
        "context": layout.tensor * layout.context if layout.context > 1 else 1,
        "expert": layout.expert * layout.expert_tensor if layout.expert > 1 else 1,
    }
    for name, ranks in sizes.items():
        if layout.num_nodes > 1 and (ranks > node or node % ranks):
            yield f"{name} parallelism: its groups cross nodes of {node} ranks"


def of_pipeline(case: Case, bubble: float) -> Iterator[str]:
    count, stages = case.num_micro_batches, case.layout.pipeline
    if count < stages:
        yield f"pipeline: {count} micro-batches do not fill {stages} stages"
    elif bubble > LONGEST_BUBBLE:
        yield f"pipeline: ranks wait {100 * bubble:.0f} % of the time; more micro-batches or virtual stages would help"


def of_products(case: Case) -> Iterator[str]:
    if case.run.step.fp8 and case.hardware.fp8_tflops is None:
        yield f"model.fp8=true: {case.hardware.name} has no 8-bit products"
    if case.run.trainer.precision == "32":
        yield "trainer.precision=32: products run outside of tensor cores; bf16-mixed is some ten times as fast"
