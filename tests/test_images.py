"""Views of images and videos, against Pillow by hand and Hugging Face's processors."""

from __future__ import annotations

import errno
import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy
import pytest
import torch
from PIL import Image
from test_families import run_of
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nemo_vlm import options
from nemo_vlm.config import DataConfig, ParallelConfig
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.models import video as videos
from nemo_vlm.models.base import family
from nemo_vlm.models.images import CLIP, ImageTransform, image_size, load_image, unpatchify
from nemo_vlm.models.llava.config import Config
from nemo_vlm.models.llava.views import Views
from nemo_vlm.models.multimodal import media_of
from nemo_vlm.models.tokens import PlaceholderRun
from nemo_vlm.models.video import Decord, FrameSampling, PyAv, Video

SHAPES = [(50, 80), (80, 50), (33, 33), (300, 101), (2000, 20)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("tower", [336, 224, 64])
def test_keep_is_nemos(size: tuple[int, int], tower: int) -> None:
    """Shortest edge int(min(448 / ratio, 224)), no crop; towers below 224 pixels in proportion."""
    image, scale = noise(*size), min(tower, 224) / 224
    transform = ImageTransform(tower, **CLIP, mode="keep")
    shortest = max(int(min(448 * scale / (max(size) / min(size)), 224 * scale)), 1)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": shortest}, do_center_crop=False)
    (view,) = unpatchify(transform.patches(transform.views(image), 1).normalised())
    torch.testing.assert_close(view, theirs(image, return_tensors="pt")["pixel_values"][0], rtol=0, atol=1e-5)
    assert transform.view_sizes(*size) == [tuple(view.shape[1:])]


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_tiles_are_quarters_of_twice_the_size(mode: str) -> None:
    image = noise(50, 80)
    tiled = ImageTransform(32, **CLIP, mode=mode, tiles=True)  # type: ignore[arg-type]
    large = ImageTransform(64, **CLIP, mode=mode)  # type: ignore[arg-type]
    overview, *tiles = tiled.views(image)
    whole = large.views(image)[0]
    for number, tile in enumerate(tiles):
        top, left = 32 * (number // 2), 32 * (number % 2)
        assert tile == whole.crop((left, top, left + 32, top + 32))
    assert overview == whole.resize((32, 32), Image.Resampling.BICUBIC)
    assert tiled.view_sizes(50, 80) == [view.size[::-1] for view in (overview, *tiles)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "missing_image"), (b"no image", "broken_image"), ("cut", "broken_image"), ("bomb", "huge_image")],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, content, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    noise(64, 64).save(file, "PNG")
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes({"cut": file.getvalue()[:3000], "bomb": file.getvalue()}.get(content, content))
    if content == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SampleError, match=str(path)) as caught:
        load_image(path)
    assert caught.value.reason == reason and "<" not in str(caught.value)


@pytest.mark.parametrize(("mode", "size"), [("crop", (1, 3000)), ("pad", (100000, 1))])
@pytest.mark.parametrize("tiles", [False, True])
def test_a_long_image_takes_no_memory(tmp_path: Path, mode: str, size: tuple[int, int], tiles: bool) -> None:
    """On the way to the tower's square it would have 338 million pixels, or 10 milliards."""
    noise(*size).save(tmp_path / "long.png")
    config = config_of(use_image_tile=tiles)
    vision = replace(config.mm_cfg.vision_encoder, image_size=336)
    config = replace(config, mm_cfg=replace(config.mm_cfg, vision_encoder=vision))
    views = Views(config, DataConfig(image_aspect_ratio="pad" if mode == "pad" else "square"))
    with pytest.raises(SampleError, match="long.png: .* would become") as caught:
        views.pixels([tmp_path / "long.png"])
    assert caught.value.reason == "huge_image"
    with Image.open(tmp_path / "long.png") as image:
        assert ImageTransform(32, **CLIP, mode="keep").views(image.convert("RGB"))[0].width


@pytest.mark.parametrize("read", [load_image, image_size])
@pytest.mark.parametrize(
    ("source", "reason"),
    [("bomb.ppm", "huge_image"), ("x.dds", "broken_image"), ("a\0.png", "broken_record"), ("\ud800", "broken_record")]
    + [("n" * 300, "broken_record"), ("bomb.ppm/x", "missing_image"), ("", "missing_image")],
)
def test_both_readers_give_the_same_reason(tmp_path: Path, source: str, reason: str, read) -> None:
    noise(4, 4).save(tmp_path / "x.dds")
    content = bytearray((tmp_path / "x.dds").read_bytes())
    content[80:88] = b"\4\0\0\0ABCD"  # a compression that nobody knows
    (tmp_path / "x.dds").write_bytes(content)
    (tmp_path / "bomb.ppm").write_bytes(b"P6 20000 20000 255\n")
    with pytest.raises(SampleError) as caught:
        read(tmp_path / source)
    assert caught.value.reason == reason


@dataclass(frozen=True)
class Failing:
    """A file whose disk fails when it is opened, or after its first bytes."""

    content: bytes | None

    def open(self):
        if self.content is None:
            raise PermissionError(errno.EACCES, "Permission denied")
        return io.BufferedReader(FailingDisk(self.content))


