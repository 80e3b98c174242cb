"""Qwen2-VL's processor, against Hugging Face's image processor, chat template and model, and videos known by hand."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch
import transformers
from PIL import Image, ImageOps
from test_families import build, one_rank, run_of, to_hugging_face, whole
from tiny_hf import qwen2_vl_tokenizer

from nemo_vlm import options
from nemo_vlm.batch import IGNORE_INDEX, Sample, collate, join
from nemo_vlm.config import DataConfig, ParallelConfig
from nemo_vlm.config.dynamic import MAX_RATIO, DynamicVisionConfig, smart_resize
from nemo_vlm.data.media import Frames
from nemo_vlm.data.tokenizer import QWEN2, QWEN2_VL
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.layout import one_process
from nemo_vlm.models import video as videos
from nemo_vlm.models.base import family
from nemo_vlm.models.chat import chat_template
from nemo_vlm.models.conversation import chat_text
from nemo_vlm.models.dynamic_processor import IMAGES, TOKENS, VIDEOS
from nemo_vlm.models.messages import tagged
from nemo_vlm.models.qwen2_vl.config import Config
from nemo_vlm.models.qwen2_vl.processor import Processor, data_from_hf, hf_processor, settle, views_of
from nemo_vlm.models.text import in_front
from nemo_vlm.models.video import Decord, FrameFiles, PyAv, RateSampling, Video

QWEN = {"conv_template": "qwen2"}
RATE = RateSampling(multiple=2, fps=2.0, min_frames=4, max_frames=768, num_frames=None)
SMALL = DataConfig(conv_template="qwen2", max_pixels=16 * 28**2, video_min_pixels=28**2, video_max_pixels=4 * 28**2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return qwen2_vl_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def processor_of(tokenizer: Any, data: DataConfig = SMALL, **settings: Any) -> Processor:
    plain = replace(family("qwen2_vl", "tiny").config(), vocab_size=None, encoder_seq_length=1000)
    mm_cfg = replace(plain.mm_cfg, **dict.fromkeys(f"{name}_index" for name in TOKENS))
    return Processor(settle(replace(plain, **settings | {"mm_cfg": mm_cfg}), tokenizer), data, tokenizer)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = numpy.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=numpy.uint8)
    if mode.startswith("I;16"):
        return Image.fromarray(values[..., 0].astype(numpy.uint16) * 3)
    return Image.fromarray(values).convert(mode)


def saved(folder: Path, image: Image.Image, suffix: str = "png", **options: Any) -> Path:
    path = folder / f"{image.width}x{image.height}{image.mode.replace(';', '')}{len(options)}.{suffix}"
    image.save(path, **options)
    return path


SIZES = [(640, 480), (1, 1), (5, 900), (27, 29), (28, 28), (2000, 11), (100, 100), (1333, 77), (70, 42), (98, 35)]


@pytest.mark.parametrize(("lowest", "highest"), [(56**2, 28**2 * 1280), (4 * 28**2, 16 * 28**2)])
def test_pixels_are_hugging_faces(tmp_path: Path, lowest: int, highest: int) -> None:
    """To the last bit, in sizes that are rounded, scaled up and scaled down."""
    theirs = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": lowest, "longest_edge": highest})
    views = views_of(Config(), DataConfig(min_pixels=lowest, max_pixels=highest))
    paths = [saved(tmp_path, noise(*size)) for size in SIZES]
    ours = views.pixels(paths)
    expected = theirs([Image.open(path) for path in paths], return_tensors="pt")
    assert torch.equal(ours.image_grid_thw, expected["image_grid_thw"])
    assert torch.equal(ours.normalised().pixel_values, expected["pixel_values"])
    counts = [theirs.get_number_of_image_patches(*size[::-1]) // 4 for size in SIZES]
    assert [features(views, path) for path in paths] == counts


def features(views: Any, media: Any) -> int:
    """Tokens that stand for an image or a video."""
    return sum(run.count for run in views.runs(media))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "I;16", "CMYK"])
def test_every_kind_of_image_is_opened_as_hugging_face_does(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path, noise(80, 50, mode), "tiff" if mode == "CMYK" else "png")
    views, theirs = views_of(Config(), DataConfig()), transformers.Qwen2VLImageProcessorPil()
    expected = theirs(Image.open(path), return_tensors="pt")["pixel_values"]
    assert torch.equal(views.pixels([path]).normalised().pixel_values, expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_images_are_upright(tmp_path: Path, suffix: str) -> None:
    views, theirs = views_of(Config(), DataConfig()), transformers.Qwen2VLImageProcessorPil()
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        path = tmp_path / f"{turn}.{suffix}"
        noise(300, 100).save(path, exif=exif)
        expected = theirs(ImageOps.exif_transpose(Image.open(path)), return_tensors="pt")
        found = views.pixels([path])
        assert torch.equal(found.normalised().pixel_values, expected["pixel_values"])
        assert features(views, path) == found.image_grid_thw.prod() // 4


@pytest.mark.parametrize("pixels", [None, 100_000, 2_000_000])
def test_the_typical_image_is_a_photograph_that_is_seen(tmp_path: Path, pixels: int | None) -> None:
    data = DataConfig(min_pixels=pixels and pixels - 1000, max_pixels=pixels)
    found = views_of(Config(), data).pixels([saved(tmp_path, noise(640, 480))])
    assert Config().typical_views(data) == [tuple(grid) for grid in found.grids]


def test_a_narrow_image_is_left_out(tmp_path: Path) -> None:
    assert smart_resize(MAX_RATIO, 1, 28, 56**2, 10**6) == (812, 28)
    path = saved(tmp_path, noise(MAX_RATIO + 1, 1))
    views = views_of(Config(), DataConfig())
    for ask in (views.runs, lambda media: views.pixels([media])):
        with pytest.raises(SampleError, match=f"{path}: 201 x 1 pixels: one side is more than 200 times") as caught:
            ask(path)
        assert caught.value.reason == "narrow_image"


LENGTH, WIDTH, HEIGHT = 61, 96, 64


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 frames at 10 a second, with B-frames and six keyframes; frame n is grey 4 n."""
    return filmed(tmp_path_factory.mktemp("video") / "sixty-one.mp4")


