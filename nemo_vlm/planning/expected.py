"""What a plan expects of a step: FLOPs, the pipeline's wait, what ranks send, time, and what breaks a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
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
    time = step_time(case, most_trained)
    flops = {part: case.in_all * each for part, each in step_flops(case).items()}
    return {
        "flops": {"total": time.flops, **flops},
        "bubble": time.bubble,
        "communication": busiest(case, counts),
        "visual_tokens": round(case.in_all * case.work.visual_tokens),
        "step_time": in_numbers(case, time) | {"waits_for_messages": time.seconds - unhindered(case, most_trained)},
        "stage_seconds": {"forward": list(time.stages.forward), "backward": list(time.stages.backward)},
        "rules": rules.broken(case, most, time.bubble),
    }


def busiest(case: Case, counts: Sequence[Count]) -> dict[str, float]:
    """By kind, the bytes that a rank of the stage sends that sends most of it."""
    stages = [communication.of_step(case, count, stage) for stage, count in enumerate(counts)]
    return {kind: max(sent[kind] for sent in stages) for kind in stages[0]}


def unhindered(case: Case, count: Count) -> float:
    """Seconds of a step whose messages take no time but to be sent off."""
    hardware = replace(case.hardware, link=math.inf, network=math.inf)
    return step_time(replace(case, hardware=hardware), count).seconds


def in_numbers(case: Case, time: StepTime) -> dict[str, Any]:
    return {
        "seconds": time.seconds,
        "optimizer": time.optimizer,
        "mfu": time.mfu,
        "hfu": time.hfu,
        "tokens_per_sec": time.tokens_per_sec,
        "hardware": case.hardware.name,
    }
