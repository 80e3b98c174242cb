"""NeMo's inference: questions in the model's template, answers in its fields, shared by copies; scores of records."""

from __future__ import annotations

import contextlib
import json
import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch
import transformers
from distributed import run_ranks
from PIL import Image
from tiny_hf import make_llava

from nemo_vlm.config import ParallelConfig
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.inference import answers, evaluate
from nemo_vlm.inference.generate import Answer
from nemo_vlm.inference.likelihood import choices
from nemo_vlm.inference.neva import NevaPrompts
from nemo_vlm.inference.prompts import RawPrompts
from nemo_vlm.inference.restore import restore
from nemo_vlm.inference.settings import (
    DecodingConfig,
    EvaluateConfig,
    GenerateConfig,
    NevaInferenceConfig,
    NevaModelConfig,
    TemplateConfig,
)
from nemo_vlm.models.conversation import options
from nemo_vlm.models.templates import VICUNA_SYSTEM

NUM_TOKENS = 8
LAYOUTS: dict[str, dict[str, int]] = {
    "ddp": {"cpu_data_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}
LINES: list[dict[str, Any]] = [
    {"prompt": "<image>\nWhat is in the picture?", "image": "noise.png", "category": "detail"},
    {"text": "What is it?", "image": ["noise.png"], "answer_id": 7, "metadata": {"a": 1}},
    {"question": "Two: <image> and <image>?", "image": ["noise.png", "noise.png"], "question_id": 3},
    {"prompt": "Who are you?", "messages": ["a", {"role": "user"}]},  # passed through
    {"prompt": "<image> Which square?", "image": "noise.png"},
]
QUESTIONS = [
    "<image>\nWhat is in the picture?",
    "<image>\nWhat is it?",
    "Two: <image> and <image>?",
    "Who are you?",
    "<image>\nWhich square?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an image and questions."""
    root = tmp_path_factory.mktemp("neva")
    make_llava(root / "llava", {"num_hidden_layers": 2}, {"num_attention_heads": 4})
    pixels = numpy.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(root / "noise.png")
    (root / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (root / "in.json").write_text(json.dumps(LINES))
    return root


def asked(folder: Path, name: str = "in.jsonl", **settings: Any) -> NevaInferenceConfig:
    decoding = DecodingConfig(tokens_to_generate=NUM_TOKENS, insert_media_token="left", batch_size=2)
    given = {"inference": decoding, "output_file": str(folder / "out.jsonl")} | settings
    return NevaInferenceConfig(neva_model_file=str(folder / "llava"), prompt_file=str(folder / name), **given)


def answer(config: NevaInferenceConfig | GenerateConfig) -> list[dict[str, Any]]:
    """The task in this process."""
    task = answers.prepare(config, {})
    task.make_ready({})
    task.run()
    return written(str(config.output_file))


def written(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_answers_have_the_fields_of_nemo(folder: Path) -> None:
    """And are those to the same texts, put into the template by hand."""
    found = answer(asked(folder))
    assert answer(asked(folder, "in.json")) == found
    texts = [f"{VICUNA_SYSTEM} USER: {question} ASSISTANT:" for question in QUESTIONS]
    images = [
        {"images": [line["image"]] if isinstance(line["image"], str) else line["image"]} if "image" in line else {}
        for line in LINES
    ]
    raw = [{"prompt": text} | image for text, image in zip(texts, images, strict=True)]
    (folder / "raw.jsonl").write_text("".join(json.dumps(line) + "\n" for line in raw))
    decoding = DecodingConfig(tokens_to_generate=NUM_TOKENS)
    plain = GenerateConfig(
        model_path=str(folder / "llava"),
        prompt_file=str(folder / "raw.jsonl"),
        output_file=str(folder / "raw_out.jsonl"),
        inference=decoding,
    )
    for line, given, text, by_hand in zip(found, LINES, texts, answer(plain), strict=True):
        assert line["text"] == by_hand["text"].strip() != ""
        assert line["full_text"] == text + by_hand["text"]
        assert line["model_id"] == str(folder / "llava")
        assert (line["answer_id"], line["metadata"]) == (given.get("answer_id", 0), given.get("metadata", {}))
        kept = {key: value for key, value in given.items() if key != "text"}
        assert {key: line[key] for key in kept} == kept


@pytest.mark.parametrize("text", ["<image><image>Which?", "<image><image> Which?", "<image><image>\nWhich?"])
def test_tags_in_front_have_a_line_of_their_own(text: str, folder: Path) -> None:
    assert NevaPrompts(asked(folder)).question({"prompt": text}) == "<image><image>\nWhich?"


def drawn(folder: Path, name: str, **settings: Any) -> NevaInferenceConfig:
    decoding = DecodingConfig(tokens_to_generate=NUM_TOKENS, insert_media_token="left", greedy=False, **settings)
    return asked(folder, inference=decoding, output_file=str(folder / f"{name}.jsonl"))


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    """Where two ranks have left what is asked for, under each layout."""
    (folder / "records.json").write_text(json.dumps(RECORDS))
    run_ranks(on_two_ranks, 2, folder)
    return folder


def on_two_ranks(folder: Path) -> None:
    for name, sizes in LAYOUTS.items():
        config = replace(drawn(folder, name, batch_size=1), model=NevaModelConfig(**sizes))
        answers.prepare(config, {}).run()
        probable = scored(folder, name, compute_logprob=True)
        evaluate.prepare(replace(probable, model=ParallelConfig(**sizes)), {}).run()
        streamed = folder / f"{name}_{torch.distributed.get_rank()}.txt"
        with streamed.open("w") as file, contextlib.redirect_stdout(file):
            answers.prepare(alone(folder, model=ParallelConfig(**sizes)), {}).run()


def alone(folder: Path, **settings: Any) -> GenerateConfig:
    """One prompt on the command line."""
    path, text = folder / "llava", "USER: Who are you? ASSISTANT:"
    return GenerateConfig(model_path=str(path), prompt=text, inference=DecodingConfig(end_strings=("zz",)), **settings)


def test_ranks_answer_as_one_process(two_ranks: Path) -> None:
    """Draws are those of one process with other batches."""
    expected = answer(drawn(two_ranks, "one", batch_size=3))
    assert len(expected) == len(LINES)
    for name in LAYOUTS:
        assert written(two_ranks / f"{name}.jsonl") == expected


def test_an_answer_is_streamed_by_the_first_rank(two_ranks: Path, capsys: pytest.CaptureFixture) -> None:
    """All of it, and nothing else; what else there is to tell goes to stderr. A second copy has no prompt."""
    config = alone(two_ranks, output_file=str(two_ranks / "alone.jsonl"))
    (line,) = answer(config)
    told = capsys.readouterr()
    assert told.out.endswith(f"{line['text']}\n") and len(line["text"]) > 8
    count = len(line["prompt_token_ids"])
    pattern = (
        rf"prompts: {count} tokens, [\d.]+ tokens/s; answers: 64 tokens, [\d.]+ tokens/s; first token after [\d.]+ s"
    )
    assert re.search(pattern, told.err)
    assert "1 of 1 answers reached inference.tokens_to_generate=64 or model.encoder_seq_length=256" in told.err
    assert line["finish_reason"] == "length"
    for name in LAYOUTS:
        assert (two_ranks / f"{name}_0.txt").read_bytes().decode() == f"{line['text']}\n"
        assert (two_ranks / f"{name}_1.txt").read_text() == ""


def test_videos_are_asked_about(folder: Path) -> None:
    """Frames that are equally spaced, each of as many tokens as an image."""
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for number in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (20 * number, 100, 100)))))
        container.mux(stream.encode())
    (folder / "video.json").write_text(json.dumps([{"prompt": "What happens?", "video": "clip.mp4"}]))
    decoding = DecodingConfig(tokens_to_generate=2, insert_media_token="left", media_type="video")
    four = NevaModelConfig(data=TemplateConfig(num_frames=4))
    config = asked(folder, "video.json", inference=decoding, model=four)
    (line,) = answer(config)
    assert "USER: <video>\nWhat happens? ASSISTANT:" in line["full_text"] and line["video"] == "clip.mp4"
    (prompt,) = NevaPrompts(config).read()
    model = answers.prepare(config, {}).model
    with restore(model.source, "32") as restored:
        tokens, media = NevaPrompts(config).encode(prompt, restored)
        assert len(restored.processor.pixels(media)) == 4
        assert int((tokens == restored.config.mm_cfg.image_token_index).sum()) == 4 * 16


def test_prompts_follow_the_settings(folder: Path) -> None:
    def first(**settings: Any) -> dict[str, Any]:
        decoding = DecodingConfig(tokens_to_generate=3, insert_media_token="right", **settings)
        return answer(asked(folder, inference=decoding))[1]

    assert "USER: What is it?\n<image> ASSISTANT:" in first()["full_text"]
    scored = first(compute_logprob=True, all_probs=True)
    assert len(scored["logprob"]) == 3 and len(scored["full_logprob"][0]) == 307
    assert first(add_BOS=True)["text"] == first()["text"] != first(add_BOS=False)["text"]
    model = NevaModelConfig(data=TemplateConfig(conv_template="mistral", system_message="Be brief."))
    (line, *_) = answer(asked(folder, model=model))
    assert line["full_text"].startswith(" [INST] Be brief.\n<image>\nWhat is in the picture? [/INST]")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "two models": ({"checkpoint_dir": "x"}, "give either neva_model_file=X.nemo or checkpoint_dir=RUN/checkpoints"),
    "server": ({"server": True}, "server=True: there is no server here"),
    "port": ({"port": 5555}, "port=5555: there is no server here"),
    "tower": ({"vision_encoder_path": "x"}, "vision_encoder_path=x: a checkpoint holds its tower"),
    "template": ({"model": NevaModelConfig(data=TemplateConfig("v9"))}, "conv_template=v9: must be plain or v1 or"),
    "no placeholder": ({"inference": DecodingConfig()}, "in.jsonl line 2: 0 <image> in the text, 1 of 'image'"),
    "folder": ({"inference": DecodingConfig(images_base_path="/no")}, "/no/noise.png: the image does not exist"),
    "ranks": ({"tensor_model_parallel_size": 3}, "must divide by tensor_model_parallel_size=3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, folder: Path) -> None:
    settings, message = MISTAKES[name]
    with pytest.raises(ConfigError) as error:
        answers.prepare(asked(folder, **settings), {}).make_ready({})
    assert message in str(error.value) and "\n" not in str(error.value)


WRONG_LINES: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"image": 5}, "'image' must be a path or a list of paths"),
    "a table": ({"image": {"a": 1}}, "'image' must be a path or a list of paths"),
    "no name": ({"image": "a\0.png"}, "cannot be a file's name"),
}
WRONG_QUESTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a video": ({"video": [None]}, "'video' must be a path or a list of paths"),
    "no video": ({"prompt": "<video>", "video": "a\0.mp4"}, "cannot be a file's name"),
    "a system": ({"system": 5}, "'system' must be text"),
}
RAW, ASKED = [("raw", name) for name in WRONG_LINES], [("asked", name) for name in WRONG_LINES | WRONG_QUESTIONS]


