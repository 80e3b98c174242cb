"""scripts/evaluate_lm.py: lm-eval's accuracies are those that transformers gives, and what is missing is said.

Several processes find the same; and a model that has learnt a task scores as one that has.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from commands import run
from distributed import run_ranks
from tiny_hf import make_qwen

from nemo_vlm.conversion.jobs import Run, import_huggingface
from nemo_vlm.data import word_kinds
from nemo_vlm.errors import ConfigError
from nemo_vlm.scoring.harness import Evaluation, check_enough, evaluate, read_baseline
from nemo_vlm.scoring.tasks import check_tasks, datasets_here, load
from nemo_vlm.sources.opening import open_source

ROOT = Path(__file__).parents[1]
TaskManager = pytest.importorskip("lm_eval.tasks", reason="needs requirements/eval.txt").TaskManager
QUESTIONS = [(f"What is {number} and {number}?", "ABCD"[number % 4]) for number in range(12)]
TASK = """task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
"""
PART = """task: part
dataset_path: haonan-li/cmmlu
dataset_name: agronomy
test_split: test
output_type: multiple_choice
doc_to_text: Question
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: Answer
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a task of our own, and CMMLU's data of one subject as its archive unpacks."""
    made = tmp_path_factory.mktemp("harness")
    make_qwen(made / "hf")
    import_huggingface(open_source(made / "hf", "input"), made / "model.nemo", Run("auto", "cpu", False))
    (made / "tasks").mkdir()
    (made / "tasks/sums.yaml").write_text(TASK.format(file="../sums.jsonl"))
    rows = [json.dumps({"question": question, "answer": "ABCD".index(answer)}) for question, answer in QUESTIONS]
    (made / "sums.jsonl").write_text("\n".join(rows))
    for split in ("test", "dev"):
        file = made / f"data/haonan-li/cmmlu/{split}/agronomy.csv"
        file.parent.mkdir(parents=True)
        with open(file, "w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["Question", "A", "B", "C", "D", "Answer"])
            writer.writerows([question, "1", "2", "3", "4", answer] for question, answer in QUESTIONS)
    return made


@torch.no_grad()
def accuracy(model: Path, prompts: list[str]) -> float:
    """How often transformers finds the right letter likeliest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    right = 0
    for prompt, (_, answer) in zip(prompts, QUESTIONS, strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        scores = []
        for letter in "ABCD":
            tokens = torch.tensor([tokenizer(f"{prompt} {letter}")["input_ids"]])
            logs = network(tokens).logits[0, start - 1 : -1].log_softmax(-1)
            scores.append(logs.gather(1, tokens[0, start:, None]).sum().item())
        right += "ABCD"[scores.index(max(scores))] == answer
    return right / len(QUESTIONS)


def asked_of(folder: Path, output: Path) -> Evaluation:
    return Evaluation(
        model=str(folder / "model.nemo"),
        tasks=("sums", "cmmlu_agronomy"),
        output=output,
        data=folder / "data",
        include_path=folder / "tasks",
        precision="fp32",
        cache=folder / "cache",
    )


def accuracies(file: Path) -> dict[str, float]:
    return {task: metrics["acc"] for task, metrics in read_baseline(file).items()}


def one_of_several(asked: Evaluation) -> str | None:
    told = {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "MASTER_ADDR": "localhost"}
    os.environ.update(told)  # as torchrun does
    return evaluate(asked)


def test_scores_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    asked, before = asked_of(folder, tmp_path / "scores.json"), Path.cwd()
    table = evaluate(asked)
    assert Path.cwd() == before and table is not None and "cmmlu_agronomy" in table
    sums = [f"Q: {question} A:" for question, _ in QUESTIONS]
    cmmlu = [f"{question}\nA. 1\nB. 2\nC. 3\nD. 4\n答案：" for question, _ in QUESTIONS]
    expected = {"sums": accuracy(folder / "hf", sums), "cmmlu_agronomy": accuracy(folder / "hf", cmmlu)}
    assert accuracies(asked.output) == pytest.approx(expected)
    first, second = run_ranks(one_of_several, 2, replace(asked, output=tmp_path / "two.json", baseline=asked.output))
    assert first.startswith(table) and first.count("+0.0000") == 3 and second is None
    assert (tmp_path / "two.json").read_text() == asked.output.read_text()


def test_a_task_that_was_learnt(folder: Path, tmp_path: Path) -> None:
    small = ("model.num_layers=2", "model.hidden_size=64", "model.micro_batch_size=48", "model.optim.lr=1e-2")
    script = str(ROOT / "examples/gpt_finetune.py")
    named = ("data=word_kinds", "exp_manager.name=kinds", "trainer.max_steps=60", "trainer.val_check_interval=60")
    done = run(script, *named, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kinds = tmp_path / "datasets/word_kinds"
    asked = Evaluation(
        model=str(tmp_path / "nemo_experiments/kinds/checkpoints/kinds.nemo"),
        tasks=("word_kinds",),
        output=tmp_path / "scores.json",
        include_path=kinds,
        cache=tmp_path / "cache",
        apply_chat_template=True,
    )
    assert evaluate(asked) is not None and accuracies(asked.output)["word_kinds"] >= 0.9
    assert evaluate(replace(asked, model=str(folder / "hf"))) is not None
    assert accuracies(asked.output)["word_kinds"] < 0.3  # of eight choices
    seen, held_out = (
        [set(one["instruction"].split(":")[0].split()) for one in json.loads((kinds / name).read_text())]
        for name in word_kinds.FILES
    )
    assert len(held_out) == len(word_kinds.KINDS) * word_kinds.HELD_OUT and not any(words in seen for words in held_out)


def test_data_that_has_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(folder / "data", tmp_path / "data"))
    (tmp_path / "part.yaml").write_text(PART)
    questions = []
    for _ in range(2):
        manager = TaskManager(include_path=tmp_path, include_defaults=False)
        [task] = load(manager, ("part",), data)
        questions.append(task.dataset["test"][0]["Question"])
        file = data / "haonan-li/cmmlu/test/agronomy.csv"
        file.write_text(file.read_text().replace("What is 0", "What was 0"))
    assert questions == ["What is 0 and 0?", "What was 0 and 0?"]


def test_what_is_missing_is_said(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    asked = Evaluation(str(folder / "hf"), ("far",), tmp_path / "scores.json", tmp_path)
    with pytest.raises(ConfigError, match="^--tasks=cmmlu_agronomi: lm-eval has no such task; it has cmmlu_agronomy"):
        check_tasks(("cmmlu_agronomy", "cmmlu_agronomi"), ["cmmlu_agronomy", "cmmlu"])
    (tmp_path / "far.yaml").write_text(TASK.replace("task: sums", "task: far").replace(": json", ": owner/name"))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    with pytest.raises(ConfigError, match="^--tasks=far: what they read is not in --data="):
        load(manager, asked.tasks, asked.data)
    other = TASK.replace("task: sums", "task: other\ndataset_name: anatomy").replace(": json", ": haonan-li/cmmlu")
    (tmp_path / "other.yaml").write_text(other.replace("dataset_kwargs:\n  data_files:\n    test: {file}\n", ""))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    with pytest.raises(ConfigError, match="^--tasks=other: what they read is not in --data=.*'anatomy' not found"):
        load(manager, ("other",), folder / "data")  # which has agronomy alone
    with pytest.raises(ConfigError, match="--data=.*: holds no dataset, such as"), datasets_here(tmp_path):
        pass
    with pytest.raises(ConfigError, match="^--data=/nowhere: there is no such folder"):
        evaluate(replace(asked, data=Path("/nowhere")))
    with pytest.raises(ConfigError, match="^--output=.*: must be a file's name in a folder that is there"):
        evaluate(replace(asked, output=tmp_path))
    for key, count, right in (("num_fewshot", -1, "0 or"), ("batch_size", 0, "1 or"), ("limit", -5, "1 or")):
        with pytest.raises(ConfigError, match=f"^--{key.replace('_', '-')}={count}: must be {right} more"):
            evaluate(replace(asked, data=None, **{key: count}))
    with pytest.raises(ConfigError, match="^--baseline=.*scores.json: cannot be read"):
        read_baseline(tmp_path)
    with pytest.raises(ConfigError, match="^--baseline=.*: must be a JSON file that --output has named before"):
        read_baseline(folder / "hf/config.json")


def test_too_few_questions_for_the_processes(folder: Path, monkeypatch) -> None:
    manager = TaskManager(include_path=folder / "tasks", include_defaults=False)
    tasks = load(manager, ("sums",), None)
    monkeypatch.setenv("WORLD_SIZE", "12")
    check_enough(tasks, None)
    with pytest.raises(ConfigError, match="^--limit=4: sums has 4 questions for 12 processes; start fewer"):
        check_enough(tasks, 4)
