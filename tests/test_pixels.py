"""Pixels on their way from files to the model: uint8 until the tower, and JPEGs that are decoded smaller."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from test_families import TINY, build, one_rank

from nemo_vlm.batch import Sample, collate, join
from nemo_vlm.config import DataConfig
from nemo_vlm.data.media import Frames
from nemo_vlm.layout import one_process
from nemo_vlm.models.base import family
from nemo_vlm.models.images import CLIP, SIGLIP, ImageTransform
from nemo_vlm.models.video import Video

VLMS = ["llava", "qwen2_vl", "qwen3_vl"]
NORMAL = {"llava": CLIP, "qwen2_vl": CLIP, "qwen3_vl": SIGLIP}


def views_of(name: str, config: Any, **data: Any) -> Any:
    chosen = DataConfig(**data)
    if name == "llava":
        return family(name, "views").Views(config, chosen)
    return family(name, "processor").views_of(config, chosen)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Path:
    """Two photographs side by side, twice: as sharp as large ones are."""
    tiles = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    large = Image.new("RGB", (1280, 854))
    for number in range(4):
        large.paste(tiles[number % 2], (number // 2 * 640, number % 2 * 427))
    path = tmp_path_factory.mktemp("photograph") / "large.jpg"
    large.save(path, quality=92)
    return path


@pytest.mark.parametrize("name", VLMS)
def test_bytes_are_normalised_to_the_last_bit(name: str, photograph: Path) -> None:
    """As (x / 255 - mean) / std in float32, whatever was joined; and so the tower sees them."""
    config = TINY[name]
    views = views_of(name, config, **({} if name == "llava" else {"max_pixels": 100 * 28**2}))
    images = views.pixels([photograph, photograph])
    assert images.pixel_values.dtype == torch.uint8
    frames = config.mm_cfg.vision_encoder.patch_values // images.pixel_values.shape[1]
    shown = images.pixel_values.numpy().reshape(len(images.pixel_values), -1, 3).transpose(0, 2, 1)
    shown = shown[:, :, None].repeat(frames, 2)
    mean, std = (numpy.asarray(NORMAL[name][key], numpy.float32)[:, None, None] for key in ("mean", "std"))
    expected = torch.from_numpy((shown.astype(numpy.float32) / 255 - mean) / std).flatten(1)
    assert torch.equal(images.normalised().pixel_values, expected)
    floats = replace(images, pixel_values=expected)
    assert floats.normalised() is floats
    text = torch.zeros(2, dtype=torch.int64)
    samples = [Sample(text, text, views.pixels([photograph])) for _ in range(2)]
    kept = collate(samples).rows(torch.tensor([False, True])).images.normalised()
    assert torch.equal(kept.pixel_values, expected[: len(expected) // 2])
    with one_rank(config), torch.no_grad():
        model, _ = build(name, config, one_process(config))
        assert torch.equal(model.encode(images), model.encode(floats))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_stills_are_carried_once(name: str, photograph: Path, tmp_path: Path) -> None:
    """A frame of a patch leaves a worker; beside videos, and to the tower and who looks, an image stands in all."""
    Image.open(photograph).rotate(180).save(tmp_path / "turned.png")
    limits = {"max_pixels": 64 * 28**2, "video_max_pixels": 36 * 28**2, "num_frames": 4}
    views = views_of(name, TINY[name], **limits)
    media = [photograph, Video(Frames((photograph, tmp_path / "turned.png") * 2)), tmp_path / "turned.png"]
    parts = [views.pixels([one]) for one in media]
    widths = [part.pixel_values.shape[1] for part in parts]
    assert [2 * widths[0], widths[1], 2 * widths[2]] == [TINY[name].mm_cfg.vision_encoder.patch_values] * 3
    for chosen in ((0, 1, 2), (1, 0), (0, 2)):
        images = join(parts[place] for place in chosen)
        expected = [parts[place].normalised().pixel_values for place in chosen]
        assert torch.equal(images.normalised().pixel_values, torch.cat(expected))
        for seen, place in zip(views.frames(images), chosen, strict=True):
            assert seen == views.frames(parts[place])[0] and len(seen) == (4 if place == 1 else 1)


@pytest.mark.parametrize("size", [(50, 80), (81, 50), (33, 33), (53, 200), (300, 7), (64, 65), (5, 9)])
@pytest.mark.parametrize("tiles", [False, True])
def test_what_is_left_out_on_the_way_changes_nothing(size: tuple[int, int], tiles: bool) -> None:
    """Columns that are cut off or padded before all is resized: as whole images through Pillow."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=numpy.uint8)
    image, edge = Image.fromarray(pixels), 64 if tiles else 32
    crop, pad = (ImageTransform(32, **CLIP, mode=mode, tiles=tiles) for mode in ("crop", "pad"))  # type: ignore[arg-type]
    long = int(edge * max(size) / min(size))
    whole = image.resize((edge, long) if size[0] <= size[1] else (long, edge), Image.Resampling.BICUBIC)
    left, top = (whole.width - edge) // 2, (whole.height - edge) // 2
    assert crop.square(image, edge, size) == whole.crop((left, top, left + edge, top + edge))
    canvas = Image.new("RGB", (max(size), max(size)), tuple(int(255 * value) for value in CLIP["mean"]))
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    assert pad.square(image, edge, size) == canvas.resize((edge, edge), Image.Resampling.BICUBIC)


