"""What is shown at the end of a run: answers of its own archive, in the template that it was trained with."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from test_families import TINY, make_layout, run_of
from tiny_hf import make_qwen

from nemo_vlm import experiment
from nemo_vlm.checkpoints import archive_path
from nemo_vlm.config import ExpManagerConfig, RunConfig
from nemo_vlm.config.samples import SamplesConfig
from nemo_vlm.conversion.jobs import Run, import_huggingface
from nemo_vlm.files import written_whole
from nemo_vlm.inference import answers, samples
from nemo_vlm.inference.settings import DecodingConfig, GenerateConfig, NevaInferenceConfig
from nemo_vlm.sources.opening import open_source
from nemo_vlm.training.exp_manager import archive_version
from nemo_vlm.training.module import Plan

QUESTION = "Which square is red?"


def ended(folder: Path) -> RunConfig:
    """A run whose archive has v1, and a tokenizer with another template."""
    run = run_of("gpt", TINY["gpt"])
    run = replace(run, exp_manager=ExpManagerConfig(exp_dir=str(folder), name="x"))
    archive = archive_path(run.exp_manager)
    archive.parent.mkdir(parents=True)
    qwen = make_qwen(folder / "qwen", num_hidden_layers=2)
    import_huggingface(open_source(qwen, "input"), archive, Run("auto", "cpu", False))
    return replace(run, samples=SamplesConfig((QUESTION,), 12))


def test_questions_are_asked_in_the_template_of_the_run(tmp_path: Path, capsys) -> None:
    """As examples/neva_inference.py asks them, and not as the tokenizer's chat template has it."""
    run = ended(tmp_path)
    samples.show(run)
    shown = capsys.readouterr().out
    archive, decoding = str(archive_path(run.exp_manager)), DecodingConfig(tokens_to_generate=12)
    given, found = tmp_path / "in.jsonl", {}
    for line in ({"prompt": QUESTION}, {"messages": [{"role": "user", "content": QUESTION}]}):
        given.write_text(json.dumps(line))
        files = {"prompt_file": str(given), "output_file": str(tmp_path / "out.jsonl"), "inference": decoding}
        asks = "prompt" in line
        config = (
            NevaInferenceConfig(neva_model_file=archive, **files)
            if asks
            else GenerateConfig(model_path=archive, **files)
        )
        answers.prepare(config, {}).run()
        found[asks] = json.loads((tmp_path / "out.jsonl").read_text())["text"].strip()
    assert found[True] != found[False]
    assert shown == f"\n--- {QUESTION!r}\n{found[True]}\n"


def test_another_runs_archive_is_not_asked(tmp_path: Path, capsys, caplog) -> None:
    run = replace(
        run_of("gpt", TINY["gpt"]),
        exp_manager=ExpManagerConfig(exp_dir=str(tmp_path), name="x"),
        samples=SamplesConfig((QUESTION,)),
    )
    archive = archive_path(run.exp_manager)
    assert archive_version(run.exp_manager) is None
    archive.parent.mkdir(parents=True)
    versions = []
    for _ in range(2):
        with written_whole(archive) as file:
            file.write("another's")
        versions.append(archive_version(run.exp_manager))
    assert versions[0] != versions[1] == archive_version(run.exp_manager)
    with caplog.at_level(logging.INFO):
        experiment.conclude(Plan(run, make_layout(run, 1), "cpu", [], None, None), writes_archive=False)
    assert caplog.messages == ["no samples: the run wrote no archive"] and capsys.readouterr().out == ""