def filmed(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"x264-params": "keyint=12:scenecut=0:bframes=2"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(LENGTH):
            image = Image.new("RGB", (WIDTH, HEIGHT), (4 * number,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def numbers(frames: Sequence[Image.Image]) -> list[int]:
    return [round(numpy.asarray(frame).mean() / 4) for frame in frames]


@pytest.mark.parametrize("reader", [Decord, PyAv])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_both_readers_read_the_same_frames(video: Path, suffix: str, reader: Any) -> None:
    path = video if suffix == "mp4" else filmed(video.with_suffix(".mkv"))
    wanted = [0, 1, 11, 12, 30, 30, 31, 60]
    with path.open("rb") as file:
        opened = reader(file)
        assert (len(opened), opened.fps, opened.size) == (LENGTH, 10.0, (WIDTH, HEIGHT))
        assert numbers([*opened.read(wanted)]) == wanted


class Counted(dict[int, int]):
    asked = 0

    def get(self, *key: Any) -> Any:
        self.asked += 1
        return super().get(*key)


def test_pyav_decodes_no_more_than_it_must(video: Path) -> None:
    """Two frames far apart cost what stands between them and their keyframes."""
    with video.open("rb") as file:
        opened = PyAv(file)
        assert opened.keys == [0, 12, 24, 36, 48, 60]
        opened.numbers = Counted(opened.numbers)
        assert numbers([*opened.read([1, 50])]) == [1, 50]
        assert opened.numbers.asked == 2 + 3
        opened.keys = [0, 40]  # no keyframe: the next one is found, and frames are counted from the beginning
        assert numbers([*opened.read([1, 41, 45])]) == [1, 41, 45]
        with pytest.raises(ValueError, match="frame 61 of 61 cannot be decoded"):
            [*opened.read([1, 61])]


def test_a_sideways_video_is_upright(video: Path) -> None:
    """The matrix in a telephone's film, which decord follows by itself."""
    content, unit = video.read_bytes(), lambda numbers: numpy.array(numbers, ">u4").tobytes()
    straight = unit([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30])
    turned = unit([0, 1 << 16, 0, (1 << 32) - (1 << 16), 0, 0, 0, 0, 1 << 30])
    place = content.index(straight, content.index(b"tkhd"))
    path = video.with_name("turned.mp4")
    path.write_bytes(content[:place] + turned + content[place + len(turned) :])
    for reader in (Decord, PyAv):
        with path.open("rb") as file:
            assert reader(file).size == (HEIGHT, WIDTH)


def smart_nframes(total: int, video_fps: float, fps: float, least: int, most: int) -> int:
    """qwen_vl_utils', with its factor of 2."""
    nframes = total / video_fps * fps
    nframes = min(min(max(nframes, math.ceil(least / 2) * 2), math.floor(most / 2) * 2), total)
    return math.floor(nframes / 2) * 2


class Known:
    picked = False

    def __init__(self, total: int, fps: float) -> None:
        self.total, self.fps = total, fps

    def __len__(self) -> int:
        return self.total


@pytest.mark.parametrize("total", [2, 3, 5, 61, 300, 2000])
@pytest.mark.parametrize(("fps", "wanted", "least", "most"), [(10, 2, 4, 768), (29.97, 1.5, 5, 33), (0.5, 2, 4, 768)])
def test_frames_are_chosen_by_qwens_rule(total: int, fps: float, wanted: float, least: int, most: int) -> None:
    sampling = RateSampling(2, wanted, least, most, None)
    count = smart_nframes(total, fps, wanted, least, most)
    found = sampling.indices(Known(total, fps))
    assert found == torch.linspace(0, total - 1, count).round().long().tolist()
    assert sampling.count(Known(total, fps)) == len(found)


def test_frames_are_chosen_by_their_number_too() -> None:
    by_number = [replace(RATE, num_frames=count).indices(Known(9, 10)) for count in (3, 5, 100, 1, -1)]
    assert [len(found) for found in by_number] == [4, 4, 8, 1, 9]
    assert RATE.indices(Known(1, 10)) == [0]
    with pytest.raises(ValueError, match="names no frame rate"):
        RATE.count(replace_fps(Known(9, 10)))


def replace_fps(known: Known) -> Known:
    known.fps = None
    return known


@pytest.mark.parametrize("reader", [Decord, PyAv])
def test_a_videos_patches_are_its_frames(video: Path, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame as Hugging Face sees an image; in a patch stand two that follow each other."""
    monkeypatch.setattr(videos, "READER", reader)
    limits = {"video_min_pixels": 4 * 28**2, "video_max_pixels": 20 * 28**2}
    views = views_of(Config(), DataConfig(**limits))
    theirs = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28**2, "longest_edge": 20 * 28**2})
    chosen = torch.linspace(0, LENGTH - 1, 12).round().long().tolist()  # 6.1 seconds, two a second, an even number
    with video.open("rb") as file:
        frames = [theirs(frame, return_tensors="pt")["pixel_values"] for frame in reader(file).read(chosen)]
    found = views.pixels([Video(video)])
    assert found.grids == [(6, 4, 6)]
    halves = found.normalised().pixel_values.view(6, 24, 3, 2, 14 * 14)
    for number, frame in enumerate(frames):
        assert torch.equal(halves[number // 2, :, :, number % 2], frame.view(24, 3, 2, -1)[:, :, 0])
    assert features(views, Video(video)) == 6 * 24 // 4


@pytest.mark.parametrize("count", [1, 3, 4])
def test_patches_are_pictures_again(count: int) -> None:
    frames = [noise(112, 56 + n).resize((112, 56)) for n in range(count)]
    patches = views_of(Config(), DataConfig()).format
    (first, second) = patches.frames(join([patches.patches(frames), patches.patches(frames[-1:])]))
    assert [frame.tobytes() for frame in first] == [frame.tobytes() for frame in frames]
    assert [frame.tobytes() for frame in second] == [frames[-1].tobytes()]


def test_a_videos_budget_lowers_its_size(video: Path) -> None:
    """max_pixels = max(min(768 * 28^2, total / nframes * 2), 1.05 * min_pixels), as fetch_video has it."""
    block = 28**2
    cases = [(2, 6, 24 * block, 4), (2, 6, 1, 2), (2, 6, 10**9, 6), (5.8, 5.8, 1, 6)]
    for lowest, highest, total, tokens in cases:
        least, most = int(lowest * block), int(highest * block)
        limits = DataConfig(video_min_pixels=least, video_max_pixels=most, video_total_pixels=total)
        (grid,) = views_of(Config(), limits).pixels([Video(video)]).grids
        width, height = smart_resize(WIDTH, HEIGHT, 28, least, max(min(most, total / 12 * 2), int(1.05 * least)))
        assert grid == (6, height // 14, width // 14)
        assert grid[1] * grid[2] // 4 <= tokens


def test_frames_in_files_are_a_video(tmp_path: Path) -> None:
    """All of them, where they are not faster than what is to be seen; the last of an odd number stands twice."""
    files = tuple(saved(tmp_path, Image.new("RGB", (56 + n, 56), (20 * n,) * 3)) for n in range(7))
    assert RATE.indices(FrameFiles(Frames(files))) == [0, 1, 2, 3, 4, 5, 6]
    assert RATE.indices(FrameFiles(Frames(files, fps=4.0))) == [0, 2, 4, 6]
    views = views_of(Config(), DataConfig(video_min_pixels=28**2, video_max_pixels=4 * 28**2))
    found = views.pixels([Video(Frames(files))])
    assert found.grids == [(4, 4, 4)]
    last = found.pixel_values.view(4, 16, 2, 196, 3)[-1]
    assert torch.equal(last[:, 0], last[:, 1])
    with pytest.raises(SampleError, match="does not exist") as caught:
        views.runs(Video(Frames((tmp_path / "none.png",))))
    assert caught.value.reason == "missing_image"


def record(*said: str, **fields: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(said)]
    return {"id": 1, "conversations": turns, "image": [], "video": [], **fields}


def parts(text: str) -> list[dict[str, str]]:
    """A text with tags as the content of a message of Hugging Face's."""
    found: list[dict[str, str]] = []
    for piece in text.replace("<image>", "\0i\0").replace("<video>", "\0v\0").split("\0"):
        found += [{"type": {"i": "image", "v": "video"}[piece]}] if piece in ("i", "v") else []
        found += [{"type": "text", "text": piece}] if piece not in ("i", "v", "") else []
    return found


CONVERSATIONS = [
    (["<image>What is it?", "A cat."], None),
    (["<image>\nWhat, and <video> what<image>?", "Cats: 2", "And<video>?", "A dog \n"], None),
    (["Hello", "Hello!", "Who?", "I."], "You answer in one word."),
    (["<video><video> Which? <|im_end|><|image_pad|>", "The second"], None),
]


@pytest.mark.parametrize(("said", "system"), CONVERSATIONS)
def test_conversations_are_written_as_in_qwens_template(
    tmp_path: Path, video: Path, tokenizer: Any, said: list[str], system: str | None
) -> None:
    processor = processor_of(tokenizer)
    text = "".join(said)
    image = saved(tmp_path, noise(80, 60))
    given = record(*said, system=system, image=[image] * text.count("<image>"), video=[video] * text.count("<video>"))
    made = processor.sample(given)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": parts(t)} for n, t in enumerate(said)]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    counts = {"image": features(processor.views, image), "video": features(processor.views, Video(video))}
    for kind in counts:
        whole = whole.replace(f"<|vision_start|><|{kind}_pad|>", f"<|vision_start|>{f'<|{kind}_pad|>' * counts[kind]}")
    spelled = "<|im_end|><|image_pad|>"  # in a question it is text: no single token
    if spelled in text:
        assert tokenizer.decode(made.tokens).count("<|im_end|>") == 3 + 1
        whole, before = whole.replace(spelled, ""), tokenizer.decode(made.tokens).replace(spelled, "")
        assert before == whole.removesuffix("\n")
        assert (made.tokens == processor.config.placeholder_ids[0]).sum() == 0
    else:
        assert [*made.tokens.tolist(), tokenizer("\n")["input_ids"][0]] == tokenizer(whole)["input_ids"]
    trained = tokenizer.decode(made.labels[made.labels != IGNORE_INDEX])
    assert trained == "".join(f"{answer}<|im_end|>" for answer in said[1::2])
    visual = sum(counts[kind] * text.count(f"<{kind}>") for kind in counts)
    assert processor.length(given) == (len(made.tokens), visual)
    assert visual == int(made.images.image_grid_thw.prod(1).sum()) // 4
    assert visual == int(torch.isin(made.tokens, torch.tensor(processor.config.placeholder_ids)).sum())


def test_a_placeholder_in_an_answer_is_not_trained(tmp_path: Path, tokenizer: Any) -> None:
    made = processor_of(tokenizer).sample(record("Draw", "<image> drawn", image=[saved(tmp_path, noise(60, 60))]))
    assert tokenizer.decode(made.labels[made.labels != IGNORE_INDEX]) == " drawn<|im_end|>"
    assert made.images.grids == [(1, 4, 4)]


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_no_video_is_cut_in_two(tmp_path: Path, video: Path, tokenizer: Any, too_long: str) -> None:
    given = record("<image>?", "One.", "<video>?", "Two.", image=[saved(tmp_path, noise(60, 60))], video=[video])
    whole = processor_of(tokenizer).length(given)[0]
    processor = processor_of(tokenizer, replace(SMALL, too_long=too_long), encoder_seq_length=whole - 12)
    if too_long == "drop":
        with pytest.raises(SampleError, match=f"{whole} tokens do not fit") as caught:
            processor.length(given)
        assert caught.value.reason == "too_long"
        return
    made = pickle.loads(pickle.dumps(processor)).sample(given)
    assert made.images.grids == [(1, 4, 4)]
    assert processor.length(given) == (len(made.tokens), 4)
    assert processor.media(given) == given["image"]


def test_a_sample_of_too_many_visual_tokens_is_left_out(video: Path, tokenizer: Any) -> None:
    given = record("<video>?", "Two.", video=[video])
    _, visual = processor_of(tokenizer).length(given)
    assert processor_of(tokenizer, replace(SMALL, max_visual_tokens=visual)).sample(given).images.grids
    with pytest.raises(SampleError, match=f"record 1: {visual} tokens of images and videos, more than") as caught:
        processor_of(tokenizer, replace(SMALL, max_visual_tokens=visual - 1)).length(given)
    assert caught.value.reason == "too_many_visual_tokens"


def test_prompts_are_hugging_faces(tmp_path: Path, video: Path, tokenizer: Any) -> None:
    """A record's first question, a raw text in its template, and one with tags have the same ids."""
    processor, image = processor_of(tokenizer), saved(tmp_path, noise(80, 60))
    question = "<image>and<video>: same?"
    made = processor.prompt(record(question, "No", image=[image], video=[video]))
    message = {"role": "user", "content": parts(question)}
    written = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    with_tags = tokenizer.apply_chat_template(
        [{**message, "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert tagged(written, processor.config) == with_tags
    assert torch.equal(processor.tokens(with_tags, [image, Video(video)]), made.tokens)
    assert made.images.grids == [(1, 4, 6), (6, 2, 4)]
    with pytest.raises(ConfigError, match="2 placeholders in the text, 1 images and videos"):
        processor.tokens(with_tags, [image])


@pytest.mark.parametrize(
    "template", [QWEN2_VL, QWEN2, "{% for message in messages %}{{ message.content }}{% endfor %}"]
)
def test_messages_in_parts_suit_every_template(tokenizer: Any, template: str) -> None:
    """One that takes parts, and those that take texts only, of which the second would write a list as Python does."""
    codec = copy.copy(tokenizer)
    codec.chat_template = template
    said = "<image>and<video>: same?"
    config = processor_of(tokenizer).config
    (message,) = given = [{"role": "user", "content": parts(said)}]
    found = tagged(chat_text(given, codec, config.in_text.media_break), config)
    assert found == chat_text([{**message, "content": said}], codec, config.in_text.media_break)
    assert said in found
    if "im_start" in template:
        theirs = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        assert found == tagged(theirs, config)


def test_a_processed_prompt_has_hugging_faces_logits(tmp_path: Path, video: Path, tokenizer: Any) -> None:
    """Its own positions, template and image processor; of the video, which it cannot read here, frame by frame."""
    processor = processor_of(tokenizer, replace(SMALL, num_frames=4))
    image = saved(tmp_path, noise(130, 60))
    made = processor.prompt(record("<image>, then <video>?", "", image=[image], video=[video]))
    message = {"role": "user", "content": parts("<image>, then <video>?")}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 10).replace("<|video_pad|>", "<|video_pad|>" * 4)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert torch.equal(made.tokens, ids[0])
    theirs = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 4 * 28**2})
    with video.open("rb") as file:
        frames = [theirs(one, return_tensors="pt")["pixel_values"] for one in Decord(file).read([0, 20, 40, 60])]
    halves = torch.stack(frames).view(2, 2, 8, 3, 2, 196)[..., 0, :]  # pairs, frames, patches, channels, pixels
    seen = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": SMALL.max_pixels})(
        Image.open(image), return_tensors="pt"
    )
    seen |= {"pixel_values_videos": halves.permute(0, 2, 3, 1, 4).reshape(16, -1)}
    assert_logits("qwen2_vl", processor, made, {**seen, "video_grid_thw": torch.tensor([[2, 2, 4]])}, tmp_path)


def assert_logits(name: str, processor: Any, made: Sample, seen: dict[str, Any], folder: Path) -> None:
    """Of random weights, equal to those of Hugging Face's class, which sees this and finds positions by itself."""
    config, ids = processor.config, made.tokens[None]
    with one_rank(config):
        model, weights = build(name, config, one_process(config))
        logits = model(collate([replace(made, labels=torch.full_like(made.tokens, IGNORE_INDEX))]))
        hugging_face = to_hugging_face(name, config, whole(weights), folder)
    kinds = sum((ids == token).int() * kind for kind, token in enumerate(config.placeholder_ids, 1))
    expected = hugging_face(input_ids=ids, mm_token_type_ids=kinds, **seen).logits
    assert (logits[..., : config.vocab_size] - expected).abs().max() <= 1e-4


def test_our_chat_template_is_qwens(tokenizer: Any) -> None:
    """That of an export whose tokenizer brings none."""
    config = processor_of(tokenizer).config
    for (said, system), front in itertools.product(CONVERSATIONS, (False, True)):
        made = chat_template(config, replace(SMALL, sep_image_conv_front=front), with_bos=False)
        messages = [{"role": "system", "content": system}] if system else []
        meant = [in_front(said[0]) if front else said[0], *said[1:]]
        for form in (parts, str):
            turns = [{"role": ("user", "assistant")[n % 2], "content": form(text)} for n, text in enumerate(said)]
            found = tokenizer.apply_chat_template([*messages, *turns], tokenize=False, chat_template=made)
            turns = [{**turn, "content": parts(text)} for turn, text in zip(turns, meant, strict=True)]
            assert found == tokenizer.apply_chat_template([*messages, *turns], tokenize=False)


def test_hugging_faces_files_say_the_same(tmp_path: Path) -> None:
    config = Config()
    data = DataConfig(min_pixels=28**2, video_max_pixels=200 * 28**2, video_total_pixels=9000 * 28**2, video_fps=1.0)
    files = hf_processor(config, data)
    image = transformers.Qwen2VLImageProcessorPil(**files[IMAGES])
    expected = image(noise(200, 100), return_tensors="pt")
    ours = views_of(config, data).pixels([saved(tmp_path, noise(200, 100))]).normalised()
    assert torch.equal(ours.pixel_values, expected["pixel_values"])
    found, different = data_from_hf(files, config)
    assert (views_of(config, DataConfig(**found)), different) == (views_of(config, data), [])
    by_number = replace(data, video_fps=None, num_frames=8)
    found, _ = data_from_hf(hf_processor(config, by_number), config)
    assert found["num_frames"] == 8 and "video_fps" not in found
    every = hf_processor(config, replace(by_number, num_frames=-1))[VIDEOS]
    assert not {"num_frames", "fps"} & every.keys()


def test_a_hub_checkpoints_limits_are_taken_over() -> None:
    hub = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    assert data_from_hf({IMAGES: hub}, Config()) == (QWEN | {"max_pixels": 12845056}, [])
    new = {"image_processor": {"size": {"shortest_edge": 4, "longest_edge": 5}, "image_mean": [0.5] * 3}}
    found, different = data_from_hf({"processor_config.json": new}, Config())
    assert found == QWEN | {"min_pixels": 4, "max_pixels": 5}
    assert different == ["image_mean of images is [0.5, 0.5, 0.5], here [0.48145466, 0.4578275, 0.40821073]"]
    found, _ = data_from_hf({VIDEOS: {"fps": 1, "max_pixels": 9}}, Config())
    assert found == QWEN | {"video_max_pixels": 9, "video_fps": 1}
    found, different = data_from_hf({VIDEOS: {"fps": 1, "min_frames": 4, "num_frames": 8}}, Config())
    assert (DataConfig(**found).num_frames, different) == (8, ["fps of videos is 1, here num_frames decides"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_aspect_ratio": "keep"}, "image_aspect_ratio=keep: not for the qwen2_vl family; it follows min_pixels"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio=pad: .*; take square, or data=sharegpt for LLaVA JSON"),
        ({"splice_single_frame": "last"}, "splice_single_frame=last: not for the qwen2_vl family"),
        ({"crop_size": (336, 336)}, "crop_size=.*: not for the qwen2_vl family"),
        ({"max_pixels": 3000}, "max_pixels=3000: must not be below model.data.min_pixels=3136"),
        ({"video_max_frames": 2}, "video_max_frames=2: must not be below model.data.video_min_frames=4"),
    ],
)
def test_settings_of_images_are_for_who_follows_them(settings: dict[str, Any], message: str) -> None:
    run = run_of("qwen2_vl", family("qwen2_vl", "tiny").config(), ParallelConfig())
    options.check(replace(run, data=DataConfig(min_pixels=784, num_frames=8)))
    with pytest.raises(ConfigError, match=f"model.data.{message}"):
        options.check(replace(run, data=DataConfig(**settings)))
    llava = run_of("llava", family("llava", "tiny").config(), ParallelConfig())
    with pytest.raises(ConfigError, match="model.data.min_pixels=784: not for the llava family; it follows num_frames"):
        options.check(replace(llava, data=DataConfig(min_pixels=784)))


@pytest.mark.parametrize("key", ["max_pixels", "video_fps", "max_visual_tokens", "num_frames"])
def test_limits_are_above_zero(key: str) -> None:
    with pytest.raises(ConfigError, match=f"model.data.{key}=0: must be"):
        DataConfig(**{key: 0})


def test_frames_have_one_rule() -> None:
    with pytest.raises(ConfigError, match="model.data.num_frames=8: model.data.video_fps is given too; give one"):
        DataConfig(num_frames=8, video_fps=2.0)


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "patch_dim"])
def test_a_tower_has_sizes_above_zero(key: str) -> None:
    for size in (0, -64):
        with pytest.raises(ConfigError, match=f"^model.mm_cfg.vision_encoder.{key}={size}: must be 1 or more"):
            DynamicVisionConfig(**{key: size})
