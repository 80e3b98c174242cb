"""Qwen3-VL's processor, against Hugging Face's: its image processor and chat template, what its processor writes
for a video, and what classes of 4.57.1 gave for sizes, frames and times of videos, which need torchvision.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import transformers
from PIL import Image
from test_families import run_of
from test_qwen2_vl_processor import SIZES, Known, assert_logits, filmed, noise, parts, record, saved
from tiny_hf import VISION_TOKENS, qwen3_vl_tokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from nemo_vlm import options
from nemo_vlm.batch import IGNORE_INDEX
from nemo_vlm.config import DataConfig, ParallelConfig
from nemo_vlm.data.media import Frames
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.models.base import family
from nemo_vlm.models.chat import chat_template
from nemo_vlm.models.dynamic_processor import IMAGES, TOKENS, VIDEOS
from nemo_vlm.models.messages import tagged
from nemo_vlm.models.qwen3_vl.config import Config
from nemo_vlm.models.qwen3_vl.processor import Processor, data_from_hf, hf_processor, settle, views_of
from nemo_vlm.models.qwen3_vl.video import EvenSampling, assumed_rate, moments
from nemo_vlm.models.tokens import PlaceholderRun
from nemo_vlm.models.video import Decord, FrameFiles, Video

CHATML = {"conv_template": "chatml"}
TINY = family("qwen3_vl", "tiny").config()
SMALL = DataConfig(conv_template="chatml", min_pixels=32**2, max_pixels=16 * 32**2, video_total_min_pixels=32**2)
# Sizes: limits, frames, width, height, and the width and height to which smart_resize led
RECORDED = json.loads((Path(__file__).parent / "videos_qwen3_vl_transformers_4_57_1.json").read_text())
START, END, IMAGE, VIDEO = VISION_TOKENS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return qwen3_vl_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 frames of 96 x 64 at 10 a second; frame n is grey 4 n."""
    return filmed(tmp_path_factory.mktemp("video") / "sixty-one.mp4")


def processor_of(tokenizer: Any, data: DataConfig = SMALL, **settings: Any) -> Processor:
    mm_cfg = replace(TINY.mm_cfg, **dict.fromkeys(f"{name}_index" for name in TOKENS))
    plain = replace(TINY, vocab_size=None, mm_cfg=mm_cfg, **{"encoder_seq_length": 2000} | settings)
    return Processor(settle(plain, tokenizer), data, tokenizer)


