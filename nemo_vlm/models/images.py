"""Images to pixels, as Hugging Face's CLIPImageProcessor and SiglipImageProcessor see them, and pixels to patches."""

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
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from nemo_vlm.batch import RGB, Images
from nemo_vlm.data.media import Source, opened, reraise_of_disk
from nemo_vlm.errors import SampleError

KEEP_EDGES = (224, 448)  # the largest shortest and longest edge of NeMo's image_aspect_ratio=keep
# Pixels of what is made on the way to the tower's square, so that an image of 1 x 100000 does not take all memory
MAX_PADDED, MAX_SCALED = 2**30 // 12, 2**30 // 48  # the first is Pillow's own limit of images
# A JPEG may be decoded to this times what it is to become: photographs then differ from a full decoding by 1 to 3
# levels of 255 on the average (32 dB and more); with nothing left to resize it would be twice as much
DRAFT = 1.5
# What Pillow's readers raise of damaged files, RuntimeError and TypeError in rarer formats
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, struct.error)

ImageFile.MAXBLOCK = 2**20  # bytes that Pillow reads and hands over in one piece: most images; by 64 KB they are joined
# Pieces of memory, of 16 MB at most, that Pillow keeps from one image for the next; it keeps none, and the system then
# clears each page of them again, which took a tenth of the time
Image.core.set_blocks_max(max(3, Image.core.get_blocks_max()))
PIECE = 2**17  # bytes of pixels that are cut at a time, see raw_pieces
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

