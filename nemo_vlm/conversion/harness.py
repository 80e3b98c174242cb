"""Scores of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), from local files alone.

It reads its tasks' data by names such as haonan-li/cmmlu, for which `datasets` looks in the working directory before it
asks the hub: its own tasks run unchanged where such folders are.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_vlm.conversion.convert import Target, to_huggingface
from nemo_vlm.conversion.jobs import of_family
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import written_whole
from nemo_vlm.script import PRECISIONS
from nemo_vlm.sources.huggingface import is_huggingface
from nemo_vlm.sources.megatron import is_megatron
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

README = "README.md"
KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")  # of what lm-eval reports


@dataclass(frozen=True)
class Evaluation:
    """What is to be scored.

    Attributes:
        tasks: lm-eval's tasks and groups, or those of include_path.
        data: a folder with datasets under their names on the hub.
        include_path: a folder with YAML files of more tasks.
        limit: examples of each task at most.
    """

    model: str
    tasks: tuple[str, ...]
    output: Path
    data: Path | None = None
    include_path: Path | None = None
    precision: str = "auto"
    batch_size: int = 16
    num_fewshot: int | None = None
    limit: int | None = None


def evaluate(asked: Evaluation) -> str:
    """Write the scores as JSON.

    Returns:
        them as a table.
    Raises:
        ConfigError: lm-eval is not installed, a task or its data is not there, or the output cannot be.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ModuleNotFoundError as error:
        raise ConfigError(f"lm-eval cannot be imported ({error}): pip install -r requirements/eval.txt") from None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    include_path, data = known_folder(asked.include_path, "--include-path"), known_folder(asked.data, "--data")
    source, output = of_family(open_source(asked.model, "--model"), "--model", ("gpt",)), asked.output.absolute()
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"--output={asked.output}: must be a file's name in a folder that is there")
    manager = TaskManager(include_path=include_path)
    check_tasks(asked.tasks, manager.all_tasks)
    with exported(source) as folder, datasets_here(data):
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": PRECISIONS[asked.precision] or "auto"},
            tasks=load(manager, asked),
            task_manager=manager,
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=asked.batch_size,
            num_fewshot=asked.num_fewshot,
            limit=asked.limit,
            log_samples=False,
        )
    assert found is not None
    with written_whole(output) as file:
        kept = {"model": asked.model, **{key: found[key] for key in KEPT if key in found}}
        json.dump(kept, file, indent=2, ensure_ascii=False, default=str)
    return str(make_table(found))


def known_folder(path: Path | None, key: str) -> Path | None:
    """Raises ConfigError where it is none."""
    if path is not None and not path.is_dir():
        raise ConfigError(f"{key}={path}: there is no such folder")
    return None if path is None else path.absolute()


def check_tasks(tasks: tuple[str, ...], known: list[str]) -> None:
    """Raises ConfigError where lm-eval has no such task."""
    for task in tasks:
        if task not in known:
            alike = ", ".join(difflib.get_close_matches(task, known, 3))
            raise ConfigError(f"--tasks={task}: lm-eval has no such task" + (f"; it has {alike}" if alike else ""))


def load(manager: Any, asked: Evaluation) -> list[Any]:
    """The groups and tasks with their data, read before the model is.

    Raises:
        ConfigError: data is not here.
    """
    from datasets.exceptions import DatasetsError

    try:
        found = manager.load(list(asked.tasks))
    except (ConnectionError, DatasetsError, FileNotFoundError, ValueError) as error:
        if type(error) is ValueError and "BuilderConfig" not in str(error):  # which is: the data set has no such part
            raise
        where = "not here; give --data" if asked.data is None else f"not in --data={asked.data}"
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"--tasks={','.join(asked.tasks)}: what they read is {where} ({said})") from None
    groups = [found["groups"][name] for name in asked.tasks if name in found["groups"]]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return groups + [task for name, task in found["tasks"].items() if name not in inside]


@contextlib.contextmanager
def exported(source: Source) -> Iterator[Path]:
    """The model's directory in Hugging Face's layout; of another format, one that is made for as long."""
    if source.tokenizer is None:
        raise ConfigError(f"--model={source}: holds no tokenizer, without which it cannot be scored")
    if is_huggingface(source.path) and not is_megatron(source.path):
        yield source.path
        return
    with tempfile.TemporaryDirectory() as scratch:
        to_huggingface(source, Target(Path(scratch, "hf")))
        yield Path(scratch, "hf")


@contextlib.contextmanager
def datasets_here(data: Path | None) -> Iterator[None]:
    """Work where a folder's datasets stand under their names, each with a README.md that names the files of its parts.

    Raises:
        ConfigError: there are none.
    """
    if data is None:
        yield
        return
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        for dataset in sorted(path for path in data.glob("*/*") if path.is_dir()):
            link(dataset, Path(scratch, dataset.relative_to(data)))
        if not any(Path(scratch).iterdir()):
            raise ConfigError(f"--data={data}: holds no dataset, such as haonan-li/cmmlu/test/agronomy.csv")
        os.chdir(scratch)
        try:
            yield
        finally:
            os.chdir(before)


def link(dataset: Path, place: Path) -> None:
    """Put a dataset there; one without a description gets it, if it is SPLIT/PART.csv or SPLIT/PART_SPLIT.csv."""
    parts: dict[str, list[dict[str, str]]] = {}
    for file in sorted(dataset.glob("*/*.csv")):
        split = file.parent.name
        entry = {"split": split, "path": f"{split}/{file.name}"}
        parts.setdefault(file.stem.removesuffix(f"_{split}"), []).append(entry)
    described = (dataset / README).is_file() and "\nconfigs:" in (dataset / README).read_text()
    if not parts and not described:
        return
    place.parent.mkdir(exist_ok=True)
    if described:
        place.symlink_to(dataset)
        return
    place.mkdir()
    for split in {entry["split"] for entries in parts.values() for entry in entries}:
        (place / split).symlink_to(dataset / split)
    configs = [{"config_name": part, "data_files": entries} for part, entries in parts.items()]
    (place / README).write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
