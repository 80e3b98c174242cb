"""scripts/evaluate_vlm.py: what VLMEvalKit's run came to is told, and ranks keep in step; and a real run of it.

The real run wants an unmodified checkout, which the environment variable VLMEVALKIT names, and the Python of its
environment (requirements/eval.txt), VLMEVALKIT_PYTHON, else .venv/bin/python of the checkout.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import logging
import os
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from distributed import run_ranks
from PIL import Image
from test_qwen2_vl_processor import noise
from tiny_hf import make_llava, make_qwen, make_qwen2_vl

from nemo_vlm.data.records import RecordFile
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.images import load_image
from nemo_vlm.scoring import report, results
from nemo_vlm.scoring.answerer import Answerer
from nemo_vlm.scoring.ranks import Ranks
from nemo_vlm.scoring.report import Row, outcomes, read_scores, scores, table
from nemo_vlm.scoring.stock import of_model, print_config
from nemo_vlm.scoring.tsv import content_of, prepare
from nemo_vlm.scoring.vlmevalkit import Evaluation, checkpoint, evaluate, load_run, parse, subject, summed_up, this_run

ROOT = Path(__file__).parents[1]
CHECKOUT = os.environ.get("VLMEVALKIT")
DONE = {"status": "done", "metrics": {"l2=a|acc": 40.0, "Overall": 50.0}}
STATUS = {
    "created_at": "2026-08-18T10:00:00+00:00",
    "mode": "all",
    "datasets": {
        "Good": DONE,
        "Broken": {"status": "done", "error_message": "no such\nfile"},
        "Silent": {"status": "done", "error_message": ""},
        "Skipped": {"status": "done", "skip_reason": "invalid_dataset"},
        "Killed": {"status": "infer"},
        "Unscored": {"status": "done"},
        "Answers": DONE,
        "Unreported": DONE,
        "Judge": DONE,
        "Two": {"status": "done", "metrics": {"x": 1.0, "b": 2, "a": 3.5}},
    },
}
TWO = Row(primary={"a": 3.5, "b": 2.0})
FAILURES = {
    "Good": "",
    "Two": "",
    "Broken": "no such file",
    "Silent": "failed without a reason; VLMEvalKit's log may have one",
    "Skipped": "skipped (invalid_dataset)",
    "Killed": "did not end (status: infer)",
    "Unscored": "has no metrics",
    "Answers": "3 answers and 0 judgements failed",
    "Judge": "0 answers and 2 judgements failed",
    "Unreported": "VLMEvalKit's report does not name it",
    "Missing": "VLMEvalKit's status file does not name it",
}


def test_every_kind_of_failure_is_told() -> None:
    rows = {name: Row() for name in FAILURES} | {"Answers": Row(3), "Judge": Row(0, 2), "Two": TWO}
    rows.pop("Unreported")
    found = outcomes(STATUS, list(FAILURES), rows)
    assert {one.dataset: one.failure for one in found} == FAILURES
    assert list(scores(found)["Two"].items()) == [("a", 3.5), ("b", 2.0), ("x", 1.0)]
    assert set(scores(found)) == {"Good", "Two", "Answers", "Judge"}
    inferred = {"mode": "infer", "datasets": {"Good": {"status": "done", "skip_reason": "mode_infer"}}}
    assert [one.failure for one in outcomes(inferred, ["Good"], rows)] == [""]


def test_table_has_the_primary_metric_first_and_differences() -> None:
    value = {"primary_metric": "Overall", "primary_metric_value": 50.0}
    summary = {"benchmark": "Good", "infer_failed": 0, "judge_failed": None, **value}
    none = summed_up({**summary, "primary_metric": None, "primary_metric_value": None})
    unmarked = list(table(outcomes(STATUS, ["Good"], {"Good": none}), None))
    assert [line.split() for line in unmarked[1:]] == [["Good", "l2=a|acc", "40.0000"], ["Good", "Overall", "50.0000"]]
    found = outcomes(STATUS, ["Good", "Two"], {"Good": summed_up(summary), "Two": TWO})
    assert list(table(found, {"Good": {"Overall": 60.25}, "Other": {"acc": 1.0}})) == [
        "dataset  metric       score  baseline  difference",
        "Good     Overall *  50.0000   60.2500    -10.2500",
        "Good     l2=a|acc   40.0000         -           -",
        "Two      a *         3.5000         -           -",
        "Two      b *         2.0000         -           -",
        "Two      x           1.0000         -           -",
        "* the dataset's primary metric",
    ]
    assert next(table(found, None)).split() == ["dataset", "metric", "score"]
    assert list(table(outcomes(STATUS, ["Broken"], {"Broken": Row()}), None)) == []


def test_the_status_file_is_that_of_this_run(tmp_path: Path) -> None:
    for name, created in (
        ("T1", "2026-08-18T10:00:00+00:00"),
        ("T0", "2026-08-18T12:00:00+02:00"),
        ("T2", "2026-08-18T09:59:59+00:00"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps({"created_at": created}))
    assert this_run(tmp_path, 1787047200.0).parent.name in ("T0", "T1")  # which began in that second
    with pytest.raises(RuntimeError, match="has left no status.json"):
        this_run(tmp_path, 1787047201.0)


def test_wrong_inputs_are_told_in_one_line(tmp_path: Path) -> None:
    def refused(match: str, call, *args) -> None:
        with pytest.raises(ConfigError, match=match) as error:
            call(*args)
        assert "\n" not in str(error.value)

    refused("--model, --data", evaluate, Evaluation(tmp_path, tmp_path))
    refused("no checkout of VLMEvalKit", load_run, tmp_path)
    (tmp_path / "vlmeval").mkdir()
    refused("no checkout of VLMEvalKit", load_run, tmp_path)
    (tmp_path / "run.py").write_text("import vlmeval_lacks_this\n")
    refused("its package vlmeval_lacks_this is not in .*requirements/eval.txt", load_run, tmp_path)
    refused("--baseline=.*scores.json cannot be read", read_scores, tmp_path, "--baseline")
    (tmp_path / report.SCORES).write_text("[1]")
    refused("must hold {dataset: {metric: number}}", read_scores, tmp_path, "--baseline")
    refused("--name=a/b", subject, Evaluation(tmp_path, tmp_path, "m.nemo", ("Digits",), "a/b"))
    (tmp_path / "config.json").write_text('{"model": {"a": {}, "b": {}}, "data": {}}')
    config = Evaluation(tmp_path, tmp_path, config=tmp_path / "config.json")
    refused("--config=.*of one model", subject, config)
    refused("leave out --model, --max-new-tokens", subject, replace(config, model="nowhere.nemo", max_new_tokens=1))
    refused("--print-config writes one; leave it out", print_config, config)
    refused("--work-dir=.*/config.json/m cannot be made", results.make_folder, tmp_path / "config.json", "m")
    make_qwen(tmp_path / "qwen")
    blind = Evaluation(tmp_path, tmp_path, str(tmp_path / "qwen"), ("Digits",))
    refused("sees no images; scripts/evaluate_lm.py", subject, blind)
    refused("--max-new-tokens=0: must be 1 or more", subject, replace(blind, max_new_tokens=0))
    refused("--model=m.nemo: there is no such file", subject, replace(blind, model="m.nemo"))


def test_flags_that_would_do_nothing_are_refused(tmp_path: Path, monkeypatch) -> None:
    """By a run.py with flags as VLMEvalKit's."""
    monkeypatch.setattr(sys, "argv", ["run.py"])
    flags = ArgumentParser()
    flags.add_argument("--model", nargs="+")
    flags.add_argument("--data", nargs="+")
    for name, default in (("--work-dir", ""), ("--mode", "infer"), ("--judge", None), ("--judge-key", None)):
        flags.add_argument(name, default=default)
    flags.add_argument("--judge-base-url")
    flags.add_argument("--max-tokens", type=int, default=2**15)
    flags.add_argument("--temperature", type=float)
    run = SimpleNamespace(parse_args=flags.parse_args)
    asked = Evaluation(
        tmp_path, tmp_path, "m.nemo", ("Digits",), others=("--mode", "eval", "--judge", "exact_matching")
    )
    assert parse(run, asked).mode == "eval"
    with pytest.raises(ConfigError, match="^--max-tokens, --temperature: no flag for.*--max-new-tokens"):
        parse(run, replace(asked, others=("--temperature", "0.7", "--max-tokens", "1")))
    with pytest.raises(ConfigError, match="unrecognized arguments: --what"):
        parse(run, replace(asked, others=("--what",)))


