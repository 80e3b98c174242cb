"""scripts/evaluate_lm.py: lm-eval's accuracies are those that transformers gives, and what is missing is said."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tiny_hf import make_qwen

from nemo_vlm.conversion.harness import Evaluation, check_tasks, datasets_here, evaluate, load
from nemo_vlm.conversion.jobs import Run, import_huggingface
from nemo_vlm.errors import ConfigError
from nemo_vlm.sources.opening import open_source

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a task of our own, and CMMLU's data of one subject as its archive unpacks."""
    made = tmp_path_factory.mktemp("harness")
    make_qwen(made / "hf")
    import_huggingface(open_source(made / "hf", "input"), made / "model.nemo", Run("auto", "cpu", False))
    (made / "tasks").mkdir()
    (made / "tasks/sums.yaml").write_text(TASK.format(file=made / "sums.jsonl"))
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


def test_scores_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    asked = Evaluation(
        model=str(folder / "model.nemo"),
        tasks=("sums", "cmmlu_agronomy"),
        output=tmp_path / "scores.json",
        data=folder / "data",
        include_path=folder / "tasks",
        precision="fp32",
    )
    before = Path.cwd()
    table = evaluate(asked)
    assert Path.cwd() == before and "cmmlu_agronomy" in table
    scores = json.loads((tmp_path / "scores.json").read_text())["results"]
    sums = [f"Q: {question} A:" for question, _ in QUESTIONS]
    assert scores["sums"]["acc,none"] == pytest.approx(accuracy(folder / "hf", sums))
    cmmlu = [f"{question}\nA. 1\nB. 2\nC. 3\nD. 4\n答案：" for question, _ in QUESTIONS]
    assert scores["cmmlu_agronomy"]["acc,none"] == pytest.approx(accuracy(folder / "hf", cmmlu))


def test_what_is_missing_is_said(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    asked = Evaluation(str(folder / "hf"), ("far",), tmp_path / "scores.json", tmp_path)
    with pytest.raises(ConfigError, match="^--tasks=cmmlu_agronomi: lm-eval has no such task; it has cmmlu_agronomy"):
        check_tasks(("cmmlu_agronomy", "cmmlu_agronomi"), ["cmmlu_agronomy", "cmmlu"])
    (tmp_path / "far.yaml").write_text(TASK.replace("task: sums", "task: far").replace(": json", ": owner/name"))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    with pytest.raises(ConfigError, match="^--tasks=far: what they read is not in --data="):
        load(manager, asked)
    other = TASK.replace("task: sums", "task: other\ndataset_name: anatomy").replace(": json", ": haonan-li/cmmlu")
    (tmp_path / "other.yaml").write_text(other.replace("dataset_kwargs:\n  data_files:\n    test: {file}\n", ""))
    manager, other = TaskManager(include_path=tmp_path, include_defaults=False), replace(asked, tasks=("other",))
    with (
        pytest.raises(ConfigError, match="^--tasks=other: what they read is not in --data=.*'anatomy' not found"),
        datasets_here(folder / "data"),  # which has agronomy alone
    ):
        load(manager, other)
    with pytest.raises(ConfigError, match="--data=.*: holds no dataset, such as"), datasets_here(tmp_path):
        pass
    with pytest.raises(ConfigError, match="^--data=/nowhere: there is no such folder"):
        evaluate(replace(asked, data=Path("/nowhere")))
    with pytest.raises(ConfigError, match="^--output=.*: must be a file's name in a folder that is there"):
        evaluate(replace(asked, output=tmp_path))
