"""The top-level settings of a plan: what `dry_run=true` and examples/plan.py take beside a run's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from nemo_vlm.config.checks import demand
from nemo_vlm.errors import ConfigError

SEARCH_FILE = "plan/parallel/planned.yaml"


@dataclass(frozen=True)
class PlanConfig:
    """What is planned for, and where it goes."""

    hardware: str = "h100"  # h100, h200, b200, a100 or 910b: what times and memory are planned for
    plan_file: str | None = None  # where the plan is written too, as JSON
    plan_picture: str | None = None  # where the pipeline's schedule and each rank's memory are drawn, as PNG
    plan_tokens: int | None = None  # tokens of a sample; null: as long as model.encoder_seq_length allows
    plan_images: int | None = None  # images of a sample; null: one, of a model that sees
    search: bool = False  # rank the layouts of that many ranks, and plan the best
    search_file: str = SEARCH_FILE  # where that layout is written, for parallel=

    def __post_init__(self) -> None:
        tokens, images = self.plan_tokens, self.plan_images
        demand(tokens is None or tokens > 0, "plan_tokens", tokens, "1 or more, or null")
        demand(images is None or images >= 0, "plan_images", images, "0 or more, or null")
        picture, file = self.plan_picture, Path(self.search_file)
        drawn = picture is None or Path(picture).suffix.lower() == ".png"
        demand(drawn, "plan_picture", picture, "a file that ends in .png, or null")
        found = file.suffix == ".yaml" and file.parent.name == "parallel"
        demand(found, "search_file", file, "FOLDER/parallel/NAME.yaml, for --config-dir FOLDER parallel=NAME")
        if not self.search and self.search_file != SEARCH_FILE:
            raise ConfigError(f"search_file={self.search_file}: goes with search=true")

    def refuse_without_plan(self, typed: Collection[str]) -> None:
        """Raises ConfigError for the first setting that is given where a run starts.

        Args:
            typed: the settings on the command line; the others are the recipe's.
        """
        given = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        for name, value in given.items():
            if name not in typed:
                raise ConfigError(f"dry_run=false: the recipe only plans (it has {name}={value}); start another one")
            raise ConfigError(f"{name}={value}: goes with dry_run=true")


KEYS = tuple(setting.name for setting in fields(PlanConfig))