def test_answers_are_reused_for_their_own_checkpoint_alone(tmp_path: Path) -> None:
    """One at the same path, as a training that is run again leaves it; scores of others are not mixed with its own."""
    make_qwen2_vl(tmp_path / "m")
    asked = Evaluation(tmp_path, tmp_path / "work", str(tmp_path / "m"))
    folder = results.make_folder(asked.work_dir, asked.called)
    first = checkpoint(asked)
    results.claim(folder, first, reused=True)
    (folder / "T20260818-100000").mkdir()
    results.keep(folder, first, {"One": {"acc": 0.5}})
    results.claim(folder, first, reused=True)
    results.keep(folder, first, {"Two": {"acc": 0.25}})
    results.keep(folder, first, {})
    both = {"One": {"acc": 0.5}, "Two": {"acc": 0.25}}
    assert read_scores(asked.work_dir, "") == read_scores(folder, "") == both
    (tmp_path / "m/model.safetensors").touch()
    second = checkpoint(asked)
    with pytest.raises(ConfigError, match="--reuse.*holds answers of another checkpoint; give --name or --work-dir"):
        results.claim(folder, second, reused=True)
    results.claim(folder, second, reused=False)
    results.keep(folder, second, {"Two": {"acc": 1.0}})
    assert read_scores(asked.work_dir, "") == {"Two": {"acc": 1.0}}
    with pytest.raises(ConfigError, match="another checkpoint"):  # which of them answered what, nobody knows
        results.claim(folder, second, reused=True)
    assert json.loads((folder / results.CHECKPOINTS).read_text()) == {first: both, second: {"Two": {"acc": 1.0}}}
    (folder / results.CHECKPOINTS).unlink()
    with pytest.raises(ConfigError, match="another checkpoint"):
        results.claim(folder, second, reused=True)


