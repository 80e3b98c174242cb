"""Answers during training: in every layout those of the checkpoint, and training goes on as if nothing had been."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from distributed import run_ranks
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_families import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    make_layout,
    micro_batches,
    one_rank,
    run_of,
    samples_of_step,
    settle,
    whole,
)
from tiny_hf import make_llava, make_qwen2_vl, make_qwen3_vl

from nemo_vlm import experiment
from nemo_vlm.config import (
    CheckpointConfig,
    DataConfig,
    EarlyStoppingConfig,
    ExpManagerConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StartConfig,
    TrainerConfig,
)
from nemo_vlm.data.loader import Share
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.inference import evaluate
from nemo_vlm.inference.settings import DecodingConfig, EvaluateConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.models.base import family
from nemo_vlm.training import early_stopping, validation
from nemo_vlm.training.build import build_engine
from nemo_vlm.training.rereading import Rereader
from nemo_vlm.training.val_answers import Questions, chosen

NUM_TOKENS = 6
MODELS = {
    "llava": lambda folder: make_llava(folder, {"num_hidden_layers": 4}, {"num_attention_heads": 4}),
    "qwen2_vl": make_qwen2_vl,
    "qwen3_vl": lambda folder: make_qwen3_vl(folder, moe=True),
}


def record(number: int, question: str, **media: Any) -> dict[str, Any]:
    said = [question, "x", "And now?", "Another."][: 2 + number % 2 * 2]
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    return {"id": number, "conversations": turns} | media


RECORDS = [
    record(0, "<image>\nWhat is it?", image="noise.png"),
    record(1, "Who are you?"),
    record(2, "<image>\nWhat?", image="cut.png"),
    record(3, "Two: <image> and <image>?", image=["noise.png", "wide.png"]),
    record(4, "A much longer question, about a picture? <image>", image="wide.png"),
    record(5, "?"),
    record(6, "<image>\nWhich?", image="none.png"),
]
VIDEO = record(7, "<video>\nWhat happens in the picture?", video="clip")
RIGHT = {0, 5}  # what the model says is the truth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each model questions about noise, what its checkpoint answers, and truths, two of which are just that."""
    root = tmp_path_factory.mktemp("val_answers")
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=numpy.uint8))
    noise.save(root / "noise.png")
    noise.resize((90, 50)).save(root / "wide.png")
    (root / "cut.png").write_bytes((root / "noise.png").read_bytes()[:3000])
    (root / "clip").mkdir()
    for number in range(2):
        noise.rotate(90 * number).save(root / "clip" / f"{number}.png")
    for name, make in MODELS.items():
        weights = make(root / name) / "model.safetensors"
        large = {key: value * 6 if value.dim() > 1 else value for key, value in load_file(weights).items()}
        save_file(large, weights, {"format": "pt"})  # so that answers depend on all that is before them
        records = RECORDS if name == "llava" else [*RECORDS, VIDEO]  # as many tokens as LLaVA makes of it do not fit
        said = by_checkpoint(root, name, records)
        for one in records:
            right = one["id"] in RIGHT
            one["conversations"][1]["value"] = said[one["id"]] if right else "x"
        (root / name / "records.json").write_text(json.dumps(records))
    return root


def by_checkpoint(root: Path, name: str, records: list[dict[str, Any]]) -> dict[int, str]:
    """What examples/neva_evaluation.py finds, in this process alone."""
    data = root / name / "records.json"
    data.write_text(json.dumps(records))
    decoding = DecodingConfig(tokens_to_generate=NUM_TOKENS, batch_size=3)
    files = {"image_folder": str(root), "video_folder": str(root), "output_folder": str(root / name)}
    evaluate.prepare(EvaluateConfig(str(root / name), str(data), **files, inference=decoding), {}).run()
    return expected(root, name)