class FailingDisk(io.RawIOBase):
    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset if whence == 0 else self.place + offset if whence == 1 else len(self.content) + offset
        return self.place

    def readinto(self, buffer) -> int:
        found = self.content[self.place : self.place + min(len(buffer), 512)]
        if not found:
            raise OSError(errno.EIO, "Input/output error")
        buffer[: len(found)] = found
        self.place += len(found)
        return len(found)


@pytest.mark.parametrize("is_video", [False, True])
@pytest.mark.parametrize("opens", [False, True])
def test_a_failing_disk_is_no_skipped_sample(video, opens: bool, is_video: bool, monkeypatch) -> None:
    """Of the ranks that read the same file, one may meet it alone."""
    file = io.BytesIO()
    noise(64, 64).save(file, "PNG")
    content = video.read_bytes() if is_video else file.getvalue()
    source = Failing(content[: len(content) // 2] if opens else None)
    for reader in (Decord, PyAv) if is_video else (None,):
        monkeypatch.setattr(videos, "READER", reader)
        with pytest.raises(OSError, match="Failing.*: cannot be read") as caught:
            FrameSampling(4, None).frames(Video(source)) if is_video else load_image(source)
        assert caught.value.errno == (errno.EIO if opens else errno.EACCES)


@pytest.mark.parametrize("missing", ["decord", "av"])
def test_a_missing_decoder_is_no_broken_video(video, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "READER", Decord if missing == "decord" else PyAv)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match="videos need decord or PyAV") as caught:
        FrameSampling(4, None).frames(Video(video))
    assert not isinstance(caught.value, SampleError)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames, the red of frame n is 20 n."""
    path = tmp_path_factory.mktemp("video") / "ten.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 96, 64
        for number in range(10):
            image = Image.new("RGB", (96, 64), (20 * number, 100, 100))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def numbers(frames: list[Image.Image]) -> list[int]:
    return [round(numpy.asarray(frame)[..., 0].mean() / 20) for frame in frames]


@pytest.mark.parametrize("reader", [Decord, PyAv])
@pytest.mark.parametrize(
    ("count", "single", "expected"),
    [
        (4, None, [0, 3, 6, 9]),
        (1, None, [0]),
        (12, None, [*range(10), 9, 9]),
        (-1, None, [*range(10)]),
        (4, "first", [0]),
        (4, "middle", [6]),
        (4, "last", [9]),
    ],
)
def test_frames_are_equally_spaced(video, reader, count, single, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "READER", reader)
    sampling = FrameSampling(count, single)
    assert numbers(sampling.frames(Video(video))) == expected
    assert sampling.count(Video(video)) == len(expected)


@pytest.mark.parametrize("reader", [Decord, PyAv])
def test_broken_videos_say_so(tmp_path: Path, reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "READER", reader)
    (tmp_path / "x.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(SampleError, match=f"damaged, cut off or of an unknown format .{reader.__name__}: ") as caught:
        FrameSampling(4, None).frames(Video(tmp_path / "x.mp4"))
    assert caught.value.reason == "broken_video"


def config_of(**mm_cfg) -> Config:
    config = family("llava", "tiny").config()
    return replace(config, mm_cfg=replace(config.mm_cfg, **mm_cfg))


@pytest.mark.parametrize("adapter", ["mlp2x_gelu", "mlp_downsample"])
@pytest.mark.parametrize(("aspect", "tiles"), [("square", False), ("pad", True), ("square", True), ("keep", False)])
def test_features_are_counted_without_pixels(tmp_path: Path, video, adapter: str, aspect: str, tiles: bool) -> None:
    config = config_of(mm_mlp_adapter_type=adapter, use_image_tile=tiles)
    views = Views(config, DataConfig(image_aspect_ratio=aspect, num_frames=3))
    for media in (tmp_path / "wide.png", tmp_path / "high.png"):
        noise(*((90, 41) if media.stem == "wide" else (30, 47))).save(media)
    for media in (tmp_path / "wide.png", tmp_path / "high.png", Video(video)):
        grids = views.pixels([media]).grids
        found = sum(config.mm_cfg.features_of_grid(*grid[1:]) for grid in grids)
        assert views.runs(media) == (PlaceholderRun(found),)
        assert len(grids) == (5 if tiles else 1) * (3 if isinstance(media, Video) else 1)
    assert image_size(tmp_path / "wide.png") == (90, 41)


def test_tiles_are_not_cut_from_what_is_kept() -> None:
    run = run_of("llava", config_of(use_image_tile=True), ParallelConfig())
    options.check(run)
    with pytest.raises(ConfigError, match="image_aspect_ratio=keep: must be square or pad with model.mm_cfg"):
        options.check(replace(run, data=replace(run.data, image_aspect_ratio="keep")))


def test_media_come_in_the_order_of_the_text() -> None:
    record = {"id": 7, "image": ["a", "b"], "video": ["v"]}
    assert media_of(record, "<image> then <video> then <image>") == ["a", Video("v"), "b"]
    assert media_of({}, "no media") == []
    with pytest.raises(SampleError, match="record 7: 1 <image> in the text, 2 images"):
        media_of(record, "<image> <video>")
    with pytest.raises(SampleError, match="0 <video> in the text, 1 videos"):
        media_of(record, "<image> <image>")
