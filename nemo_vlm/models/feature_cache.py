"""A frozen vision tower that looks at each image once: its features are read where they were kept, else computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nemo_vlm.batch import Images, Kept, join
from nemo_vlm.data.feature_store import FeatureStore, Writer, content
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.vit import VisionTransformer
from nemo_vlm.models.multimodal import Media, Views
from nemo_vlm.models.tokens import Runs
from nemo_vlm.models.video import Video


@dataclass(frozen=True)
class KeptViews:
    """A family's views, without the pixels of those whose features were kept."""

    views: Views
    store: FeatureStore

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.views.settings

    @property
    def pixel_settings(self) -> tuple[Any, ...]:
        return self.views.pixel_settings

    def runs(self, media: Media) -> Runs:
        return self.views.runs(media)

    def frames(self, images: Images) -> list[list[Image.Image]]:
        return self.views.frames(images)

    def pixels(self, media: Sequence[Media]) -> Images:
        return join(self._one(one) for one in media)

    def _one(self, media: Media) -> Images:
        key = content(media.source, "video") if isinstance(media, Video) else content(media, "image")
        if found := self.store.read(key):
            features, grids = found
            return Images(image_grid_thw=grids, kept=(Kept(key, len(grids), True),), features=features)
        images = self.views.pixels([media])
        return replace(images, kept=(Kept(key, len(images), False),))


class KeptFeatures:
    """The tower's side: computes what was not kept, and keeps it.

    Ranks that share a batch must agree on what the tower is to see, though one may have found what another has not;
    under FSDP all ranks gather its weights together.

    Args:
        gathers: FSDP shards the tower.
    """

    def __init__(self, tower: VisionTransformer, store: FeatureStore, gathers: bool) -> None:
        self.tower, self.gathers = tower, gathers
        self.writer = Writer(store) if groups.first_of_batch() else None
        self.num_read = self.num_computed = 0

    def __call__(self, images: Images) -> Tensor:
        """Hidden states as the tower's, [patches, width]; zeros for the blank that stands for no image.

        Images that no cache was asked for, as those of questions (training.val_answers), are all computed, none kept.
        """
        if len(images) and not images.kept:
            return self.run(images)
        sizes = [int(grids.prod(1).sum()) for grids in by_media(images)]
        features = self.agreed(images, sizes)
        missing = [place for place, known in enumerate(features) if known is None]
        for place, computed in zip(missing, self.compute(images, sizes, missing), strict=True):
            features[place] = computed
        self.keep(images, missing, features)
        if not features:
            return self.empty(len(self.tower.blank().pixel_values)).zero_()
        return torch.cat([known for known in features if known is not None])

    def compute(self, images: Images, sizes: list[int], missing: list[int]) -> Sequence[Tensor]:
        hidden = self.run(pixels_of(images, sizes, missing) if missing else Images())
        return hidden.split([sizes[place] for place in missing])

    def run(self, images: Images) -> Tensor:
        """The tower's hidden states; once in each forward pass, whatever the batch, since ranks agree on it here."""
        needed = len(images) > 0
        if self.gathers:
            (needed,) = groups.any_rank(needed)
        if not needed:
            return self.empty(0)
        hidden = self.tower(images if len(images) else self.tower.blank())
        return hidden if len(images) else hidden[:0]

    def agreed(self, images: Images, sizes: list[int]) -> list[Tensor | None]:
        """Of each image and video what any of the ranks that share the batch has found."""
        known = iter(images.features.split([n for n, one in zip(sizes, images.kept, strict=True) if one.known]))
        found = [next(known) if one.known else None for one in images.kept]
        for place, owner in enumerate(groups.owners_in_batch([one.known for one in images.kept])):
            if owner is not None:
                mine = found[place]
                found[place] = groups.from_owner(self.empty(sizes[place]) if mine is None else mine, owner)
        return found

    def empty(self, patches: int) -> Tensor:
        shape, device = self.tower.shape, self.tower.conv1.weight.device
        width = shape.hidden_size * (1 + len(shape.taps))
        return torch.empty(patches, width, dtype=self.tower.config.params_dtype, device=device)

    def keep(self, images: Images, computed: list[int], features: list[Tensor | None]) -> None:
        self.num_computed += len(computed)
        self.num_read += len(images.kept) - len(computed)
        if self.writer is None:
            return
        grids = by_media(images)
        for place in computed:
            made = features[place]
            assert made is not None
            self.writer.write(images.kept[place].key, made.to("cpu", copy=True), grids[place].clone())


def by_media(images: Images) -> tuple[Tensor, ...]:
    """The grids [views, 3] of each image and video."""
    return images.image_grid_thw.split([one.views for one in images.kept])


def pixels_of(images: Images, sizes: list[int], chosen: list[int]) -> Images:
    """Those images and videos alone.

    Args:
        sizes: patches of each.
        chosen: places of some whose pixels are here.
    """
    here = [place for place, one in enumerate(images.kept) if not one.known]
    grids = torch.cat([by_media(images)[place] for place in chosen])
    pixels = images.pixel_values
    if chosen != here:  # another rank had the others
        parts = dict(zip(here, pixels.split([sizes[place] for place in here]), strict=True))
        pixels = torch.cat([parts[place] for place in chosen])
    return replace(images, pixel_values=pixels, image_grid_thw=grids, kept=(), features=torch.empty(0, 0))