def expected(root: Path, name: str) -> dict[int, str]:
    return {row["id"]: row["text"] for row in read(root / name / "predictions.jsonl")}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_from(root: Path, name: str, parallel: ParallelConfig = ParallelConfig(), **data: Any) -> RunConfig:
    """Training of a model on its questions, of which all are answered."""
    run = run_of(name, replace(family(name, "tiny").config(), encoder_seq_length=256), parallel)
    given = {"data_path": str(root / name / "records.json"), "image_folder": str(root), "video_folder": str(root)}
    given |= {"validation_path": given["data_path"], "eval_samples": 99, "eval_tokens": NUM_TOKENS}
    run = replace(
        run,
        start=StartConfig(restore_from_path=str(root / name)),
        data=DataConfig(**given | data),
        step=replace(run.step, micro_batch_size=1),
        exp_manager=ExpManagerConfig(name=name, exp_dir=str(root)),
    )
    return settle(run)


def asking(run: RunConfig, layout: Layout, loggers: tuple = ()) -> Questions:
    run, _, datasets = experiment.open_data(run)
    share = Share(groups.data_parallel_rank(), layout.data)
    return Questions(run, layout, share, datasets.validation, loggers)


Weights = dict[str, torch.Tensor]


def all_answered(cases: list[RunConfig]) -> list[dict[int, str]]:
    """What each run answers before its first step."""
    found = []
    for run in cases:
        layout = make_layout(run, torch.distributed.get_world_size())
        groups.initialize(layout, seed=1)
        questions = asking(run, layout)
        mine, _ = questions.answered(build_engine(questions.run, layout))
        found.append({row["id"]: row["text"] for part in groups.from_every_rank(mine) for row in part.values()})
        groups.shut_down()
    return found


def trained(run: RunConfig, answers: bool) -> tuple[list[tuple[float, ...]], Weights]:
    """Two steps, and the weights after them; with answers in front of each."""
    layout = make_layout(run, torch.distributed.get_world_size())
    groups.initialize(layout, seed=1)
    questions = asking(run, layout)
    engine, steps = build_engine(questions.run, layout), []
    for number in range(2):
        if answers:
            assert math.isfinite(questions.accuracy(engine, number))
        result = engine.step(micro_batches(layout, samples_of_step(run, number)), lr=run.optim.lr)
        loads = () if result.experts is None else (*result.experts.tokens.flatten(), *result.experts.aux_loss)
        steps.append((result.loss, result.grad_norm, *map(float, loads)))
    weights = whole(engine.parts())
    groups.shut_down()
    return steps, weights


def on_two_ranks(cases: list[RunConfig], trains: list[RunConfig]):
    return all_answered(cases), [[trained(run, answers) for answers in (True, False)] for run in trains]


def cases_of(root: Path) -> dict[str, RunConfig]:
    """On two ranks; data-parallel ones have questions of different numbers of tokens, and of views."""
    dense = ("ddp", "tp2", "tp2_sp", "pp2_vpp2", "cp2", "fsdp")
    runs = {f"llava {name}": run_from(root, "llava", LAYOUTS[name][1]) for name in dense}
    runs |= {f"qwen3_vl {name}": run_from(root, "qwen3_vl", EXPERT_LAYOUTS[name][1]) for name in ("ep2", "tp2_ep2")}
    runs["qwen2_vl tp2"] = run_from(root, "qwen2_vl", LAYOUTS["tp2"][1])
    equal = run_from(root, "qwen3_vl", EXPERT_LAYOUTS["etp2"][1], pad_to=256)
    step = replace(equal.step, micro_batch_size=2, moe_token_dispatcher_type="allgather")
    runs["qwen3_vl allgather"] = replace(equal, step=step)
    return runs | {"qwen3_vl pp2 packing": run_from(root, "qwen3_vl", LAYOUTS["pp2"][1], packing=True)}


