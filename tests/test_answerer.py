"""Answers by transformers' model: it is asked in the tokens and shown the pixels of training, and answers as ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image, ImageOps
from test_cli import TRAIN, run
from test_qwen2_vl_processor import filmed, noise
from tiny_hf import make_llava, make_qwen2_vl, make_qwen3_vl

from nemo_vlm.batch import IGNORE_INDEX, Sample
from nemo_vlm.config import DataConfig
from nemo_vlm.conversion.convert import Target, to_huggingface, to_nemo
from nemo_vlm.conversion.settings import with_settings
from nemo_vlm.data.records import RecordFile
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference.generate import Ends, generate
from nemo_vlm.inference.restore import restore
from nemo_vlm.inference.settings import DecodingConfig
from nemo_vlm.models.base import family
from nemo_vlm.models.images import unpatchify
from nemo_vlm.models.messages import encode_messages
from nemo_vlm.scoring.answerer import Answerer
from nemo_vlm.sources.chat_templates import leave_out_foreign
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.tokenizers import tokenizer_of

NUM_TOKENS = 64
ROOM = {"max_position_embeddings": 800}
QWEN2_VL = {"conv_template": "qwen2", "min_pixels": 6 * 28**2, "max_pixels": 12 * 28**2, "video_fps": 3.0}
QWEN3_VL = {"conv_template": "chatml", "max_pixels": 12 * 32**2, "video_total_pixels": 24 * 32**2, "num_frames": 6}
# How each is made, and model.data of its training, which an export must carry
MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "llava": (
        lambda folder: untold(make_llava(folder, ROOM)),
        {"conv_template": "v1", "image_aspect_ratio": "pad", "num_frames": 3},
    ),
    "llava_square": (
        lambda folder: untold(make_llava(folder, ROOM)),
        {"conv_template": "llama_2", "splice_single_frame": "middle"},
    ),
    "qwen2_vl": (lambda folder: make_qwen2_vl(folder, **ROOM), QWEN2_VL),
    "qwen3_vl": (lambda folder: make_qwen3_vl(folder, **ROOM), QWEN3_VL),
    "qwen3_vl_moe": (lambda folder: make_qwen3_vl(folder, moe=True, **ROOM), QWEN3_VL),
}
IMAGES = {  # files by their modes
    "plain.png": "RGB",
    "plain.jpg": "RGB",
    "sideways.jpg": "RGB",
    "alpha.png": "RGBA",
    "sixteen.png": "I;16",
    "print.jpg": "CMYK",
    "palette.gif": "P",
}
QUESTIONS = {  # texts and files, in their order
    **{name: [name, "What is in the picture?"] for name in IMAGES},
    "text": ["Who are you?"],
    "two images": ["First", "plain.png", "or", "sideways.jpg", "which?"],
    "a video and an image": ["clip.mp4", "plain.jpg", "Alike?"],
    "frames": ["clip", "What?"],
}
ANSWER, WHAT = "A red square.", "What is it?"


def untold(folder: Path) -> Path:
    """Without a chat template, as Vicuna, from which LLaVA is trained."""
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Archives; beside each stands its export, without the suffix."""
    root = tmp_path_factory.mktemp("trained")
    for name, (make, data) in MODELS.items():
        source = with_settings(open_source(make(root / "hub" / name), "input"), {"data": data}, "test")
        to_nemo(source, Target(root / f"{name}.nemo"))
        to_huggingface(open_source(root / f"{name}.nemo", "input"), Target(root / name))
    return {name: root / f"{name}.nemo" for name in MODELS}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of all kinds in odd sizes, a video file, and the frames of a video."""
    folder = tmp_path_factory.mktemp("media")
    exif = Image.Exif()
    for number, (name, mode) in enumerate(IMAGES.items()):
        exif[0x0112] = 6 if "sideways" in name else 1
        noise(61 + number, 93, mode).save(folder / name, exif=exif)
    filmed(folder / "clip.mp4")
    (folder / "clip").mkdir()
    for number in range(20):
        noise(60 + number, 45).resize((60, 45)).save(folder / "clip" / f"{number:02}.png")
    return folder


def kind(piece: str) -> str:
    return "video" if "clip" in piece else "image" if piece in IMAGES else "text"


def messages_of(question: list[str], folder: Path) -> list[dict[str, Any]]:
    """The question, answered, and asked once more."""
    values: dict[str, Any] = {piece: piece if kind(piece) == "text" else str(folder / piece) for piece in question}
    values["clip"] = sorted((folder / "clip").iterdir())  # which are given one by one
    content = [{"type": kind(piece), kind(piece): values[piece]} for piece in question]
    user = {"role": "user", "content": content}
    return [user, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}, user]


def record_of(question: list[str], media_break: str) -> dict[str, Any]:
    """The same as a record of training."""
    asked = "".join(piece if kind(piece) == "text" else f"<{kind(piece)}>{media_break}" for piece in question)
    files = {one: [piece for piece in question if kind(piece) == one] * 2 for one in ("image", "video")}
    turns = turns_of(asked, ANSWER, asked, ANSWER)
    return {"conversations": turns, **{one: names for one, names in files.items() if names}}


def turns_of(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]


def what_arrives(answerer: Answerer, messages: list[dict[str, Any]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Ids [s] with which transformers' model is called first, and the pixels with which its tower is, each time."""
    ids: list[torch.Tensor] = []
    pixels: list[torch.Tensor] = []
    model = answerer.model
    tower = model.model.vision_tower if answerer.family == "llava" else model.model.visual
    hooks = (
        model.register_forward_pre_hook(lambda _, __, given: ids.append(given["input_ids"][0]), with_kwargs=True),
        tower.register_forward_pre_hook(lambda _, given: pixels.append(given[0])),
    )
    answerer.answer(messages)
    for hook in hooks:
        hook.remove()
    return ids[0], pixels