@pytest.mark.parametrize(("lowest", "highest"), [(65_536, 16_777_216), (4 * 32**2, 16 * 32**2)])
def test_pixels_are_hugging_faces(tmp_path: Path, lowest: int, highest: int) -> None:
    """To the last bit, by the file that an export brings; the first limits are the defaults."""
    data = DataConfig() if lowest == 65_536 else DataConfig(min_pixels=lowest, max_pixels=highest)
    views, file = views_of(Config(), data), hf_processor(Config(), data)[IMAGES]
    assert file["size"] == {"shortest_edge": lowest, "longest_edge": highest}
    theirs = transformers.Qwen2VLImageProcessorPil(**file)
    paths = [saved(tmp_path, noise(*size)) for size in SIZES]
    ours, expected = views.pixels(paths), theirs([Image.open(path) for path in paths], return_tensors="pt")
    assert torch.equal(ours.image_grid_thw, expected["image_grid_thw"])
    assert torch.equal(ours.normalised().pixel_values, expected["pixel_values"])
    counts = [theirs.get_number_of_image_patches(*size[::-1]) // 4 for size in SIZES]
    assert [views.runs(path) for path in paths] == [(PlaceholderRun(count),) for count in counts]


def test_a_videos_size_is_hugging_faces() -> None:
    """Under each limit, of odd numbers of frames too, whose half is rounded to the even number."""
    kinds = set()
    for low, high, frames, *size, width, height in RECORDED["sizes"]:
        views = views_of(Config(), DataConfig(video_total_min_pixels=low, video_total_pixels=high))
        assert views.videos.resized(tuple(size), frames, views.format) == (width, height)
        kinds.add((low, numpy.sign(round(size[0] / width, 1) - 1)))
    assert {sign for low, sign in kinds if low == 131072} == {-1, 0, 1}
    assert views.videos.resized((96, 64), 1, views.format) == views.videos.resized((96, 64), 2, views.format)
    assert views.videos.resized((16, 8), 300, views.format) == (64, 32)
    with pytest.raises(SampleError, match="one side is more than 200 times the other"):
        views.videos.resized((32, 6432), 4, views.format)


def test_frames_and_their_times_are_hugging_faces() -> None:
    for given in RECORDED["samples"]:
        sampling = EvenSampling(given["wanted"], 4, given["max_frames"], None)
        video = Known(given["total"], given["fps"])
        assert sampling.indices(video) == given["frames"]
        assert sampling.count(video) == len(given["frames"])
        assert [f"{time:.1f}" for time in moments(given["frames"], given["fps"], 2)] == given["times"]


def test_frames_are_chosen_by_their_number_too() -> None:
    by_number = [EvenSampling(2.0, 4, 768, count).indices(Known(9, 10)) for count in (3, 100, 1, -1)]
    assert by_number == [[0, 4, 8], [*range(9)], [0], [*range(9)]]


def test_a_video_without_a_rate_has_24_frames_a_second(caplog: pytest.LogCaptureFixture) -> None:
    assumed_rate.cache_clear()
    unknown = Known(240, 24)
    expected = EvenSampling(2.0, 4, 768, None).indices(unknown)
    unknown.fps = None
    assert EvenSampling(2.0, 4, 768, None).indices(unknown) == expected and len(expected) == 20
    assert [message for message in caplog.messages if "24.0 frames a second are assumed" in message] == caplog.messages


def expanded(text: str, counts: list[int], videos: list[tuple[list[int], float, tuple[int, int, int]]]) -> str:
    """A rendered chat template as transformers 4.57 gives it to the tokenizer: the whole of <|vision_start|>,
    <|video_pad|>, <|vision_end|> is replaced by what replace_video_token of transformers 5 says.

    Args:
        counts: features of the images.
        videos: the frames that are seen, their rate and the patches of the videos.
    """
    for count in counts:
        text = text.replace(IMAGE, "\0" * count, 1)
    names = dict(video_token=VIDEO, vision_start_token=START, vision_end_token=END)
    for frames, fps, grid in videos:
        processor = SimpleNamespace(video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), **names)
        processor._calculate_timestamps = lambda *given: Qwen3VLProcessor._calculate_timestamps(None, *given)
        metadata = SimpleNamespace(fps=fps, frames_indices=list(frames))
        inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
        moments = Qwen3VLProcessor.replace_video_token(processor, inputs, 0).replace(VIDEO, "\1")
        text = text.replace(f"{START}{VIDEO}{END}", moments, 1)
    return text.replace("\0", IMAGE).replace("\1", VIDEO)


CONVERSATIONS = [
    (["<image>What is it?", "A cat."], None),
    (["<image>\nWhat, and (<video>) what<image>?", "Cats: 2", "And?<video>", "A dog \n"], None),
    (["Hello", "Hello!", "Who?", "I."], "You answer in one word."),
    (["Which?<video><video>", "The second"], "Say"),
    (["你好。<video>谁<image>?", "猫。"], None),
]


@pytest.mark.parametrize(("said", "system"), CONVERSATIONS)
def test_conversations_have_hugging_faces_ids(
    tmp_path: Path, video: Path, tokenizer: Any, said: list[str], system: str | None
) -> None:
    processor, text = processor_of(tokenizer), "".join(said)
    image, num_images, num_videos = saved(tmp_path, noise(100, 60)), text.count("<image>"), text.count("<video>")
    given = record(*said, system=system, image=[image] * num_images, video=[video] * num_videos)
    made = processor.sample(given)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": parts(t)} for n, t in enumerate(said)]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    with video.open("rb") as file:
        frames = processor.views.sampling.indices(Decord(file))
    grid = processor.views.pixels([Video(video)]).grids[0]
    assert (len(frames), grid) == (12, (6, 4, 6))
    whole = expanded(written, [6] * num_images, [(frames, 10.0, grid)] * num_videos)
    assert [*made.tokens.tolist(), tokenizer("\n")["input_ids"][0]] == tokenizer(whole)["input_ids"]
    trained = tokenizer.decode(made.labels[made.labels != IGNORE_INDEX])
    assert trained == "".join(f"{answer}<|im_end|>" for answer in said[1::2])
    visual = 6 * num_images + 36 * num_videos
    assert processor.length(given) == (len(made.tokens), visual)
    assert visual == int(made.images.image_grid_thw.prod(1).sum()) // 4
    media = processor.media(given)
    assert torch.equal(processor.tokens(tagged(written, processor.config), media)[:-1], made.tokens)