def test_every_layout_answers_as_the_checkpoint_and_trains_on_as_if_nothing_had_been(folder: Path) -> None:
    cases = cases_of(folder)
    overlapped = OptimConfig(name="distributed_fused_adam", overlap_grad_sync=True, overlap_param_sync=True)
    experts = cases["qwen3_vl ep2"]
    experts = replace(experts, model=replace(experts.model, moe_aux_loss_coeff=0.01))
    trains = [replace(cases["llava ddp"], optim=overlapped), cases["llava fsdp"], experts]
    for found, runs in run_ranks(on_two_ranks, 2, list(cases.values()), trains):
        for name, answers in zip(cases, found, strict=True):
            wanted = expected(folder, name.split()[0])
            assert answers == wanted and len(set(wanted.values())) >= 4, name
        for with_answers, without in runs:
            assert with_answers[0] == without[0]
            assert all(torch.equal(value, without[1][name]) for name, value in with_answers[1].items())


def test_answers_are_shown(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    """One process; what is left out is told once."""
    run = run_from(folder, "llava")
    run = replace(run, exp_manager=ExpManagerConfig(name="shown", exp_dir=str(tmp_path)))
    (tmp_path / "shown").mkdir()
    board = TensorBoardLogger(tmp_path, name="", version="board")
    with one_rank(run.model):
        layout = make_layout(run, 1)
        questions = asking(run, layout, (board,))
        engine = build_engine(questions.run, layout)
        assert [questions.accuracy(engine, step) for step in (3, 6)] == [2 / 5] * 2
        assert not {*questions.run.model.placeholder_ids} - questions.ends.stop_ids
        check_groups(engine, questions.run, layout)
        with pytest.raises(SampleError), engine.evaluation():
            raise SampleError("broken_image", "")
        assert all(module.training for stage in engine.updater.modules for module in stage.modules())
    assert "Answering: " in capsys.readouterr().out
    board.finalize("success")
    assert [one.message for one in caplog.records if "eval_samples" in one.message] == [
        "model.data.eval_samples=99: the validation data gives 7 questions",
        f"2 of the 7 records of model.data.eval_samples are left out; the first: {folder}/none.png: the image does not "
        "exist; image_folder says where they stand",
    ]
    rows = read(tmp_path / "shown/val_answers.jsonl")
    assert [(row["id"], row["text"]) for row in rows] == list(expected(folder, "llava").items())
    assert {row["id"] for row in rows if row["correct"]} == RIGHT and {row["global_step"] for row in rows} == {6}
    seen = EventAccumulator(str(tmp_path / "board")).Reload()
    shown = seen.Tensors("val_answers/text_summary")
    assert [event.step for event in shown] == [event.step for event in seen.Images("val_answers")] == [3, 6]
    told = shown[1].tensor_proto.string_val[0].decode().splitlines()
    assert told[0] == "| question | answer | truth |  |" and len(told) == 2 + len(rows)
    assert [line.endswith("| right |") for line in told[2:]] == [row["correct"] for row in rows]
    with Image.open(tmp_path / "shown/val_answers.png") as picture:
        assert (picture.width, picture.height) == (
            seen.Images("val_answers")[1].width,
            seen.Images("val_answers")[1].height,
        )


def check_groups(engine: Engine, run: RunConfig, layout: Layout) -> None:
    """Of 256 tokens at most, and of no more visual ones than packs have."""
    lengths, visual = {0: 20, 1: 20, 2: 19, 3: 10}, {0: 5, 1: 5, 2: 4, 3: 0}
    assert Rereader(engine, run, layout).in_groups(lengths, visual) == [[0, 1, 2, 3]]
    few = replace(run, data=replace(run.data, packing=True, max_visual_tokens_per_micro_batch=9))
    assert Rereader(engine, few, layout).in_groups(lengths, visual) == [[0], [1, 2, 3]]


class Kinds:
    """Records in the order of a file, each third or the first third of which is of a kind."""

    def __init__(self, count: int, kind: Any) -> None:
        self.parts, self.kind = [numpy.arange(count // 2), numpy.arange(count // 2, count)], kind

    def record(self, number: int) -> dict[str, Any]:
        return record(0, "a" if self.kind(number) else "b")


class Unasked(Kinds):
    def record(self, number: int) -> dict[str, Any]:
        return record(0, "")


@pytest.mark.parametrize("kind", [lambda number: number % 3 == 0, lambda number: number < 300], ids=["third", "first"])
def test_questions_are_from_everywhere(kind: Any) -> None:
    """Whatever the order of the file, and the same ones each time."""
    numbers = chosen(Kinds(900, kind), 60, seed=5)  # type: ignore[arg-type]
    assert numbers == chosen(Kinds(900, kind), 60, seed=5) == sorted(set(numbers))  # type: ignore[arg-type]
    assert len(numbers) == 60 and all(15 * place <= number < 15 * place + 15 for place, number in enumerate(numbers))
    assert 0.2 < sum(map(kind, numbers)) / 60 < 0.5


def test_what_asks_or_says_nothing_is_passed_over(folder: Path) -> None:
    class Mixed(Kinds):
        def record(self, number: int) -> dict[str, Any]:
            made = record(number, "" if number % 2 else "What?")
            made["conversations"][1]["value"] = "x" if number % 4 else " "
            return made

    assert chosen(Mixed(40, None), 10, seed=0) == [*range(2, 40, 4)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"eval_samples": -1}, "model.data.eval_samples=-1: must be 0 or more"),
        ({"eval_tokens": 0}, "model.data.eval_tokens=0: must be 1 or more"),
        ({"eval_samples": 4, "data_impl": "mmap"}, "model.data.eval_samples=4: goes with model.data.data_impl=json or"),
        ({"eval_samples": 4, "data_impl": "sft_idxmap"}, "model.data.eval_samples=4: goes with model.data.data_impl="),
    ],
)
def test_mistakes_are_one_line(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**data)


