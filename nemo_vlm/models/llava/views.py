"""What LLaVA sees of images and videos: views as patches, and how many tokens they take in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from nemo_vlm.batch import Images, join
from nemo_vlm.config import DataConfig
from nemo_vlm.data.media import Source
from nemo_vlm.models.images import CLIP, SIGLIP, ImageTransform, Picture, decoding, image_size, named, unpatchify
from nemo_vlm.models.llava.config import Config, MultimodalConfig
from nemo_vlm.models.multimodal import Media
from nemo_vlm.models.tokens import PlaceholderRun, Runs
from nemo_vlm.models.video import FrameSampling, Video, frame_size


class Views:
    """The image part of the processor."""

    def __init__(self, config: Config, data: DataConfig) -> None:
        self.mm_cfg, self.patch_size = config.mm_cfg, config.mm_cfg.vision_encoder.patch_dim
        self.transform = image_transform(config.mm_cfg, data.image_aspect_ratio)
        self.draft = data.image_draft
        self.sampling = FrameSampling(config.media_choices(data)["num_frames"], data.splice_single_frame)

    @property
    def settings(self) -> tuple[Any, ...]:
        """All that `runs` depends on, beside the files."""
        return self.transform, self.patch_size, self.sampling, self.mm_cfg.mm_mlp_adapter_type

    @property
    def pixel_settings(self) -> tuple[Any, ...]:
        """All that `pixels` depends on, beside the files."""
        return self.transform, self.patch_size, self.sampling, self.draft

    def runs(self, media: Media) -> Runs:
        """Of an image or a video one; where all images take the same, the file is not opened.

        Raises:
            SampleError: it must be, and cannot.
        """
        count, size = 1, (self.transform.size, self.transform.size)
        if isinstance(media, Video):
            count = self.sampling.count(media)
        if self.transform.mode == "keep":
            size = frame_size(media) if isinstance(media, Video) else image_size(media)
        return (PlaceholderRun(count * self.of_size(*size)),)

    def of_size(self, width: int, height: int) -> int:
        grids = [(h // self.patch_size, w // self.patch_size) for h, w in self.transform.view_sizes(width, height)]
        return sum(self.mm_cfg.features_of_grid(*grid) for grid in grids)

    def pixels(self, media: Sequence[Media]) -> Images:
        """Raises:
        SampleError: a file cannot be read, is too small or too long.
        """
        return join(self.of_one(one) for one in media)

    def frames(self, images: Images) -> list[list[Image.Image]]:
        """Each view for itself, frames of videos and tiles too."""
        return [[Image.fromarray(view.permute(1, 2, 0).numpy())] for view in unpatchify(images)]

    def of_one(self, media: Media) -> Images:
        with named(media):
            views = self.of_video(media) if isinstance(media, Video) else self.of_image(media)
            return self.transform.patches(views, self.patch_size)

    def of_video(self, video: Video) -> list[Image.Image]:
        return [view for frame in self.sampling.frames(video) for view in self.transform.views(frame)]

    def of_image(self, source: Source) -> list[Image.Image]:
        transform = self.transform
        with decoding(source) as file:
            picture = Picture(file, upright=False)
            least = transform.whole(*picture.size, transform.edge) if self.draft else None
            image = picture.load(least)
        return transform.views(image, picture.size)


def image_transform(mm_cfg: MultimodalConfig, aspect_ratio: str) -> ImageTransform:
    vision = mm_cfg.vision_encoder
    clip = vision.model_type == "clip"
    mode = aspect_ratio if aspect_ratio != "square" else "crop" if clip else "stretch"
    return ImageTransform(vision.image_size, **(CLIP if clip else SIGLIP), mode=mode, tiles=mm_cfg.use_image_tile)  # type: ignore[arg-type]
