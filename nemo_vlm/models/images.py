"""Images to pixels, as Hugging Face's CLIPImageProcessor and SiglipImageProcessor make them, and pixels to patches."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from nemo_vlm.batch import Images
from nemo_vlm.data.media import Source, opened, reraise_of_disk
from nemo_vlm.errors import SampleError

KEEP_EDGES = (224, 448)  # the largest shortest and longest edge of NeMo's image_aspect_ratio=keep
# Pixels of what is made on the way to the tower's square, so that an image of 1 x 100000 does not take all memory
MAX_PADDED, MAX_SCALED = 2**30 // 12, 2**30 // 48  # the first is Pillow's own limit of images
# What Pillow's readers raise of damaged files, RuntimeError and TypeError in rarer formats
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, struct.error)

# By EXIF's orientation, as PIL.ImageOps.exif_transpose
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[turn] for turn in (5, 6, 7, 8)]


@dataclass(frozen=True)
class ImageTransform:
    """How an image becomes views, which are squares of pixels as a rule.

    Attributes:
        mode: crop (shortest edge to size, centre cut out: CLIP), stretch (both edges to size: SigLIP),
            pad (a square canvas in the mean colour first: LLaVA 1.5's fine-tuning),
            keep (the whole image in its own proportions).
        tiles: see it as a whole, and in 2 x 2 tiles of twice the resolution.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: Literal["crop", "stretch", "pad", "keep"]
    tiles: bool = False

    def views(self, image: Image.Image) -> list[Tensor]:
        """[3, height, width] float32 each, normalised; the whole image first, then its tiles row by row.

        Raises:
            SampleError: huge_image: it is so long that its square is made of too many pixels.
        """
        if not self.tiles:
            return [self.normalised(self.square(image, self.size))]
        whole = self.square(image, 2 * self.size)
        edges = (0, self.size)
        tiles = [whole.crop((x, y, x + self.size, y + self.size)) for y in edges for x in edges]
        return [self.normalised(view) for view in (resize(whole, (self.size, self.size)), *tiles)]

    def view_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """(height, width) of the views of an image, in pixels."""
        if self.mode == "keep":
            return [kept(width, height, self.size)[::-1]]
        return [(self.size, self.size)] * (5 if self.tiles else 1)

    def square(self, image: Image.Image, size: int) -> Image.Image:
        if self.mode == "keep":
            return resize(image, kept(*image.size, size))
        if self.mode == "pad":
            image = pad_to_square(image, tuple(int(255 * value) for value in self.mean))
        if self.mode != "crop":
            return resize(image, (size, size))
        whole = scaled(*image.size, size)
        check_canvas(image, whole, MAX_SCALED)
        image = resize(image, whole)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def normalised(self, image: Image.Image) -> Tensor:
        pixels = numpy.asarray(image, dtype=numpy.float32) / 255
        pixels = (pixels - numpy.asarray(self.mean, numpy.float32)) / numpy.asarray(self.std, numpy.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def picture(self, view: Tensor) -> Image.Image:
        """The image that a view [3, height, width] was."""
        return denormalised(view.permute(1, 2, 0).numpy(), self.mean, self.std)


def denormalised(pixels: numpy.ndarray, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The image of normalised pixels [height, width, 3]."""
    return Image.fromarray(((pixels * std + mean) * 255).round().clip(0, 255).astype(numpy.uint8))


CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SIGLIP = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def scaled(width: int, height: int, shortest: int) -> tuple[int, int]:
    """(width, height) with that shortest edge, as HF's get_resize_output_image_size."""
    longer = int(shortest * max(width, height) / min(width, height))
    return (shortest, longer) if width <= height else (longer, shortest)


def kept(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) of NeMo's keep: neither edge beyond its limit; smaller towers have smaller limits."""
    short, long = (edge * min(size, KEEP_EDGES[0]) // KEEP_EDGES[0] for edge in KEEP_EDGES)
    return scaled(width, height, max(int(min(long / (max(width, height) / min(width, height)), short)), 1))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    edge = max(image.size)
    check_canvas(image, (edge, edge), MAX_PADDED)
    canvas = Image.new("RGB", (edge, edge), colour)
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return canvas


def check_canvas(image: Image.Image, size: tuple[int, int], most: int) -> None:
    if size[0] * size[1] > most:
        what = f"{image.width} x {image.height} pixels would become {size[0]} x {size[1]} on the way"
        raise SampleError("huge_image", f"{what}, more than {most} in all")


def patchify(views: Sequence[Tensor], patch_size: int) -> Images:
    """Views [3, height, width] cut into patches; a rest that makes no whole patch is left out.

    Raises:
        SampleError: broken_image: a view is smaller than a patch.
    """
    if not views:
        return Images()
    patches, grids = [], []
    for view in views:
        rows, columns = view.shape[1] // patch_size, view.shape[2] // patch_size
        if not rows or not columns:
            small = f"a view of {view.shape[2]} x {view.shape[1]} pixels holds no patch of {patch_size}"
            raise SampleError("broken_image", small)
        cut = view[:, : rows * patch_size, : columns * patch_size]
        parted = cut.unflatten(2, (columns, patch_size)).unflatten(1, (rows, patch_size))
        patches.append(parted.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1))
        grids.append((1, rows, columns))
    return Images(torch.cat(patches), torch.tensor(grids))


def unpatchify(images: Images) -> list[Tensor]:
    """The views [3, height, width] again, without what was left out."""
    edge = math.isqrt(images.pixel_values.shape[1] // 3)
    views = images.pixel_values.split([time * rows * columns for time, rows, columns in images.grids])
    return [
        view.view(rows, columns, 3, edge, edge).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        for view, (_, rows, columns) in zip(views, images.grids, strict=True)
    ]


def load_image(source: Source, upright: bool = False) -> Image.Image:
    """An image file as RGB.

    Args:
        upright: turned as its EXIF says, and on white where it is transparent, as transformers 5 opens images and
            qwen_vl_utils; else neither, as NeMo opens LLaVA's.
    Raises:
        SampleError: it does not exist, is no image, is damaged, or so large that it may be an attack.
        OSError: the file system fails.
    """
    with decoding(source) as file:
        image = Image.open(file)
        if not upright:
            return image.convert("RGB")
        turn = TURNS.get(orientation(image))
        opaque = on_white(image)
        return opaque if turn is None else opaque.transpose(turn)


def image_size(source: Source, upright: bool = False) -> tuple[int, int]:
    """(width, height) from the file's header, as of load_image.

    Raises:
        SampleError, OSError: as load_image.
    """
    with decoding(source) as file:
        image = Image.open(file)
        return image.size[::-1] if upright and TURNS.get(orientation(image)) in SIDEWAYS else image.size


def orientation(image: Image.Image) -> int | None:
    """What the EXIF in front of an image's pixels says; a few PNGs have it behind them, where it is not looked for."""
    if image.format == "TIFF":  # which Pillow turns itself
        return None
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # a PNG's own would decode the pixels


def on_white(image: Image.Image) -> Image.Image:
    """An image as RGB, what is transparent in it white."""
    image.load()
    if image.mode == "RGB" and image.info.get("transparency") is None:  # as most; to convert it would be to copy it
        return image
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@contextmanager
def named(media: object) -> Iterator[None]:
    """Puts the name of an image or a video in front of what a SampleError says, where it does not stand there yet."""
    try:
        yield
    except SampleError as error:
        text = str(error)
        raise error if text.startswith(str(media)) else SampleError(error.reason, f"{media}: {text}") from None


@contextmanager
def decoding(source: Source) -> Iterator[BinaryIO]:
    """An open file, and Pillow's errors by their reasons."""
    with opened(source) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            yield file
        except Image.DecompressionBombError as error:
            raise SampleError("huge_image", f"{source}: {error}") from None
        except UnidentifiedImageError:  # which says so of the file object
            raise SampleError("broken_image", f"{source}: not a readable image (of no known format)") from None
        except DAMAGED as error:
            reraise_of_disk(source, error)
            raise SampleError("broken_image", f"{source}: not a readable image ({error})") from None