def test_times_in_the_text_are_the_moments(tokenizer: Any, tmp_path: Path) -> None:
    """Of frames as files, four a second: an odd number of them, so that the last one stands alone."""
    files = tuple(saved(tmp_path, Image.new("RGB", (64 + n, 64), (20 * n,) * 3)) for n in range(9))
    processor = processor_of(tokenizer)
    asked = processor.prompt(record("Which?<video>", video=[Frames(files, fps=4.0)]))
    assert EvenSampling(2.0, 4, 768, None).indices(FrameFiles(Frames(files, fps=4.0))) == [0, 3, 5, 8]
    run = f"{START}{VIDEO * 4}{END}"
    assert f"Which?<0.4 seconds>{run}<1.6 seconds>{run}<|im_end|>" in tokenizer.decode(asked.tokens)
    joined = tokenizer.convert_ids_to_tokens(asked.tokens.tolist())
    assert "?<" in joined and "?" not in joined
    alone = processor_of(tokenizer, replace(SMALL, num_frames=1)).prompt(record("<video>", video=[Frames(files)]))
    assert alone.images.grids == [(1, 4, 4)] and "<0.0 seconds>" in tokenizer.decode(alone.tokens)


def test_a_video_in_an_answer_is_not_trained(video: Path, tokenizer: Any) -> None:
    """Nor are its times."""
    made = processor_of(tokenizer).sample(record("Which?", "This?<video> drawn", video=[video]))
    assert tokenizer.decode(made.labels[made.labels != IGNORE_INDEX]) == "This? drawn<|im_end|>"


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_no_video_is_cut_in_two(tmp_path: Path, video: Path, tokenizer: Any, too_long: str) -> None:
    """Whichever of its times the limit falls on."""
    given = record("<image>?", "One.", "<video>?", "Two.", image=[saved(tmp_path, noise(60, 60))], video=[video])
    whole, visual = processor_of(tokenizer).length(given)
    assert visual == 4 + 36
    for limit in range(whole - 1, whole - 120, -19):
        processor = processor_of(tokenizer, replace(SMALL, too_long=too_long), encoder_seq_length=limit)
        if too_long == "drop":
            with pytest.raises(SampleError, match=f"{whole} tokens do not fit"):
                processor.length(given)
            continue
        made = processor.sample(given)
        kept = made.images.grids == [(1, 4, 4), (6, 4, 6)]
        assert kept or made.images.grids == [(1, 4, 4)]
        assert processor.length(given) == (len(made.tokens), 40 if kept else 4)
        assert processor.media(given) == [given["image"][0], Video(video)][: 1 + kept]
        assert tokenizer.decode(made.tokens).count("seconds>") == 6 * kept


def test_a_sample_of_too_many_visual_tokens_is_left_out(video: Path, tokenizer: Any) -> None:
    """Its times are text, and do not count."""
    given = record("<video>?", "Two.", video=[video])
    assert processor_of(tokenizer, replace(SMALL, max_visual_tokens=36)).sample(given).images.grids
    with pytest.raises(SampleError, match="record 1: 36 tokens of images and videos, more than"):
        processor_of(tokenizer, replace(SMALL, max_visual_tokens=35)).length(given)


def test_a_wrong_number_of_videos_is_told(video: Path, tokenizer: Any) -> None:
    processor = processor_of(tokenizer)
    with pytest.raises(ConfigError, match="2 placeholders in the text, 1 images and videos"):
        processor.tokens("<video><video>", [Video(video)])
    with pytest.raises(SampleError, match="record 1: 1 <video> in the text, 0 videos"):
        processor.sample(record("<video>", "a"))