def test_a_config_is_known_by_its_class_and_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.safetensors").write_text("1")
    asked, keys = Evaluation(tmp_path, tmp_path, config=tmp_path / "c.json"), []
    for change in ("Qwen2VLChat", "NemoVLM"):
        model = {"class": change, "model_path": str(tmp_path / "m")}
        (tmp_path / "c.json").write_text(json.dumps({"model": {"m": model}, "data": {}}))
        keys += [checkpoint(asked), checkpoint(asked)]
    (tmp_path / "m/model.safetensors").write_text("22")
    keys += [checkpoint(asked)]
    assert keys[0] == keys[1] != keys[2] == keys[3] != keys[4]


def test_names_keep_their_points() -> None:
    assert Evaluation(Path(), Path(), "runs/Qwen2.5-VL-3B/").called == "Qwen2.5-VL-3B"
    assert Evaluation(Path(), Path(), "run.nemo").called == "run"


def test_stock_classes_are_named_where_there_are_any(tmp_path: Path, capsys) -> None:
    make_qwen2_vl(tmp_path / "qwen")
    common = {"model_path": str(tmp_path / "qwen"), "max_new_tokens": 512}
    found = of_model(Evaluation(tmp_path, tmp_path, str(tmp_path / "qwen")))
    limits = Answerer(tmp_path / "qwen").processor.views.images
    assert (found.pop("min_pixels"), found.pop("max_pixels")) == (limits.min_pixels, limits.max_pixels)
    total = 128_000 * 28**2 * 9 // 10
    assert found == {"class": "Qwen2VLChat", **common, "total_pixels": total, "do_sample": False, "use_vllm": False}
    assert "stock VLMEvalKit" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--precision=bf16"):
        of_model(Evaluation(tmp_path, tmp_path, str(tmp_path / "qwen"), precision="bf16"))
    make_llava(tmp_path / "llava")
    assert of_model(Evaluation(tmp_path, tmp_path, str(tmp_path / "llava")))["class"] == "NemoVLM"
    assert "stock VLMEvalKit cannot open this export" in capsys.readouterr().err


