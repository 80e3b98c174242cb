"""Images to pixels, as Hugging Face's CLIPImageProcessor and SiglipImageProcessor make them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import torch
from PIL import Image
from torch import Tensor

from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class ImageTransform:
    """How an image becomes a square of pixels.

    Attributes:
        mode: crop (shortest edge to size, centre cut out: CLIP), stretch (both edges to size: SigLIP),
            pad (a square canvas in the mean colour first: LLaVA 1.5's fine-tuning).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: Literal["crop", "stretch", "pad"]

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, size, size] float32, normalised."""
        if self.mode == "pad":
            image = pad_to_square(image, tuple(int(255 * value) for value in self.mean))
        width, height = image.size
        if self.mode == "crop":
            short, long = min(width, height), max(width, height)
            longer = int(self.size * long / short)
            image = resize(image, (self.size, longer) if width <= height else (longer, self.size))
            left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        else:
            image = resize(image, (self.size, self.size))
        pixels = numpy.asarray(image, dtype=numpy.float32) / 255
        pixels = (pixels - numpy.asarray(self.mean, numpy.float32)) / numpy.asarray(self.std, numpy.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SIGLIP = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    edge = max(image.size)
    canvas = Image.new("RGB", (edge, edge), colour)
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return canvas


def load_image(path: str | Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        ConfigError: it does not exist or is no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ConfigError(f"{path}: the image does not exist; model.data.image_folder says where they stand") from None
    except OSError as error:
        raise ConfigError(f"{path}: not a readable image ({error})") from None