def test_a_processed_prompt_has_hugging_faces_logits(tmp_path: Path, video: Path, tokenizer: Any) -> None:
    """Its own positions, template and image processor; of the video, which it cannot read here, frame by frame."""
    processor = processor_of(tokenizer, replace(SMALL, num_frames=4))
    image = saved(tmp_path, noise(130, 60))
    made = processor.prompt(record("<image>, then?<video>", image=[image], video=[video]))
    message = {"role": "user", "content": parts("<image>, then?<video>")}
    written = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(expanded(written, [8], [([0, 20, 40, 60], 10.0, (2, 4, 6))]))["input_ids"]])
    assert torch.equal(made.tokens, ids[0])
    images = transformers.Qwen2VLImageProcessorPil(**hf_processor(processor.config, processor.data)[IMAGES])
    with video.open("rb") as file:
        frames = [images(one, return_tensors="pt")["pixel_values"] for one in Decord(file).read([0, 20, 40, 60])]
    halves = torch.stack(frames).view(2, 2, 24, 3, 2, 256)[..., 0, :]  # pairs, frames, patches, channels, pixels
    seen = dict(images(Image.open(image), return_tensors="pt"))
    seen |= {"pixel_values_videos": halves.permute(0, 2, 3, 1, 4).reshape(48, -1)}
    assert_logits("qwen3_vl", processor, made, {**seen, "video_grid_thw": torch.tensor([[2, 4, 6]])}, tmp_path)


def test_our_chat_template_is_qwens(tokenizer: Any) -> None:
    """That of an export whose tokenizer brings none: chatml, without a system message that nobody gave."""
    made = chat_template(processor_of(tokenizer).config, SMALL, with_bos=False)
    for (said, system), asking in itertools.product(CONVERSATIONS, (False, True)):
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[n % 2], "content": parts(t)} for n, t in enumerate(said)]
        messages = messages[: len(messages) - asking]
        written = [
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asking, chat_template=template
            )
            for template in (made, tokenizer.chat_template)
        ]
        assert written[0] == written[1]


def test_hugging_faces_files_say_the_same() -> None:
    config = Config()
    data = DataConfig(min_pixels=32**2, video_total_pixels=9000 * 32**2, video_fps=1.0, video_max_frames=99)
    files = hf_processor(config, data)
    found, different = data_from_hf(files, config)
    assert (views_of(config, DataConfig(**found)), different) == (views_of(config, data), [])
    for count, total in ((8, 5), (8, 100), (-1, 2000)):
        by_number = replace(data, video_fps=None, video_max_frames=None, num_frames=count)
        found, _ = data_from_hf(hf_processor(config, by_number), config)
        sampled = [views_of(config, one).sampling.indices(Known(total, 10)) for one in (by_number, DataConfig(**found))]
        assert sampled[0] == sampled[1] and len(sampled[0]) == (min(count, total) if count > 0 else total)


def test_a_hub_checkpoints_limits_are_taken_over() -> None:
    """As the hub's Qwen3-VL have them."""
    seen = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    images = seen | {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    videos = seen | {"size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    limits = {"video_total_min_pixels": 4096, "video_total_pixels": 25165824}
    assert data_from_hf({IMAGES: images, VIDEOS: videos}, Config()) == (CHATML | limits, [])
    assert data_from_hf({}, Config()) == (CHATML, [])
    _, different = data_from_hf({IMAGES: images | {"patch_size": 14}}, Config())
    assert different == ["patch_size of images is 14, here 16"]
    _, different = data_from_hf({VIDEOS: videos | {"cap_pixels_per_frame": True}}, Config())
    assert different == ["cap_pixels_per_frame of videos is true, here only all frames together have limits"]
    both = {"do_sample_frames": False, "fps": 2, "min_frames": 4, "num_frames": 8}
    found, different = data_from_hf({VIDEOS: videos | both}, Config())
    assert found == CHATML | limits | {"num_frames": 8}
    assert different == [
        "fps of videos is 2, here num_frames decides",
        "do_sample_frames of videos is false, here video_fps or num_frames of model.data decides",
    ]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3_vl", {"video_max_pixels": 9}, "video_max_pixels=9: not for the qwen3_vl family; it follows min_pixels"),
        ("qwen2_vl", {"video_total_min_pixels": 9}, "video_total_min_pixels=9: not for the qwen2_vl family"),
        ("qwen3_vl", {"video_total_pixels": 9}, "video_total_pixels=9: must not be below model.data.video_total_min_"),
    ],
)
def test_settings_of_videos_are_for_who_follows_them(name: str, settings: dict[str, Any], message: str) -> None:
    run = run_of(name, family(name, "tiny").config(), ParallelConfig())
    options.check(replace(run, data=DataConfig(min_pixels=1024, video_total_pixels=10**6)))
    with pytest.raises(ConfigError, match=f"^model.data.{message}"):
        options.check(replace(run, data=DataConfig(**settings)))
