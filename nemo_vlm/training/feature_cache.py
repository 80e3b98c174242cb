"""model.data.cache_vision_features: a run's model and data joined to a store of its frozen tower's features."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from nemo_vlm.config import RunConfig
from nemo_vlm.data.dataset import Samples
from nemo_vlm.data.feature_store import FeatureStore, home_of, version_of
from nemo_vlm.data.records import RecordDataset
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups, weights
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.models.feature_cache import KeptFeatures, KeptViews
from nemo_vlm.models.vision_language import VisionLanguageModel

log = logging.getLogger(__name__)

VERSION = 1  # counts up when other features are made of the same images by the same weights
TOWER = "vision_model"


class FeatureCache:
    """The store that belongs to a run, in use by its model; the weights must stand.

    Args:
        dataset: the run's, of records.
    """

    def __init__(self, engine: Engine, run: RunConfig, layout: Layout, dataset: Samples) -> None:
        views = cast(RecordDataset, dataset).processor.views
        self.store, self.tower = FeatureStore(home_of(run.data) / version(engine, run, views)), None
        for model in of_first_stage(engine.updater.modules):
            self.tower = KeptFeatures(model.vision_model, self.store, gathers=layout.fsdp is not None)
            model.kept_features = self.tower
        if self.tower is not None and torch.distributed.get_rank() == 0:
            self.store.remove_left()
            self._announce(run, self.tower, len(cast(RecordDataset, dataset)))

    def _announce(self, run: RunConfig, tower: KeptFeatures, samples: int) -> None:
        """Where features are kept, and about how large that may become."""
        patches = sum(math.prod(grid) for grid in run.model.typical_views(run.data))
        each, free = patches * tower.empty(1).nbytes, shutil.disk_usage(home_of(run.data)).free
        told = "vision features: in %s; a photograph takes %s, one in each of %d samples %s; %s are free"
        log.info(told, self.store.folder, in_bytes(each), samples, in_bytes(each * samples), in_bytes(free))

    def reading(self, dataset: Samples) -> Samples:
        """The same samples, without the pixels of images whose features were kept."""
        found = copy.copy(cast(RecordDataset, dataset))
        found.processor = copy.copy(found.processor)
        found.processor.views = KeptViews(found.processor.views, self.store)
        return found

    def end(self) -> None:
        """Bring to disk what is still on its way, and tell what came of it on all ranks, each of which must call it."""
        mine = [0.0, 0.0, 0.0]
        if self.tower is not None and self.tower.writer is not None:
            self.tower.writer.wait()
            mine = [self.tower.num_read, self.tower.num_computed, self.tower.writer.bytes]
        read, computed, size = map(sum, zip(*groups.of_every_rank(mine), strict=True))
        if torch.distributed.get_rank() == 0:
            told = "vision features: %d of images and videos read, %d computed; %s written to %s"
            log.info(told, read, computed, in_bytes(size), self.store.folder)


def in_bytes(count: float) -> str:
    """In the unit that leaves digits in front of the point."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count:.0f} bytes"


def of_first_stage(modules: list[nn.Module]) -> list[VisionLanguageModel]:
    """The models with a tower among those that this rank holds."""
    found = [model for module in modules for model in module.modules() if isinstance(model, VisionLanguageModel)]
    return [model for model in found if model.stage.first]


def version(engine: Engine, run: RunConfig, views: Any) -> str:
    """Tells features from those of other weights, in another precision, or of otherwise shown images; on every rank."""
    dtype = engine.config.params_dtype
    parts = [part for part in engine.parts() if part.name.startswith(f"{TOWER}.")]
    parts = [replace(part, data=part.data.to(dtype)) for part in parts]  # FSDP keeps them in fp32
    media = run.model.media
    assert media is not None
    shape = replace(media.vision_encoder, from_pretrained=None, freeze=False, vision_encoder_lr_ratio=1.0)
    about = VERSION, str(dtype), shape, views.pixel_settings
    return groups.from_first_rank(version_of(weights.gather(parts, weights.placements(parts)), about))
