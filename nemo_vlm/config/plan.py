"""The top-level settings of a plan: what `dry_run=true` and examples/plan.py take beside a run's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from nemo_vlm.config.checks import demand
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class PlanConfig:
    """What is planned for, and where it goes."""

    hardware: str = "h100"  # h100, h200, b200, a100 or 910b: what times and memory are planned for
    plan_file: str | None = None  # where the plan is written too, as JSON
    plan_picture: str | None = None  # where the pipeline's schedule and each rank's memory are drawn, as PNG
    plan_tokens: int | None = None  # tokens of a sample; null: as long as model.encoder_seq_length allows
    plan_images: int | None = None  # images of a sample; null: one, of a model that sees
    search: bool = False  # rank the layouts of that many ranks, and plan the best
    search_file: str = "plan/parallel/planned.yaml"  # where that layout is written, for parallel=

    def __post_init__(self) -> None:
        tokens, images = self.plan_tokens, self.plan_images
        demand(tokens is None or tokens > 0, "plan_tokens", tokens, "1 or more, or null")
        demand(images is None or images >= 0, "plan_images", images, "0 or more, or null")
        file = Path(self.search_file)
        found = file.suffix == ".yaml" and file.parent.name == "parallel"
        demand(found, "search_file", file, "FOLDER/parallel/NAME.yaml, for --config-dir FOLDER parallel=NAME")

    def refuse_without_plan(self) -> None:
        """Raises ConfigError for the first setting that is given where a run starts."""
        for setting in fields(self):
            given = getattr(self, setting.name)
            if given != setting.default:
                raise ConfigError(f"{setting.name}={given}: goes with dry_run=true")


KEYS = tuple(setting.name for setting in fields(PlanConfig))