LIMITS = {"min_pixels": 28**2, "max_pixels": 16 * 28**2}
DRAFTED = [("llava", {"image_aspect_ratio": mode}) for mode in ("square", "pad", "keep")]
DRAFTED += [("qwen2_vl", LIMITS), ("qwen3_vl", LIMITS)]


@pytest.mark.parametrize(("name", "data"), DRAFTED)
def test_drafts_differ_little(name: str, data: dict[str, Any], photograph: Path) -> None:
    """In levels of 255, on the average; grids and counts are those of the file."""
    plain, draft = (views_of(name, TINY[name], **data, image_draft=chosen) for chosen in (False, True))
    expected, found = (views.pixels([photograph]) for views in (plain, draft))
    assert found.grids == expected.grids and draft.runs(photograph) == plain.runs(photograph)
    assert repr(draft.settings) == repr(plain.settings)  # lengths need not be measured again
    assert draft.pixel_settings != plain.pixel_settings  # but what was kept of the pixels is of others
    apart = found.pixel_values.float() - expected.pixel_values.float()
    assert 0 < apart.abs().mean() < 3
    assert 10 * math.log10(255**2 / apart.square().mean()) > 32


@pytest.mark.parametrize(("name", "data"), DRAFTED)
def test_drafts_are_upright_and_of_one_size(name: str, data: dict[str, Any], tmp_path: Path) -> None:
    """Odd sizes, each of the eight turns; a JPEG that is not much larger and other files are as without."""
    plain, draft = (views_of(name, TINY[name], **data, image_draft=chosen) for chosen in (False, True))
    photo = ImageOps.fit(Image.fromarray(load_sample_images().images[0]), (601, 333))
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        photo.save(tmp_path / "turned.jpg", exif=exif)
        expected, found = (views.pixels([tmp_path / "turned.jpg"]) for views in (plain, draft))
        assert found.grids == expected.grids
        apart = found.pixel_values.float() - expected.pixel_values.float()
        assert 0 < apart.abs().mean() < 5
    photo.save(tmp_path / "photo.png")
    photo.resize((31, 40)).save(tmp_path / "small.jpg")
    for file in ("photo.png", "small.jpg"):
        expected, found = (views.pixels([tmp_path / file]) for views in (plain, draft))
        assert torch.equal(found.pixel_values, expected.pixel_values)
