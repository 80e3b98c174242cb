"""Qwen2-VL's demo: its data against scikit-learn's, what is shown of them, and the questions at the end of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from test_families import TINY, run_of
from test_samples import QUESTION, ended
from test_show_data import lines

from nemo_vlm.checkpoints import archive_path
from nemo_vlm.config import DataConfig, TokenizerConfig
from nemo_vlm.config.samples import SamplesConfig
from nemo_vlm.data import digit_pairs
from nemo_vlm.data.digits import NAMES, answer
from nemo_vlm.data.media import Frames
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference import samples
from nemo_vlm.models.base import family
from nemo_vlm.models.video import Video
from nemo_vlm.planning.contact_sheet import THUMBNAIL, contact_sheet
from nemo_vlm.sources.tokenizers import load_tokenizer

TARGETS = load_digits().target


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "datasets/digit_pairs"
    digit_pairs.write(folder)
    return folder


def numbers_of(record: dict) -> list[int]:
    """Which digits a record is about."""
    return [int(Path(name).stem) for name in record.get("images", []) + record.get("videos", [])]


def test_answers_are_what_the_digits_are(folder: Path) -> None:
    train, heldout = (json.loads((folder / name).read_text()) for name in digit_pairs.FILES)
    assert not {n for record in train for n in numbers_of(record)} & {n for r in heldout for n in numbers_of(r)}
    kinds = [record["category"] for record in heldout]
    assert [kinds.count(kind) for kind in ("open", "pair", "last", "trend")] == [297, 594, 297, 297]
    for record in heldout:
        digits, reply = [int(TARGETS[n]) for n in numbers_of(record)], record["conversations"][1]["value"]
        if record["category"] == "open":
            assert reply == answer(digits[0])
        if record["category"] == "pair":
            assert reply == digit_pairs.larger(*digits)
    tokenizer = load_tokenizer(TokenizerConfig(str(folder / digit_pairs.TOKENIZER)))
    assert len(tokenizer) == digit_pairs.NUM_TOKENS


def test_answers_say_what_is_seen_and_what_follows() -> None:
    assert digit_pairs.larger(3, 8) == "A three and an eight: the second."
    assert digit_pairs.larger(8, 3) == "An eight and a three: the first."
    assert digit_pairs.trend(0, 1) == "From a zero to a one: it grows."
    assert digit_pairs.trend(9, 8) == "From a nine to an eight: it shrinks."


def test_videos_show_two_digits_one_after_the_other(folder: Path) -> None:
    """What they show is found out by the nearest of the small originals."""
    heldout = json.loads((folder / digit_pairs.FILES[1]).read_text())
    images, right = load_digits().images.reshape(len(TARGETS), -1), []
    for record in [record for record in heldout if "videos" in record][:40]:
        video = folder / record["videos"][0]
        assert json.loads(video.with_suffix(".json").read_text()) == {"fps": 2.0}
        frames = [Image.open(path) for path in sorted(video.with_suffix("").iterdir())]
        assert [frame.size for frame in frames] == [(56, 56)] * 4
        small = [
            numpy.asarray(frame.resize((8, 8), Image.Resampling.BOX), float).ravel() / 255 * 16 for frame in frames
        ]
        first, same, second, _ = (int(TARGETS[((images - one) ** 2).sum(1).argmin()]) for one in small)
        assert first == same
        expected = answer(second) if record["category"] == "last" else digit_pairs.trend(first, second)
        right.append(record["conversations"][1]["value"] == expected)
    assert numpy.mean(right) >= 0.95


def test_it_is_shown_with_its_grids(folder: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(folder.parents[1])
    given = ("model=qwen2_vl_tiny", "data=digit_pairs", "model.data.dataloader_type=single", "n=12")
    for line in lines(capsys, *given):
        grids = line["image_grid_thw"]
        assert line["num_image_tokens"] == sum(time * height * width // 4 for time, height, width in grids)
        seen = [[14 * width, 14 * height] for _, height, width in grids]
        assert line["image_sizes"] == seen
        assert [time for time, _, _ in grids] == (
            [2] if "-last" in line["id"] or "-trend" in line["id"] else [1] * len(grids)
        )
        said = line["trained_text"][0].removesuffix("<|im_end|>\n").removesuffix("<|im_end|>")
        assert said.split()[-1].strip(".") in {*NAMES, "first", "second", "grows", "shrinks"}


def test_what_the_model_sees_is_what_its_patches_were_cut_from(folder: Path, tmp_path: Path) -> None:
    tokenizer, noise = load_tokenizer(TokenizerConfig(str(folder / digit_pairs.TOKENIZER))), numpy.random.default_rng(0)
    parts, config = family("qwen2_vl", "processor"), family("qwen2_vl", "config").Config(encoder_seq_length=512)
    data = DataConfig(video_min_pixels=3136, video_min_frames=2)
    processor = parts.Processor(parts.settle(config, tokenizer), data, tokenizer)
    paths = []
    for number, size in enumerate([(56, 84), (112, 56), (84, 56), (84, 56), (84, 56)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(noise.integers(0, 256, (*size[::-1], 3), dtype=numpy.uint8)).save(paths[-1])
    images = processor.pixels([paths[0], Video(Frames(tuple(paths[2:]), 2.0)), paths[1]])
    assert images.grids == [(1, 6, 4), (2, 4, 6), (1, 4, 8)]
    seen = processor.seen(images)
    assert len(seen[0]) == len(seen[2]) == 1
    shown = [seen[0][0], *seen[1], seen[2][0]]
    for frame, path in zip(shown, [paths[0], *paths[2:], paths[1]], strict=True):
        assert numpy.array_equal(numpy.asarray(frame), numpy.asarray(Image.open(path)))
    contact_sheet([("headline", [], seen)], str(tmp_path / "sheet.png"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        first = ImageOps.contain(seen[0][0], (THUMBNAIL, THUMBNAIL))
        assert numpy.array_equal(
            numpy.asarray(sheet.crop((12, 12, 12 + first.width, 12 + first.height))), numpy.asarray(first)
        )


def test_llavas_views_are_shown_too(tmp_path: Path) -> None:
    views = family("llava", "views").Views(family("llava", "tiny").config(), DataConfig())
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "noise.png")
    ((shown,),) = views.frames(views.pixels([tmp_path / "noise.png"]))
    assert numpy.array_equal(numpy.asarray(shown), pixels.numpy())


def test_questions_at_the_end_are_scored_by_category(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = ended(tmp_path)
    samples.show(run)
    said = capsys.readouterr().out.split("\n", 2)[2].strip()
    answers = [("right", said), ("right", said), ("half", said), ("half", "something else")]
    records = []
    for number, (category, reply) in enumerate(answers):
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": reply}]
        records.append({"id": number, "category": category, "conversations": turns})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(records))
    run = replace(run, samples=SamplesConfig((), 12, str(path)))
    samples.check(run)
    samples.score(run)
    out = capsys.readouterr().out
    assert "held-out accuracy (half): 0.500 (the most frequent answer: 0.500)\n" in out
    assert "held-out accuracy (right): 1.000 (the most frequent answer: 1.000)\n" in out
    assert len((archive_path(run.exp_manager).parents[1] / "predictions.jsonl").read_text().splitlines()) == 4


def test_questions_must_be_there_before_the_run() -> None:
    run = run_of("gpt", TINY["gpt"])
    with pytest.raises(ConfigError, match="^samples.questions=nowhere.json: cannot be read"):
        samples.check(replace(run, samples=SamplesConfig(questions="nowhere.json")))
    with pytest.raises(ConfigError, match="^samples.questions=no/where.json: cannot be read"):
        samples.check(replace(run, samples=SamplesConfig(questions="no/where.json")))
    text = replace(run, samples=SamplesConfig(questions="x.json"), data=DataConfig(data_impl="mmap"))
    with pytest.raises(ConfigError, match="^samples.questions=x.json: needs a model of conversations"):
        samples.check(text)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_questions_are_about_stands_where_the_runs_does(kind: str, tmp_path: Path, folder: Path) -> None:
    """One folder for all files, else beside the questions; and it is there before the run."""
    heldout = json.loads((folder / digit_pairs.FILES[1]).read_text())
    path, run = tmp_path / "questions.json", run_of("qwen2_vl", TINY["qwen2_vl"])
    path.write_text(json.dumps([record for record in heldout if f"{kind}s" in record][:2]))
    run = replace(run, samples=SamplesConfig(questions=str(path)))
    where = DataConfig(image_folder=str(folder), video_folder=str(folder))
    samples.check(replace(run, data=where))
    for data in (DataConfig(), replace(where, **{f"{kind}_folder": str(tmp_path)})):
        with pytest.raises(ConfigError, match=f"^samples.questions={path}: {tmp_path}/{kind}s/.*model.data.image_fo"):
            samples.check(replace(run, data=data))