@pytest.mark.parametrize(("kind", "name"), RAW + ASKED)
def test_a_line_that_cannot_be_is_named(kind: str, name: str, tmp_path: Path) -> None:
    given, message = (WRONG_LINES | WRONG_QUESTIONS)[name]
    (tmp_path / "in.jsonl").write_text("\n" + json.dumps({"prompt": "<image>"} | given))
    raw = GenerateConfig(model_path="x", prompt_file=str(tmp_path / "in.jsonl"))
    with pytest.raises(ConfigError) as error:
        (RawPrompts(raw) if kind == "raw" else NevaPrompts(asked(tmp_path))).read()
    assert f"{tmp_path}/in.jsonl line 2: " in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_image_that_is_cut_loses_its_own_answer_alone(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "noise.png").read_bytes()[:3000])
    good = LINES[1] | {"error": "the line's own"}
    (folder / "bomb.ppm").write_bytes(b"P6 20000 20000 255\n")
    given = [good, {"text": "<image>?", "image": "cut.png"}, {"prompt": "<image>", "image": ["bomb.ppm"]}, LINES[3]]
    (folder / "cut.json").write_text(json.dumps(given))
    with pytest.raises(
        RuntimeError, match="^2 of 4 prompts could not be answered, see .*; the first: .* entry 2: .*cut.png"
    ):
        answer(asked(folder, "cut.json", output_file=str(folder / "cut.jsonl")))
    found = written(folder / "cut.jsonl")
    (folder / "whole.json").write_text(json.dumps([given[0], given[3]]))
    assert [found[0], found[3]] == answer(asked(folder, "whole.json"))
    assert [(line["prompt"], line["text"]) for line in found[1:3]] == [("<image>?", ""), ("<image>", "")]
    assert "cut.png: not a readable image" in found[1]["error"]
    assert "bomb.ppm: Image size (400000000 pixels)" in found[2]["error"]