def pixels_of(sample: Sample, name: str) -> list[torch.Tensor]:
    """A sample's as transformers takes them: LLaVA's views together, else images, then videos, which take time."""
    images = sample.images.normalised()
    if not len(images):
        return []
    if "llava" in name:
        return [torch.stack(unpatchify(images))]
    views = images.pixel_values.split(images.image_grid_thw.prod(1).tolist())
    times = images.image_grid_thw[:, 0].tolist()
    kinds = [[view for view, time in zip(views, times, strict=True) if (time > 1) is timed] for timed in (False, True)]
    return [torch.cat(one) for one in kinds if one]


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_sees_what_training_saw(name: str, trained, media: Path, tmp_path: Path) -> None:
    """Pixels to the last bit, and ids up to the last answer: of an export, and of its archive's training samples."""
    source, answerer = open_source(trained[name], "input"), Answerer(trained[name].with_suffix(""), max_new_tokens=1)
    parts, tokenizer = family(source.family, "processor"), tokenizer_of(source)
    config = parts.settle(source.model, tokenizer)
    processor = parts.Processor(config, source.settings["data"], tokenizer)
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record_of(question, config.in_text.media_break) for question in QUESTIONS.values()]))
    records = RecordFile(path, str(media), str(media))
    for number, question in enumerate(QUESTIONS.values()):
        sample, (ids, pixels) = processor.sample(records[number]), what_arrives(answerer, messages_of(question, media))
        assert torch.equal(ids, sample.tokens[: len(ids)])
        assert sample.labels[len(ids) - 2] == IGNORE_INDEX != sample.labels[len(ids) - 1]  # the last answer begins here
        expected = pixels_of(sample, name)
        assert len(pixels) == len(expected) and (len(pixels) > 0) is any(kind(piece) != "text" for piece in question)
        assert all(map(torch.equal, pixels, expected))


