"""lm-eval's tasks, and the data that they read, from local files alone.

lm-eval reads its tasks' data by names such as haonan-li/cmmlu, for which `datasets` looks in the working directory
before it asks the hub: its own tasks run unchanged where such folders are.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import stamp

README = "README.md"
FILES = ("data_files", "data_dir")  # of a task's dataset_kwargs: paths, globs, or lists or dictionaries of them


def check_tasks(tasks: tuple[str, ...], known: list[str]) -> None:
    """Raises ConfigError where lm-eval has no such task."""
    for task in tasks:
        if task not in known:
            alike = ", ".join(difflib.get_close_matches(task, known, 3))
            raise ConfigError(f"--tasks={task}: lm-eval has no such task" + (f"; it has {alike}" if alike else ""))


def load(manager: Any, tasks: tuple[str, ...], data: Path | None) -> list[Any]:
    """The groups and tasks with their data.

    Args:
        manager: lm-eval's TaskManager.
        data: a folder with datasets under their names on the hub; None: Hugging Face's cache has them.
    Raises:
        ConfigError: data is not here.
    """
    from datasets.exceptions import DatasetsError

    try:
        with tempfile.TemporaryDirectory() as scratch:
            name_whole_paths(manager, Path(scratch))
            with datasets_here(data):
                found = manager.load(list(tasks))
    except (ConnectionError, DatasetsError, FileNotFoundError, ValueError) as error:
        if type(error) is ValueError and "BuilderConfig" not in str(error):  # which is: the data set has no such part
            raise
        where = "not here; give --data" if data is None else f"not in --data={data}"
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"--tasks={','.join(tasks)}: what they read is {where} ({said})") from None
    groups = [found["groups"][name] for name in tasks if name in found["groups"]]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return groups + [task for name, task in found["tasks"].items() if name not in inside]


def name_whole_paths(manager: Any, scratch: Path) -> None:
    """Let tasks find the files that stand beside their YAML, wherever lm-eval runs.

    Args:
        scratch: a folder for the YAML files, each including the task's own, that lm-eval reads in their place.
    """
    for number, entry in enumerate(manager.task_index.values()):
        given = (entry.cfg or {}).get("dataset_kwargs") or {}
        paths = {key: given[key] for key in FILES if key in given}
        if entry.yaml_path is None or not paths:
            continue
        named = given | {key: whole(value, entry.yaml_path.parent) for key, value in paths.items()}
        if named != given:
            changed = {"include": os.path.abspath(entry.yaml_path), "dataset_kwargs": named}
            entry.yaml_path = scratch / f"{number}.yaml"
            entry.yaml_path.write_text(yaml.safe_dump(changed))


def whole(value: Any, folder: Path) -> Any:
    """Relative paths in full, of files in this folder or else in the working directory; others are the hub's."""
    if isinstance(value, dict):
        return {key: whole(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner, folder) for inner in value]
    if not isinstance(value, str):
        return value  # lm-eval says what is wrong with it
    places = (Path(os.path.abspath(place), value) for place in (folder, ""))
    return next((str(path) for path in places if glob.glob(str(path))), value)


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
    """Put a dataset there, if it describes its parts or their names tell them.

    `datasets` keeps what it has read by the description, which therefore tells this version of the files from others.
    """
    about = front_matter(dataset / README)
    configs = about.get("configs") or by_names(dataset)
    if not configs:
        return
    place.mkdir(parents=True)
    for entry in dataset.iterdir():
        (place / entry.name).symlink_to(entry)
    about |= {"configs": [{**config, "description": stamp(dataset)} for config in configs]}
    (place / README).unlink(missing_ok=True)
    (place / README).write_text(f"---\n{yaml.safe_dump(about)}---\n")


def front_matter(file: Path) -> dict[str, Any]:
    """What a README.md of the hub says to programs: YAML between two lines of dashes.

    Raises:
        ConfigError: it is damaged.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        return dict(yaml.safe_load(found[1]) or {}) if found else {}
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: its first lines are not plain YAML ({' '.join(str(error).split())})") from None


def by_names(dataset: Path) -> list[dict[str, Any]]:
    """The parts of a dataset whose files are SPLIT/PART.csv or SPLIT/PART_SPLIT.csv."""
    parts: dict[str, list[dict[str, str]]] = {}
    for file in sorted(dataset.glob("*/*.csv")):
        split = file.parent.name
        entry = {"split": split, "path": f"{split}/{file.name}"}
        parts.setdefault(file.stem.removesuffix(f"_{split}"), []).append(entry)
    return [{"config_name": part, "data_files": entries} for part, entries in parts.items()]