def harness(rank: int, failing: int) -> list[str]:
    """run.py's loop over datasets, of which a rank gives one up alone."""
    done: list[str] = []
    for number in range(4):
        dist.barrier()
        try:
            if (rank, number) == (failing, 1):
                raise ValueError("mine alone")
            dist.barrier()
            dist.barrier()
            done.append(f"{number}")
        except Exception as error:
            logging.getLogger("harness").exception("skipped")
            done.append(str(error))
    dist.destroy_process_group()
    return done


def ranks_in_step(failing: int) -> tuple[list[str], int, str]:
    ranks = Ranks(dist.get_world_size(), dist.get_rank())
    ranks.replace_torch()
    ranks.listen(logging.getLogger("harness"))
    done = harness(ranks.rank, failing)
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as end, ranks.together():
        if ranks.rank > 0:
            raise ConfigError("the same on two")
    return done, end.value.code, told.getvalue()


def test_a_rank_that_fails_alone_keeps_no_other_waiting() -> None:
    found = run_ranks(ranks_in_step, 3, 2)
    gone = "rank 2 gave this dataset up: mine alone"
    assert [done for done, _, _ in found] == [["0", gone, "2", "3"]] * 2 + [["0", "mine alone", "2", "3"]]
    assert [(code, told) for _, code, told in found] == [(2, ""), (2, "the same on two\n"), (2, "")]