def test_a_run_led_by_val_accuracy_needs_answers() -> None:
    run = run_of("llava", family("llava", "tiny").config())
    answers, held = replace(run, data=DataConfig(eval_samples=4)), Kinds(9, bool)
    with pytest.raises(ConfigError, match="eval_samples=4: there is no validation data; give model.data.validation_sp"):
        validation.check(answers, None)
    led = ExpManagerConfig(checkpoint_callback_params=CheckpointConfig(monitor="val_accuracy"))
    with pytest.raises(ConfigError, match=r"params.monitor=val_accuracy: give model.data.eval_samples, 100 say"):
        validation.check(replace(run, exp_manager=led), held)  # type: ignore[arg-type]
    validation.check(replace(answers, exp_manager=led), held)  # type: ignore[arg-type]
    off = TrainerConfig(limit_val_batches=0)
    with pytest.raises(ConfigError, match=r"monitor=val_accuracy: trainer.limit_val_batches is 0"):
        validation.check(replace(run, exp_manager=led, trainer=off), held)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"eval_samples=4: trainer.limit_val_batches is 0"):
        validation.check(replace(answers, trainer=off), held)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"eval_samples=4: no record of the validation data begins with a question"):
        validation.check(answers, Unasked(9, None))  # type: ignore[arg-type]


def test_accuracy_is_better_when_it_is_higher() -> None:
    params = CheckpointConfig(monitor="val_accuracy")
    assert params.mode == "max" and params.at_validations and CheckpointConfig(monitor="val_loss").mode == "min"
    config, stopping = EarlyStoppingConfig(monitor="val_accuracy", patience=2), {}
    for accuracy, ends in ((0.1, False), (0.5, False), (0.4, False), (0.3, True)):
        stopping = early_stopping.after_step(stopping, {"val_accuracy": accuracy}, skipped=True, config=config)
        stopping = early_stopping.after_step(stopping, {"val_loss": 1.0}, skipped=False, config=config)
        assert bool(early_stopping.verdict(stopping, config)) == ends
