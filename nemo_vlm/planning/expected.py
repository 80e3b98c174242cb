"""What a plan expects of a step: FLOPs, the pipeline's wait, what ranks send, time, and what breaks a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_vlm.planning import communication, rules
from nemo_vlm.planning.communication import Case
from nemo_vlm.planning.parameters import Count
from nemo_vlm.planning.timing import StepTime, step_flops, step_time


def expected(case: Case, counts: Sequence[Count], most: float) -> dict[str, Any]:
    """The part of a plan that grows with the batch, as plain containers.

    Args:
        counts: of a rank of each stage of the pipeline.
        most: bytes of the rank that holds most.
    """
    most_trained = max(counts, key=lambda count: count.trained + count.trained_experts)
    time, batch = step_time(case, most_trained), case.layout.num_micro_batches * case.layout.data
    flops = {part: batch * each for part, each in step_flops(case).items()}
    return {
        "flops": {"total": time.flops, **flops},
        "bubble": time.bubble,
        "communication": busiest(case, counts),
        "visual_tokens": batch * case.work.visual_tokens,
        "step_time": in_numbers(case, time),
        "rules": rules.broken(case, most, time.bubble),
    }


def busiest(case: Case, counts: Sequence[Count]) -> dict[str, float]:
    """By kind, the bytes that a rank of the stage sends that sends most of it."""
    stages = [communication.of_step(case, count, stage) for stage, count in enumerate(counts)]
    return {kind: max(sent[kind] for sent in stages) for kind in stages[0]}


def in_numbers(case: Case, time: StepTime) -> dict[str, Any]:
    return {
        "seconds": time.seconds,
        "mfu": time.mfu,
        "hfu": time.hfu,
        "tokens_per_sec": time.tokens_per_sec,
        "hardware": case.hardware.name,
    }