@pytest.mark.parametrize("front", [False, True])
def test_full_text_is_what_the_model_sees(folder: Path, front: bool) -> None:
    line = {"prompt": "See <image>, what is it?", "image": "noise.png", "system": "Be brief."}
    (folder / "system.json").write_text(json.dumps([line]))
    questions = NevaPrompts(asked(folder, "system.json"))
    model = answers.prepare(questions.config, {}).model
    data = model.source.tree["data"] | {"sep_image_conv_front": front}
    source = replace(model.source, tree=model.source.tree | {"data": data})
    with restore(source, "32") as restored:
        (prompt,) = questions.read()
        tokens, media = questions.encode(prompt, restored)
        said = "<image>\nSee , what is it?" if front else line["prompt"]
        image = restored.config.mm_cfg.image_token_index
        once = [token for place, token in enumerate(tokens.tolist()) if token != image or tokens[place - 1] != image]
        assert restored.tokenizer.decode(once) == f"<s>Be brief. USER: {said} ASSISTANT:"
        found = questions.line(prompt, answers.sample_of(tokens, media, restored), Answer(tokens[:0]), restored)
        assert found["full_text"] == f"Be brief. USER: {said} ASSISTANT:"


def record(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": answer, "conversations": turns} | more


LISTED = "<image>\nWhich?\nA. red\nB. 7 blue circles\nC. a square\nAnswer with the option's letter."


def test_choices_are_listed_or_given() -> None:
    assert choices(record(LISTED, "B")) == ["A", "B", "C"]
    assert choices(record(LISTED, "a square")) == ["red", "7 blue circles", "a square"]
    assert choices(record("Is it?", "yes", choices=["yes", "no"])) == ["yes", "no"]
    assert choices(record("A. What is it?", "red")) == []
    assert choices(record("<image>\r\nQ: is it?\r\nA. cat \r\nB. dog\r\nQ: you know?\r\n", "cat")) == ["cat", "dog"]


def test_options_are_the_last_letters_in_order() -> None:
    assert options(LISTED)[0] == "<image>\nWhich?\n"
    asked = "Who?\nA: me\nB: you\nD: no\n"
    assert options(asked) == ("Who?\n", {"A": "me", "B": "you"})
    assert options(f"{asked}A) x\ny\nB) z\nA. is it?") == (asked, {"A": "x", "B": "z"})
    assert options("Which?\nB. x\nC. y") == ("Which?\nB. x\nC. y", {})
    letters = string.ascii_uppercase
    assert "".join(options("\n".join(f"{one}. {one}" for one in f"{letters}[A"))[1]) == letters


RECORDS = [
    record(LISTED, "B", image="noise.png", category="choice"),
    record(LISTED, "red", image="noise.png", category="choice"),
    record("Is it a picture?", "no", choices=["A red square", "no"]),
    record("<image>\nWhat is it?", "A red square", image="noise.png"),
]


def scored(folder: Path, name: str, **decoding: Any) -> EvaluateConfig:
    (folder / name).mkdir(exist_ok=True)
    return EvaluateConfig(
        neva_model_file=str(folder / "llava"),
        data_path=str(folder / "records.json"),
        output_folder=str(folder / name),
        inference=DecodingConfig(tokens_to_generate=4, batch_size=3, **decoding),
    )


@torch.no_grad()
def test_the_likeliest_choice_is_that_of_transformers(two_ranks: Path, capsys: pytest.CaptureFixture) -> None:
    """By all tokens of an option and its end; two copies agree with one."""
    task = evaluate.prepare(scored(two_ranks, "one", compute_logprob=True), {})
    task.make_ready({})
    task.run()
    rows = written(two_ranks / "one/predictions.jsonl")
    summary = json.loads((two_ranks / "one/scores.json").read_text())
    for name in LAYOUTS:
        for row, other in zip(rows, written(two_ranks / name / "predictions.jsonl"), strict=True):
            likelihoods = [each.get("log_likelihoods", {}) for each in (row, other)]
            assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-5)
            assert row["logprob"] == pytest.approx(other["logprob"], rel=1e-4)
            numbers = {"log_likelihoods": 0, "logprob": 0}
            assert row | numbers == other | numbers
        assert json.loads((two_ranks / name / "scores.json").read_text()) == summary
    processor = transformers.LlavaProcessor.from_pretrained(two_ranks / "llava")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(two_ranks / "llava").eval()
    for row, given in zip(rows[:3], RECORDS[:3], strict=True):
        scores = {}
        for choice in choices(given):
            front = f"{VICUNA_SYSTEM} USER: {given['conversations'][0]['value']} ASSISTANT:"
            images = [Image.open(two_ranks / "noise.png")] if "image" in given else None
            inputs = processor(text=front, images=images, return_tensors="pt")
            option = processor.tokenizer(f" {choice}</s>", add_special_tokens=False)["input_ids"]
            whole = torch.cat([inputs["input_ids"], torch.tensor([option])], 1)
            logits = model(input_ids=whole, pixel_values=inputs.get("pixel_values")).logits[0, -len(option) - 1 : -1]
            scores[choice] = logits.log_softmax(-1)[range(len(option)), option].sum().item()
        assert row["log_likelihoods"] == pytest.approx(scores, abs=1e-3)
        assert row["likeliest"] == max(scores, key=scores.__getitem__)
        assert row["likeliest_correct"] == (row["likeliest"] == given["conversations"][1]["value"])
    assert "likeliest" not in rows[3]
    right = sum(row["likeliest_correct"] for row in rows[:2]) / 2
    assert f"held-out accuracy (choice, likeliest): {right:.3f}\n" in capsys.readouterr().out
    assert {name: found["records"] for name, found in summary.items()} == {"open": 2, "choice": 2}
    correct = [row["correct"] for row in rows]
    assert summary["choice"] == {
        "accuracy": sum(correct[:2]) / 2,
        "most_frequent": 0.5,
        "likeliest_accuracy": right,
        "records": 2,
    }


