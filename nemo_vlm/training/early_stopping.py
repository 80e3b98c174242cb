"""When a run that no longer gets better ends, by the rules of Lightning's EarlyStopping.

What it remembers is part of a checkpoint, so a run that goes on counts on, and one that was ended stays ended until it
is given more patience.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nemo_vlm.config import EarlyStoppingConfig
from nemo_vlm.config.exp_manager import OF_VALIDATION


@dataclass(frozen=True)
class Watch:
    """Position.stopping.

    Attributes:
        best: the best metric so far; None before the first.
        latest: the newest.
        waited: metrics since the best.
    """

    best: float | None = None
    latest: float | None = None
    waited: int = 0


def after_step(
    stopping: dict[str, Any], metrics: dict[str, float], skipped: bool, config: EarlyStoppingConfig
) -> dict[str, Any]:
    """What is remembered after a step; of one that was skipped only its validation says anything of the model."""
    if config.monitor not in metrics or (skipped and config.monitor not in OF_VALIDATION):
        return stopping
    return judge(stopping, metrics[config.monitor], config)


def judge(stopping: dict[str, Any], metric: float, config: EarlyStoppingConfig) -> dict[str, Any]:
    """What is remembered after one more metric."""
    before = Watch(**stopping)
    if math.isfinite(metric) and (before.best is None or better(metric, before.best, config, config.min_delta)):
        return asdict(Watch(metric, metric))
    return asdict(Watch(before.best, metric, before.waited + 1))


def verdict(stopping: dict[str, Any], config: EarlyStoppingConfig) -> str | None:
    """Why the run ends, if it does."""
    watch = Watch(**stopping)
    if watch.latest is None:
        return None
    now = f"{config.monitor} is {watch.latest:.6g}"
    if config.check_finite and not math.isfinite(watch.latest):
        return now
    if config.stopping_threshold is not None and better(watch.latest, config.stopping_threshold, config):
        return f"{now}, better than stopping_threshold={config.stopping_threshold:g}"
    if config.divergence_threshold is not None and better(config.divergence_threshold, watch.latest, config):
        return f"{now}, worse than divergence_threshold={config.divergence_threshold:g}"
    if watch.waited >= config.patience:
        return f"{now}; {watch.waited} times in a row not better than {watch.best} by {config.min_delta:g}"
    return None


def better(value: float, than: float, config: EarlyStoppingConfig, by: float = 0.0) -> bool:
    """Whether a metric is better, by more than `by`."""
    return value < than - by if config.mode == "min" else value > than + by