@pytest.mark.parametrize("name", MODELS)
def test_stock_processors_see_the_same(name: str, trained, media: Path) -> None:
    """Which an export brings. Qwen's images are upright, and white where transparent; LLaVA's neither, as in NeMo."""
    folder = trained[name].with_suffix("")
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    answerer = Answerer(folder)
    for file in IMAGES:
        image = Image.open(media / file)
        shown = image.convert("RGB") if "llava" in name else ImageOps.exif_transpose(image)
        expected = theirs(shown, return_tensors="pt")["pixel_values"]
        (found,) = pixels_of(answerer.sample(messages_of([file], media)[:1]), name)
        torch.testing.assert_close(found, expected, atol=1e-6 if "llava" in name else 0, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_answers_are_the_frameworks(name: str, trained, media: Path) -> None:
    """Of the archive, by our model: greedy, behind images and videos, whose positions are not a text's."""
    answerer = Answerer(trained[name].with_suffix(""), max_new_tokens=NUM_TOKENS)
    asked = [QUESTIONS[question] for question in ("two images", "a video and an image", "frames")]
    prompts = [answerer.sample(messages_of(question, media)[:1]) for question in asked]
    with restore(open_source(trained[name], "input"), "32") as restored:
        ends, count = Ends(frozenset(restored.stop_ids)), len(prompts)
        decoding = DecodingConfig(tokens_to_generate=NUM_TOKENS)
        ours = generate(restored.forward, prompts, [NUM_TOKENS] * count, decoding, ends, range(count))
    found = [answerer.tokens(prompt) for prompt in prompts]
    assert [one.tolist() for one in found] == [one.tokens.tolist() for one in ours]
    assert max(map(len, found)) == NUM_TOKENS


def test_a_hub_checkpoint_is_asked_in_its_own_way(trained, media: Path) -> None:
    """By the template and within the limits of its files."""
    folder = trained["qwen2_vl"].parent / "hub" / "qwen2_vl"
    answerer, messages = Answerer(folder), messages_of(["plain.png", "What?"], media)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(
        [Image.open(media / "plain.png")] * 2, return_tensors="pt"
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    features = int(pixels["image_grid_thw"][0].prod()) // 4
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * features))["input_ids"]
    sample = answerer.sample(messages)
    assert sample.tokens.tolist() == ids and 4 <= features <= 16
    assert torch.equal(sample.images.normalised().pixel_values, pixels["pixel_values"])