Size = tuple[int, int]  # width, height


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
    mean: RGB
    std: RGB
    mode: Literal["crop", "stretch", "pad", "keep"]
    tiles: bool = False

    def views(self, image: Image.Image, own: Size | None = None) -> list[Image.Image]:
        """The whole image first, then its tiles row by row.

        Args:
            own: its size in the file, where it was decoded smaller.
        Raises:
            SampleError: huge_image: it is so long that its square is made of too many pixels.
        """
        whole = self.square(image, self.edge, own or image.size)
        if not self.tiles:
            return [whole]
        edges = (0, self.size)
        tiles = [whole.crop((x, y, x + self.size, y + self.size)) for y in edges for x in edges]
        return [resize(whole, (self.size, self.size)), *tiles]

    def patches(self, views: Sequence[Image.Image], patch_size: int) -> Images:
        """Views cut into patches, of uint8; a rest that makes no whole patch is left out.

        Raises:
            SampleError: broken_image: a view is smaller than a patch.
        """
        grids = [(1, view.height // patch_size, view.width // patch_size) for view in views]
        pixels = numpy.empty((sum(map(math.prod, grids)), patch_size), line_of(patch_size))
        end = 0
        for view, (_, rows, columns) in zip(views, grids, strict=True):
            if not rows or not columns:
                small = f"a view of {view.width} x {view.height} pixels holds no patch of {patch_size}"
                raise SampleError("broken_image", small)
            whole = cut(view, (0, 0, columns * patch_size, rows * patch_size))
            start, end = end, end + rows * columns
            write_patches(whole, pixels[start:end].reshape(rows, columns, 1, 1, 1, patch_size))
        return Images(*as_tensors(pixels, grids), self.mean, self.std)

    def view_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """(height, width) of the views of an image, in pixels."""
        if self.mode == "keep":
            return [kept(width, height, self.size)[::-1]]
        return [(self.size, self.size)] * (5 if self.tiles else 1)

    @property
    def edge(self) -> int:
        """Of the square that an image becomes, tiles and all."""
        return 2 * self.size if self.tiles else self.size

    def whole(self, width: int, height: int, size: int) -> Size:
        """What all of an image of that size is resized to, before it is cut to its square or behind its padding."""
        if self.mode == "keep":
            return kept(width, height, size)
        if self.mode == "crop":
            return scaled(width, height, size)
        if self.mode == "pad":
            longer = max(width, height)
            return max(round(size * width / longer), 1), max(round(size * height / longer), 1)
        return size, size

    def square(self, image: Image.Image, size: int, own: Size) -> Image.Image:
        if self.mode == "pad":
            return padded(image, size, tuple(int(255 * value) for value in self.mean))
        whole = self.whole(*own, size)
        if self.mode == "crop":
            check_canvas(own, whole, MAX_SCALED)
            return cropped(image, whole, size)
        return resize(image, whole)


CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SIGLIP = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def scaled(width: int, height: int, shortest: int) -> Size:
    """(width, height) with that shortest edge, as HF's get_resize_output_image_size."""
    longer = int(shortest * max(width, height) / min(width, height))
    return (shortest, longer) if width <= height else (longer, shortest)


def kept(width: int, height: int, size: int) -> Size:
    """(width, height) of NeMo's keep: neither edge beyond its limit; smaller towers have smaller limits."""
    short, long = (edge * min(size, KEEP_EDGES[0]) // KEEP_EDGES[0] for edge in KEEP_EDGES)
    return scaled(width, height, max(int(min(long / (max(width, height) / min(width, height)), short)), 1))


def resize(image: Image.Image, size: Size) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


def cropped(image: Image.Image, whole: Size, size: int) -> Image.Image:
    """The middle square of a resized image; a wide one loses its outer columns between both passes, see padded."""
    if image.width < image.height:
        top = (whole[1] - size) // 2
        return cut(resize(image, whole), (0, top, size, top + size))
    left = (whole[0] - size) // 2
    narrow = cut(resize(image, (whole[0], image.height)), (left, 0, left + size, image.height))
    return resize(narrow, (size, size))


def padded(image: Image.Image, size: int, colour: tuple[int, ...]) -> Image.Image:
    """An image in the middle of a square canvas, resized with it.

    What is wider than high is made as narrow as it will be before the canvas: the same to the last bit, since Pillow
    then resizes widths first (of what is much higher than wide, heights), and less work.
    """
    edge = max(image.size)
    check_canvas(image.size, (edge, edge), MAX_PADDED)
    width, above = edge, (edge - image.height) // 2
    if image.width == edge:
        image, width = resize(image, (size, image.height)), size
    canvas = Image.new("RGB", (width, edge), colour)
    canvas.paste(image, ((width - image.width) // 2, above))
    return resize(canvas, (size, size))


def check_canvas(own: Size, size: Size, most: int) -> None:
    if size[0] * size[1] > most:
        what = f"{own[0]} x {own[1]} pixels would become {size[0]} x {size[1]} on the way"
        raise SampleError("huge_image", f"{what}, more than {most} in all")


def line_of(patch_size: int) -> str:
    """The type of a patch's row, which moves as one thing, several times as fast as its pixels."""
    return f"V{3 * patch_size}"


def write_patches(image: Image.Image, lines: numpy.ndarray) -> None:
    """Write the patches of an image, block by block; the colours of a pixel stay side by side, see Images.

    Args:
        lines: [block rows, block columns, rows of a block, columns of a block, frames, rows of a patch] of line_of;
            the image is every frame.
    """
    rows, columns, block, _, _, edge = lines.shape
    each = columns * block * block * edge * lines.itemsize  # bytes of a row of blocks
    together = max(PIECE // each, 1)
    for first, piece in zip(range(0, rows, together), raw_pieces(image, together * each), strict=True):
        some = lines[first : first + together]
        whole = numpy.frombuffer(piece, lines.dtype).reshape(len(some), block, edge, columns, block)
        some[...] = whole.transpose(0, 3, 1, 4, 2)[..., None, :]


def as_tensors(lines: numpy.ndarray, grids: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Patches of all that numbers, uint8, and the grids; a view by torch costs more than one by numpy."""
    patches = lines.view(numpy.uint8).reshape(sum(map(math.prod, grids)), -1)
    return torch.from_numpy(patches), torch.from_numpy(numpy.array(grids))


def raw_pieces(image: Image.Image, size: int) -> Iterator[bytes]:
    """What image.tobytes() joins, in pieces of so many bytes, which are whole rows of pixels; Pillow has no other way.

    A piece is still in the processor's cache when it is cut, and needs no memory that the system must clear.
    """
    image.load()
    encoder = Image._getencoder("RGB", "raw", ("RGB", 0, 1))
    encoder.setimage(image.im, (0, 0, *image.size))
    done = 0
    while not done:
        _, done, piece = encoder.encode(size)
        yield piece


def patchify(views: Sequence[Tensor], patch_size: int) -> Images:
    """As ImageTransform.patches, of normalised views [3, height, width]."""
    if not views:
        return Images()
    patches, grids = [], []
    for view in views:
        rows, columns = view.shape[1] // patch_size, view.shape[2] // patch_size
        cut = view[:, : rows * patch_size, : columns * patch_size]
        parted = cut.unflatten(2, (columns, patch_size)).unflatten(1, (rows, patch_size))
        patches.append(parted.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1))
        grids.append((1, rows, columns))
    return Images(torch.cat(patches), torch.tensor(grids))


def unpatchify(images: Images) -> list[Tensor]:
    """The views [3, height, width] again, without what was left out; pixels as they are, uint8 or float32."""
    edge = math.isqrt(images.pixel_values.shape[1] // 3)
    views = images.planes().split([time * rows * columns for time, rows, columns in images.grids])
    return [
        view.reshape(rows, columns, 3, edge, edge).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        for view, (_, rows, columns) in zip(views, images.grids, strict=True)
    ]


class Picture:
    """An open image file, of which no more than its header has been read.

    Args:
        upright: turned as its EXIF says, and on white where it is transparent, as transformers 5 opens images and
            qwen_vl_utils; else neither, as NeMo opens LLaVA's.
    """

    def __init__(self, file: BinaryIO, upright: bool) -> None:
        self.image, self.upright = Image.open(file), upright
        self.turn = TURNS.get(orientation(self.image)) if upright else None
        self.size: Size = self.image.size[::-1] if self.turn in SIDEWAYS else self.image.size

    def load(self, least: Size | None = None) -> Image.Image:
        """As RGB.

        Args:
            least: what it will be resized to; a JPEG is then decoded at a half, a quarter or an eighth of its own
                size, as long as half as much again is left to resize.
        """
        if least is not None:
            width, height = (math.ceil(DRAFT * side) for side in least)
            self.image.draft(None, (height, width) if self.turn in SIDEWAYS else (width, height))
        if not self.upright:
            self.image.load()
            return self.image if self.image.mode == "RGB" else self.image.convert("RGB")
        opaque = on_white(self.image)
        return opaque if self.turn is None else opaque.transpose(self.turn)


def load_image(source: Source, upright: bool = False) -> Image.Image:
    """An image file as RGB, see Picture.

    Raises:
        SampleError: it does not exist, is no image, is damaged, or so large that it may be an attack.
        OSError: the file system fails.
    """
    with decoding(source) as file:
        return Picture(file, upright).load()


def image_size(source: Source, upright: bool = False) -> Size:
    """(width, height) from the file's header, as of load_image.

    Raises:
        SampleError, OSError: as load_image.
    """
    with decoding(source) as file:
        return Picture(file, upright).size


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
        except SampleError:
            raise
        except Image.DecompressionBombError as error:
            raise SampleError("huge_image", f"{source}: {error}") from None
        except UnidentifiedImageError:  # which says so of the file object
            raise SampleError("broken_image", f"{source}: not a readable image (of no known format)") from None
        except DAMAGED as error:
            reraise_of_disk(source, error)
            raise SampleError("broken_image", f"{source}: not a readable image ({error})") from None
