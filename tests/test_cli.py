"""The command line as a user types it: the demo's command under every layout, mistakes, and the archive it leaves."""

from __future__ import annotations

import ast
import csv
import json
from pathlib import Path

import pytest
from commands import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_vlm.training import step_times

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "examples" / "neva_finetune.py"
PEAK = 0.1  # TFLOP/s
LAYOUTS = sorted(path.stem for path in (ROOT / "conf" / "parallel").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    with open(folder / "nemo_experiments" / name / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(folder: Path):
    """Train a few steps of the demo under a layout, once; a single process as it is typed."""
    done: dict[str, list[dict[str, float]]] = {}

    def train(parallel: str, *overrides: str, launcher: tuple[str, ...] = ()) -> list[dict[str, float]]:
        name = "_".join((parallel, *(o.replace("=", "") for o in overrides), *launcher[1:2])).replace(".", "")
        if name not in done:
            steps = (
                "trainer.max_steps=4",
                "trainer.precision=32",
                f"trainer.peak_tflops={PEAK}",
                f"exp_manager.name={name}",
                f"parallel={parallel}",
            )
            result = run(*launcher, str(TRAIN), *steps, *overrides, cwd=folder, forked=parallel != "single")
            assert result.returncode == 0, result.stderr
            done[name] = metrics(folder, name)
        return done[name]

    return train


def assert_same(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine["reduced_train_loss"] == pytest.approx(theirs["reduced_train_loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert (mine["lr"], mine["consumed_samples"]) == (theirs["lr"], theirs["consumed_samples"])


def visual_load(row: dict[str, float]) -> tuple[float, float]:
    """Visual tokens of the global batch, and the most of one data-parallel rank; each of 32 samples has 16."""
    return row["visual_tokens"], row["visual_tokens_max_rank"]


def test_four_ranks_train_as_one_process(trained) -> None:
    """The other layouts are shown by tests/test_families.py, without a command each."""
    rows = trained("tp2_pp2")
    assert [row["world_size"] for row in rows] == [4] * 4
    assert [row["world_size"] for row in trained("single")] == [1] * 4
    assert_same(rows, trained("single"))
    assert {visual_load(row) for row in rows} == {(32 * 16, 32 * 16)}
    for row in rows:
        assert row["mfu"] == row["tflops_per_gpu"] / PEAK and row["vision_imbalance"] == 1.0
        assert 0 < sum(row[part] for part in step_times.WITHIN) <= row[step_times.STEP]


def test_torchrun_starts_the_ranks_too(trained) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    rows = trained("ddp", launcher=launcher)
    assert_same(rows, trained("single"))
    assert {visual_load(row) for row in rows} == {(32 * 16, 16 * 16)}


def test_too_many_missing_images_end_the_run(trained, folder: Path) -> None:
    trained("single")
    records = json.loads((folder / "datasets/digits_vqa/train.json").read_text())[:32]
    for record in records[:16]:
        record["image"] = "images/missing.png"
    (folder / "datasets/digits_vqa/broken.json").write_text(json.dumps(records))
    broken = ("model.data.data_path=datasets/digits_vqa/broken.json", "exp_manager.name=broken", "parallel=ddp")
    result = run(str(TRAIN), *broken, "model.data.num_workers=1", "trainer.enable_progress_bar=false", cwd=folder)
    assert result.returncode == 1
    said = "64 of 128 samples were left out (64 missing_image), more than model.data.max_skip_fraction=0.01"
    assert said in result.stderr and "Traceback" not in result.stderr
    listed = (folder / "nemo_experiments/broken/skipped_samples.jsonl").read_text().splitlines()
    assert len(listed) == 64 and all("missing.png: the image does not exist" in line for line in listed)


def test_what_a_run_leaves(trained, folder: Path) -> None:
    trained("tp2_pp2")
    left = folder / "nemo_experiments" / "tp2_pp2"
    for name in (
        "config.yaml",
        "cmd-args.log",
        "loss.png",
        "tensorboard",
        "checkpoints/tp2_pp2.nemo",
    ):
        assert (left / name).exists(), name
    drawn = EventAccumulator(str(left / "tensorboard")).Reload().Tags()["scalars"]
    assert {"reduced_train_loss", *(f"time/{column}" for column in step_times.COLUMNS)} <= set(drawn)
    header = (left / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        "val_loss",
        "mfu",
        "tokens_per_sec",
        "tflops_per_gpu",
        "padding_fraction",
        "train_step_timing in s",
    } <= set(header)


def test_archives_of_every_layout_hold_the_same_model_and_answer(trained, folder: Path) -> None:
    import torch

    from nemo_vlm.archive import Archive

    trained("single"), trained("tp2_pp2")
    one, four = (Archive(folder / f"nemo_experiments/{name}/checkpoints/{name}.nemo") for name in ("single", "tp2_pp2"))
    assert one.names() == four.names()
    for name in one.names():
        torch.testing.assert_close(one.read(name), four.read(name), rtol=0, atol=5e-4)
    moved = folder / "moved.nemo"
    four.store.path.rename(moved)  # self-contained: nothing beside it is needed
    questions = json.loads((folder / "datasets/digits_vqa/heldout.json").read_text())[:6]
    (folder / "datasets/digits_vqa/few.json").write_text(json.dumps(questions))
    script = str(ROOT / "examples/neva_evaluation.py")
    result = run(
        script,
        f"neva_model_file={moved}",
        "data_path=datasets/digits_vqa/few.json",
        "output_folder=out",
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    assert "held-out accuracy: 0." in result.stdout
    rows = [json.loads(line) for line in (folder / "out/predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [record["id"] for record in questions]
    assert (folder / "out/predictions.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model.optm.lr=1", "model.optm: unknown key 'optm'; did you mean 'optim'?"),
        (
            "parallel=tp2 model.num_query_groups=3",
            "model.num_query_groups=3: model.num_attention_heads=4 must divide by it",
        ),
        (
            "model.micro_batch_size=7 model.global_batch_size=16",
            "model.global_batch_size=16: does not divide by model.micro_batch_size=7",
        ),
        (
            "parallel=tp3000",
            f"parallel=tp3000: no such choice; there are {', '.join(LAYOUTS)}; --config-dir=FOLDER adds",
        ),
        (
            "model=qwen2_vl_tiny",
            "model=qwen2_vl_tiny (model.family=qwen2_vl): the data and the tokenizer of neva_finetune are a llava's; "
            "give data=NAME, or --config-name qwen2_vl_finetune",
        ),
        ("llava_7b", "llava_7b: settings are KEY=VALUE, as model=llava_7b"),
        ("model=null", "Config group override must be a string or a list"),
        ("model.micro_batch_size=0 --config-name neva_finetune", "model.micro_batch_size=0: must be 1 or more"),
        ("trainer.precision=bf17", "trainer.precision=bf17: must be one of 32, bf16, bf16-mixed"),
        (
            "model.activations_checkpoint_granularity=true",
            "model.activations_checkpoint_granularity=true: must be full or selective",
        ),
        ("+model.foo=1", "model.foo: unknown key 'foo'"),
        ("--config-name=nothing", "Cannot find primary config 'nothing'"),
        ("model.tokenizer.type=nowhere", "model.tokenizer.type=nowhere: no tokenizer"),
        ("search=true", "search: unknown key here; python examples/plan.py search=true searches for a layout"),
        ("trainer.max_steps=0", "trainer.max_steps=0: must be 1 or more"),
        (
            "model=llava_7b trainer.num_nodes=2",
            "this machine cannot run it: trainer.num_nodes=2 needs MASTER_ADDR, MASTER_PORT, NODE_RANK",
        ),
        (
            "model.transformer_impl=transformer_engine trainer.accelerator=cpu",
            "model.transformer_impl=transformer_engine: it needs a CUDA",
        ),
        (
            "model.attention_backend=unfused trainer.accelerator=cpu",
            "model.attention_backend=unfused: needs Transformer Engine on a CUDA device",
        ),
        (
            "model.data.train_samples=640 model.optim.sched.warmup_steps=5",
            "model.optim.sched.warmup_steps=5: the run is counted in samples (model.data.train_samples)",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: str, message: str) -> None:
    result = run(str(TRAIN), *arguments.split(), cwd=folder)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(message)


def test_a_network_interface_must_exist(folder: Path) -> None:
    result = run(str(TRAIN), cwd=folder, GLOO_SOCKET_IFNAME="nothing0")
    assert result.returncode == 2
    assert result.stderr.startswith("GLOO_SOCKET_IFNAME=nothing0: this machine has no interface nothing0")


@pytest.mark.parametrize(
    ("key", "path"),
    [("data_path", "nowhere.json"), ("data_path", "[1,.,3,away/my.json]"), ("validation_path", "no.json")],
)
def test_missing_data_are_told_before_torch_is_imported(key: str, path: str, folder: Path) -> None:
    """Beside a demo's, which need not be there yet."""
    result = run("-X", "importtime", str(TRAIN), f"model.data.{key}={path}", cwd=folder)
    assert result.returncode == 2
    *imports, line = result.stderr.splitlines()
    name = path.strip("[]").split(",")[-1]
    assert line == f"model.data.{key}={name}: cannot be read (No such file or directory)"
    assert imports and not any(each.endswith(" torch") for each in imports)


def test_missing_tokens_are_told_before_torch_is_imported(folder: Path) -> None:
    result = run("-X", "importtime", str(ROOT / "examples/gpt_pretrain.py"), "model.data.data_path=away/a", cwd=folder)
    assert result.returncode == 2
    *imports, line = result.stderr.splitlines()
    assert line == "model.data.data_path=away/a: away/a.bin: cannot be read (No such file or directory)"
    assert imports and not any(each.endswith(" torch") for each in imports)


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"]])
def test_printing_the_settings_imports_no_torch(flags: list[str], folder: Path) -> None:
    result = run("-X", "importtime", str(TRAIN), *flags, cwd=folder)
    assert result.returncode == 0
    assert "tensor_model_parallel_size: 1" in result.stdout
    assert " torch" not in result.stderr


@pytest.mark.parametrize("name", ["plan", "generate"])
def test_help_begins_with_what_the_example_is_for(name: str, folder: Path) -> None:
    example = ROOT / f"examples/{name}.py"
    result = run(str(example), "--help", cwd=folder)
    assert result.stdout.splitlines()[:2] == [ast.get_docstring(ast.parse(example.read_text())), ""]
