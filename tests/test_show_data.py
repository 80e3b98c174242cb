"""examples/show_data.py: what it shows is what the loader gives, and what the records say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from tiny_hf import tokenizer

from nemo_vlm import experiment
from nemo_vlm.batch import IGNORE_INDEX, Sample
from nemo_vlm.command_line import beside
from nemo_vlm.config import DataConfig
from nemo_vlm.config.plan import KEYS, PlanConfig
from nemo_vlm.data.codec import Codec
from nemo_vlm.data.loader import Share, training_loader
from nemo_vlm.door import CONF, store_defaults
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import resolve
from nemo_vlm.models.llava.config import Config
from nemo_vlm.models.templates import TEMPLATES
from nemo_vlm.models.text import ConversationText
from nemo_vlm.planning.contact_sheet import MARGIN
from nemo_vlm.planning.show_data import Shown, patches


def tree(*overrides: str):
    store_defaults()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [beside(override, experiment.BESIDE[experiment.show]) for override in overrides]
        composed = OmegaConf.to_container(compose("show_data", given), resolve=True)
    return {key: value for key, value in composed.items() if key not in ("debug", "dry_run", *KEYS)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(capsys: pytest.CaptureFixture, *overrides: str) -> list[dict]:
    experiment.show(tree("json=true", *overrides))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_it_shows_what_the_loader_gives(folder: Path, capsys: pytest.CaptureFixture, packing: str) -> None:
    settings = ("model.micro_batch_size=1", "model.global_batch_size=8", f"model.data.packing={packing}")
    shown = lines(capsys, "n=8", *settings)
    composed = tree(*settings)
    run = experiment.read({key: composed[key] for key in ("trainer", "exp_manager", "model")})
    layout = resolve(run, 0, {})
    run, _, datasets = experiment.open_data(replace(run, data=replace(run.data, num_workers=0)))
    (batches,) = training_loader(datasets.train, layout, Share(0, 1), run, 1, 0)
    drawn = {}
    for batch in batches:
        ids, labels = (tensor.flatten() for tensor in (batch.tokens, batch.labels))
        for number, ids_of, labels_of in zip(
            batch.records.tolist(),
            ids.split(batch.lengths.tolist()),
            labels.split(batch.lengths.tolist()),
            strict=True,
        ):
            drawn[number] = (ids_of.tolist(), labels_of.tolist())
    assert {line["record"]: (line["input_ids"], line["labels"]) for line in shown} == drawn
    records = json.loads((folder / "datasets/digits_vqa/train.json").read_text())
    for line in shown:
        record = records[line["record"]]
        assert line["id"] == record["id"]
        assert line["trained_text"] == [f"{record['conversations'][1]['value']}</s>"]
        assert (line["num_image_tokens"], line["image_sizes"], line["skipped"]) == (16, [[32, 32]], None)
        assert len(line["input_ids"]) == len(line["labels"])
    assert all(("pack" in line["place"]) == (packing == "true") for line in shown)


def test_text_pictures_and_skipped_samples(folder: Path, capsys: pytest.CaptureFixture) -> None:
    experiment.show(tree("n=1"))
    capsys.readouterr()
    place = folder / "datasets/digits_vqa"
    records = json.loads((place / "train.json").read_text())[:3]
    records[1]["image"] = f"{'nowhere/' * 40}x.png"
    (place / "three.json").write_text(json.dumps(records))
    three = ("model.data.data_path=datasets/digits_vqa/three.json", "model.data.dataloader_type=single", "n=3")
    experiment.show(tree(*three, "picture=sheet/out.png"))
    text = capsys.readouterr().out
    assert f"ASSISTANT:« {records[0]['conversations'][1]['value']}</s>»" in text  # no colour where there is no terminal
    assert "trained, 16 of images and videos; these: 32 x 32; seen in 4 x 4 patches" in text
    assert "SKIPPED, missing_image" in text
    assert "3 samples, 1 skipped" in text
    assert "[16 image tokens]" in text
    assert patches(time=2, rows=20, columns=28) == "28 x 20 x 2"  # of a video
    with Image.open(folder / "sheet/out.png") as picture:
        assert picture.getextrema() != ((255, 255),) * 3  # not a white sheet
        margin = picture.crop((picture.width - MARGIN, 0, *picture.size))
        assert {colour for _, colour in margin.getcolors()} == {(255,) * 3, (153,) * 3}  # lines between; no text is cut
    found = lines(capsys, *three)
    assert [bool(line["skipped"]) for line in found] == [False, True, False]
    assert found[1]["id"] == records[1]["id"]
    assert all(label == IGNORE_INDEX for line in found for label in line["labels"][:16])


@pytest.mark.parametrize("template", TEMPLATES)
def test_trained_text_is_what_the_assistant_says_and_its_end(template: str) -> None:
    codec = tokenizer()
    said = [{"from": who, "value": text} for who, text in [("human", "Q1"), ("gpt", " two  words "), ("human", "Q2")]]
    said += [{"from": "gpt", "value": "A red square"}]
    said = said[:2] if TEMPLATES[template].captions else said
    encoder = ConversationText(Config(encoder_seq_length=10_000), DataConfig(conv_template=template), codec)
    sample = Sample(*encoder.train({}, encoder.turns({"conversations": said}), []).shifted())
    before, after = TEMPLATES[template].around_answer
    shown = Shown(0, "", None, sample, Codec(codec), {}, [], before)
    assert shown.as_json()["trained_text"] == [turn["value"] + after.format(eos="</s>") for turn in said[1::2]]


@pytest.mark.parametrize(
    ("model", "begins"), [("qwen2_vl_tiny", "<|im_start|>system\n"), ("qwen3_vl_tiny", "<|im_start|>user")]
)
def test_each_family_has_its_own_template(model: str, begins: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever the data are; what they name goes before it."""
    experiment.show(tree("n=1", f"model={model}", "data=digit_pairs"))
    assert capsys.readouterr().out.splitlines()[1].startswith(begins.strip())
    composed = tree(f"model={model}", "data=llava_pretrain")
    assert composed["model"]["data"]["conv_template"] == "plain"


def test_sizes_are_those_of_the_images_that_are_left(folder: Path, capsys: pytest.CaptureFixture) -> None:
    experiment.show(tree("n=1"))
    capsys.readouterr()
    place = folder / "datasets/digits_vqa"
    for name, width in (("a.png", 10), ("b.png", 20), ("c.png", 30)):
        Image.new("RGB", (width, 15)).save(place / name)
    later = f"Long {'and longer ' * 300} <image>?"
    said = [("human", "<image>\n<image>\nOne?"), ("gpt", "Yes."), ("human", later), ("gpt", "No.")]
    turns = [{"from": who, "value": text} for who, text in said]
    record = {"id": 1, "image": ["a.png", "b.png", "c.png"], "conversations": turns}
    (place / "long.json").write_text(json.dumps([record]))
    given = ("model.data.data_path=datasets/digits_vqa/long.json", "model.data.dataloader_type=single", "n=1")
    (line,) = lines(capsys, *given)
    assert line["trained_text"] == ["Yes.</s>"]
    assert line["image_sizes"] == [[10, 15], [20, 15]]


def test_a_picture_that_cannot_be_written(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(ConfigError, match="picture=file/out.png: cannot be written"):
        experiment.show(tree("n=1", "picture=file/out.png"))


def test_it_has_a_plan(folder: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        experiment.plan(experiment.show, PlanConfig(), tree("model.vocab_size=400"))
    assert "world size 1" in caplog.text