def test_records_that_cannot_be_asked_are_left_out(
    two_ranks: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    (two_ranks / "cut.png").write_bytes((two_ranks / "noise.png").read_bytes()[:3000])
    broken = [
        record("<image>", "x", image="cut.png"),
        record("<image>", "x", image="none.png"),
        record("a " * 300, "x"),
    ]
    (two_ranks / "broken.json").write_text(json.dumps([RECORDS[0], *broken, *RECORDS[1:]]))
    with caplog.at_level("WARNING"):
        evaluate.prepare(replace(scored(two_ranks, "broken"), data_path=str(two_ranks / "broken.json")), {}).run()
    told = capsys.readouterr().out
    assert [one.message for one in caplog.records if "left out" in one.message] == [
        f"3 of 7 records are left out; record 1: {two_ranks}/cut.png: not a readable image (image file is truncated); "
        f"record 2: {two_ranks}/none.png: the image does not exist; image_folder says where they stand; record 3: 742 "
        "tokens leave no room for an answer in model.encoder_seq_length=256"
    ]
    evaluate.prepare(scored(two_ranks, "whole"), {}).run()
    assert written(two_ranks / "broken/predictions.jsonl") == written(two_ranks / "whole/predictions.jsonl")
    assert told == capsys.readouterr().out != ""
    with (
        Image.open(two_ranks / "broken/predictions.png") as left,
        Image.open(two_ranks / "whole/predictions.png") as whole,
    ):
        assert left.tobytes() == whole.tobytes()
    (two_ranks / "none.json").write_text(json.dumps(broken[:1]))
    with pytest.raises(ConfigError, match="data_path=.*none.json: no record can be asked; record 0: .*cut.png: not a"):
        evaluate.prepare(replace(scored(two_ranks, "none"), data_path=str(two_ranks / "none.json")), {}).run()


@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions.png", "scores.json"])
def test_predictions_that_cannot_be_written_are_told(name: str, two_ranks: Path) -> None:
    task = evaluate.prepare(scored(two_ranks, f"no_{name}"), {})
    (two_ranks / f"no_{name}" / name).mkdir()
    with pytest.raises(ConfigError, match=f"output_folder=.*no_{name}: cannot be written"):
        task.report([], task.records())


def test_records_are_given_no_placeholders(folder: Path) -> None:
    with pytest.raises(ConfigError, match="^inference.insert_media_token=left: a record of data_path says itself"):
        replace(scored(folder, "inserted"), inference=DecodingConfig(insert_media_token="left"))


def test_bos_in_front_leaves_room_for_an_answer(folder: Path) -> None:
    """Of 256 tokens, at least one."""
    decoding = DecodingConfig(add_BOS=True)
    with restore(answers.prepare(asked(folder), {}).model.source, "32") as restored:
        assert len(answers.with_bos(torch.full((254,), 9), restored, decoding)) == 255
        with pytest.raises(SampleError, match="^256 tokens leave no room for an answer in model.encoder_seq_length"):
            answers.with_bos(torch.full((255,), 9), restored, decoding)