def test_a_run_asks_in_the_words_of_its_training(media: Path, tmp_path: Path) -> None:
    """Of a LLaVA whose chat template is another: its archive, its training checkpoint, and the exports of both."""
    told = {"system": "Be brief."}
    record = {"image": "plain.png", "conversations": turns_of(f"<image>\n{WHAT}", ANSWER)}
    records = [record, record | told]
    (media / "asked.json").write_text(json.dumps(records))
    make_llava(tmp_path / "hub", ROOM)
    made = run(
        str(TRAIN),
        *("model.restore_from_path=hub", f"model.data.data_path={media / 'asked.json'}", "model.data.prepare=null"),
        *("model.data.validation_path=null", "model.data.num_workers=0", "model.encoder_seq_length=400"),
        *("model.data.system_message=You are kind.", "model.micro_batch_size=2", "model.global_batch_size=2"),
        *("trainer.max_steps=1", "trainer.precision=32", "exp_manager.name=x"),
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    line = r"chat template .*/hub asks in other words than this run .*conv_template=v1 instead\n"
    assert len(re.findall(line, made.stdout + made.stderr)) == 1
    folder, image = tmp_path / "nemo_experiments/x/checkpoints", media / "plain.png"
    question = {"role": "user", "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": WHAT}]}
    said = [[question], [{"role": "system", "content": told["system"]}, question]]
    for name in ("x.nemo", "step_000001"):
        source = open_source(folder / name, "input")
        parts, tokenizer = family(source.family, "processor"), tokenizer_of(source)
        config, data = parts.settle(source.model, tokenizer), source.settings["data"]
        processor = parts.Processor(config, data, tokenizer)
        to_huggingface(source, Target(tmp_path / name))
        answerer = Answerer(tmp_path / name)
        for record, messages in zip(records, said, strict=True):
            expected = processor.asked(record | {"image": [image]})[0].tolist()
            assert encode_messages(messages, [image], [], processor)[0].tolist() == expected, name
            assert answerer.sample(messages).tokens.tolist() == expected, name
    assert "You are kind. USER: " in tokenizer.decode(processor.asked(records[0] | {"image": [image]})[0])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_chat_template_that_asks_as_a_run_trains_is_kept(name: str, trained) -> None:
    """What the hub's knows beside it is not lost: every other way of asking is another's."""
    source = open_source(trained[name].parent / "hub" / name, "input")
    tokenizer = tokenizer_of(source)
    template, own, other = tokenizer.chat_template, *("qwen2", "chatml")[:: 1 if name == "qwen2_vl" else -1]
    tokens = {"data_impl": "mmap", "data_path": "x"}
    for alike in ({}, {"conv_template": own}, {"image_aspect_ratio": "pad"}, tokens):
        assert leave_out_foreign(tokenizer, source.model, DataConfig(**alike)) is None
        assert tokenizer.chat_template == template, alike
    words = ({"conv_template": other}, {"conv_template": "v1"}, {"system_message": "Be brief."})
    for different in (*words, tokens | {"conv_template": other}):
        assert f"conv_template={different.get('conv_template', own)} " in leave_out_foreign(
            tokenizer, source.model, DataConfig(**different)
        )
        assert tokenizer.chat_template is None, different
        tokenizer.chat_template = template


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_weights_keep_their_dtype(name: str, trained, media: Path, tmp_path: Path) -> None:
    to_huggingface(open_source(trained[name], "input"), Target(tmp_path / "half", torch.bfloat16))
    question = messages_of(["clip.mp4", "plain.jpg", "Alike?"], media)
    for dtype, expected in (("auto", torch.bfloat16), ("32", torch.float32)):
        answerer = Answerer(tmp_path / "half", dtype, max_new_tokens=1)
        _, pixels = what_arrives(answerer, question)
        assert {answerer.model.dtype, *(one.dtype for one in pixels)} == {expected}


def test_an_answer_ends_where_the_context_does(trained) -> None:
    answerer = Answerer(trained["qwen2_vl"].with_suffix(""), max_new_tokens=10**6)
    answerer.model.generation_config.eos_token_id = None
    asked = [{"role": "user", "content": "7" * 700}]
    prompt = answerer.sample(asked)
    assert len(prompt.tokens) + len(answerer.tokens(prompt)) == 800
    with pytest.raises(ConfigError, match="leave no room for an answer in model.encoder_seq_length=800"):
        answerer.answer([{**asked[0], "content": "7" * 800}])


def test_a_tag_in_a_question_is_no_place_of_an_image(trained, media: Path) -> None:
    for name in ("llava", "qwen3_vl"):
        answerer = Answerer(trained[name].with_suffix(""), max_new_tokens=1)
        said = "Is <image> or <|image_pad|> or <video> a tag?"
        plain, spelled = (answerer.sample(messages_of(["plain.png", text], media)[:1]) for text in ("What?", said))
        seen = [
            int(torch.isin(one.tokens, torch.tensor(answerer.config.placeholder_ids)).sum()) for one in (plain, spelled)
        ]
        assert seen[0] == seen[1] > 0
        assert "< image>" in answerer.tokenizer.decode(spelled.tokens)


def test_a_mistake_is_one_line(trained) -> None:
    with pytest.raises(ConfigError, match="^[^\n]*: not a directory of Hugging Face"):
        Answerer(trained["llava"])
    with pytest.raises(ConfigError, match="^--precision=64: must be one of auto, "):
        Answerer(trained["llava"].with_suffix(""), "64")