def record(number: int, images: list[str], question: str, answer: str, **more: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": number, "image": images, "conversations": turns, **more}


def test_records_become_rows(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (4 + number, 5), (number, 2, 3)).save(tmp_path / name)
    listed = "<image>\nWhich of\nthese?\nA. cat\nB. None\nAnswer with the letter."
    records = [
        record(7, ["a.png"], listed, "B", category="animals"),
        record(8, ["a.png", "b.png"], "<image>\n<image>\nWhich?", "c", choices=["a", "b", "c"]),
        record(9, ["a.png"], "<image>\nWhich?\nA. x\nB. y", "y"),
        record(10, ["a.png"], "<image>\nOpen?", "yes"),
        record(11, ["a.png"], listed, "D"),
        record(12, ["none.png"], listed, "A"),
        record(13, [], "Which?\nA. x\nB. y", "A"),
        record(14, ["a.png"], "Look.\nQ: which?\nA. x\nB. y", "A"),
        record(15, ["a.png"], "Which?", "1", choices=list(range(27))),
    ]
    (tmp_path / "in.json").write_text(json.dumps(records))
    said = prepare(RecordFile(tmp_path / "in.json"), tmp_path / "Mine.tsv")
    assert said.endswith(
        "4 questions of up to 3 options; 5 of 9 records are left out (3 no_options, 1 missing_image, 1 no_image)"
    )
    with open(tmp_path / "Mine.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    coded = [base64.b64encode((tmp_path / name).read_bytes()).decode() for name in ("a.png", "b.png")]
    assert [row["image"] for row in rows] == [coded[0], str(coded), coded[0], coded[0]]
    names = [row.pop("image_path") for row in rows]
    assert len(set(names)) == 4 and names[1].startswith("['1_0_") and names[1].endswith(".png']")
    shown = [[row[key] for key in ("index", "question", "A", "B", "C", "answer", "category")] for row in rows]
    assert shown == [
        ["0", "Which of\nthese?", "cat", "None\u00a0", "", "B", "animals"],
        ["1", "Which?", "a", "b", "c", "C", ""],
        ["2", "Which?", "x", "y", "", "B", ""],
        ["7", "Look.\nQ: which?", "x", "y", "", "A", ""],
    ]
    with pytest.raises(ConfigError, match="^--output=.*Mine.csv: must end in .tsv"):
        prepare(RecordFile(tmp_path / "in.json"), tmp_path / "Mine.csv")


def test_pandas_reads_options_as_they_are(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="needs requirements/eval.txt")
    Image.new("RGB", (4, 5)).save(tmp_path / "a.png")
    offered = [
        ["1", "007", "1", "4", "true"],
        ["20", "2", "2.50", "NULL"],
        ["300", "3", "cat"],
        ["-4", "nan", "FALSE", "5"],
    ]
    records = [record(number, ["a.png"], "Which?", "A", choices=texts) for number, texts in enumerate(offered)]
    for kept in (records, records[:1]):
        (tmp_path / "in.json").write_text(json.dumps(kept))
        prepare(RecordFile(tmp_path / "in.json"), tmp_path / "Mine.tsv")
        table = pandas.read_csv(tmp_path / "Mine.tsv", sep="\t")
        rows = [row[[letter for letter in "ABCDE" if letter in row]].dropna() for _, row in table.iterrows()]
        shown = [[str(option) for option in row] for row in rows]
        assert [[text.removesuffix("\u00a0") for text in row] for row in shown] == offered[: len(kept)]
    assert shown == [["1", "007\u00a0", "1", "4", "true\u00a0"]]  # whole numbers in every row are left alone


def test_images_reach_the_harness_as_training_sees_them(tmp_path: Path) -> None:
    """It converts to RGB what is of other modes, and saves as PNG, which cannot be of every one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = {"sideways.jpg": "RGB", "print.jpg": "CMYK", "alpha.png": "RGBA", "deep.png": "I;16", "grey.png": "L"}
    for name, mode in modes.items():
        image = noise(6, 9, mode)
        image.save(tmp_path / name, **({"exif": exif} if "sideways" in name else {}))
        content = content_of(tmp_path / name)
        assert (content == (tmp_path / name).read_bytes()) is (name == "grey.png")
        found = Image.open(io.BytesIO(content))
        assert found.mode in ("RGB", "L") and not found.getexif()
        assert found.convert("RGB").tobytes() == load_image(tmp_path / name, upright=True).tobytes()


def test_it_runs_without_what_clashes_with_the_harness() -> None:
    parts = ("vlmevalkit", "adapter", "stock", "answerer", "exports", "report", "ranks", "tsv")
    code = "import sys, " + ", ".join(f"nemo_vlm.scoring.{part}" for part in parts) + "\n"
    code += "print({'hydra', 'omegaconf', 'pytorch_lightning', 'lightning', 'megatron'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.skipif(CHECKOUT is None, reason="VLMEVALKIT names no checkout of VLMEvalKit")
def test_trained_digits_score_and_random_ones_do_not(tmp_path: Path) -> None:
    """Two processes, one dataset that is not there; the second run is compared with the first."""
    example = str(ROOT / "examples/neva_finetune.py")
    for name, settings in (("trained", ()), ("random", ("trainer.max_steps=1", "model.optim.lr=0.0"))):
        subprocess.run([sys.executable, example, f"exp_manager.name={name}", *settings], cwd=tmp_path, check=True)
    records = RecordFile(tmp_path / "datasets/digits_vqa/heldout.json")
    (tmp_path / "data").mkdir()
    prepare(records, tmp_path / "data/Digits.tsv")

    def scored(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        python = os.environ.get("VLMEVALKIT_PYTHON", f"{CHECKOUT}/.venv/bin/python")
        command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(ROOT / "scripts/evaluate_vlm.py"), "--vlmevalkit", str(CHECKOUT), "--work-dir", name]
        command += ["--model", f"nemo_experiments/{name}/checkpoints/{name}.nemo", "--max-new-tokens", "4", *flags]
        env = os.environ | {"LMUData": str(tmp_path / "data"), "NEMO_VLM_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    trained = scored("trained", "--data", "Digits")
    assert trained.returncode == 0, trained.stderr
    assert read_scores(tmp_path / "trained", "")["Digits"]["split=none|Overall"] >= 0.9
    random = scored("random", "--data", "Nowhere", "Digits", "--baseline", "trained")
    assert random.returncode != 0
    assert random.stderr.count("Nowhere: skipped (invalid_dataset)\n") == 1
    assert read_scores(tmp_path / "random", "")["Digits"]["split=none|Overall"] <= 0.2
    assert "difference" in random.stdout
    inferred = scored("random", "--data", "Digits", "--mode", "infer")
    assert inferred.returncode == 0, inferred.stderr
    assert read_scores(tmp_path / "random", "")["Digits"]["split=none|Overall"] <= 0.2
