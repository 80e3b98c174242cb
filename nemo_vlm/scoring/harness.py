"""Scores of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), by one process or several."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm.conversion.jobs import of_family
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import written_whole
from nemo_vlm.scoring.exports import huggingface
from nemo_vlm.scoring.report import SCORES, Outcome, table
from nemo_vlm.scoring.tasks import check_tasks, load
from nemo_vlm.script import PRECISIONS
from nemo_vlm.sources.opening import open_source

KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")  # of what lm-eval reports


@dataclass(frozen=True)
class Evaluation:
    """What is to be scored.

    Attributes:
        tasks: lm-eval's tasks and groups, or those of include_path.
        data: a folder with datasets under their names on the hub.
        include_path: a folder with YAML files of more tasks.
        limit: examples of each task at most.
        cache: of exports, see scoring.exports.
        apply_chat_template: ask as a user does, by the model's template; else the model goes on with the task's text.
        baseline: the output of another evaluation, to be compared with.
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
    cache: Path | None = None
    apply_chat_template: bool = False
    baseline: Path | None = None


def evaluate(asked: Evaluation) -> str | None:
    """Write the scores as JSON; of several processes, which share the questions, the first does.

    Returns:
        them as a table; None where another process has them.
    Raises:
        ConfigError: lm-eval is not installed, a task or its data is not there, or the output cannot be.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from nemo_vlm.scoring.hflm import Shared
    except ModuleNotFoundError as error:
        raise ConfigError(f"lm-eval cannot be imported ({error}): pip install -r requirements/eval.txt") from None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    include_path, data = known_folder(asked.include_path, "--include-path"), known_folder(asked.data, "--data")
    check_output(asked.output)
    check_counts(asked)
    before = None if asked.baseline is None else read_baseline(asked.baseline)
    of_family(open_source(asked.model, "--model"), "--model", ("gpt",))
    manager = TaskManager(include_path=include_path)
    check_tasks(asked.tasks, manager.all_tasks)
    tasks = load(manager, asked.tasks, data)
    check_enough(tasks, asked.limit)
    model = Shared.of(
        huggingface(asked.model, "--model", asked.cache), PRECISIONS[asked.precision] or "auto", asked.batch_size
    )
    found = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        apply_chat_template=asked.apply_chat_template,
        log_samples=False,
    )
    if found is None:
        return None
    write(found, asked)
    compared = [] if before is None else ["", *table(outcomes(found["results"]), before)]
    return "\n".join([make_table(found), *compared])


def write(found: dict[str, Any], asked: Evaluation) -> None:
    with written_whole(asked.output) as file:
        kept = {"model": asked.model, **{key: found[key] for key in KEPT if key in found}}
        json.dump(kept, file, indent=2, ensure_ascii=False, default=str)


def outcomes(results: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
    """Lm-eval's results without what are no scores; its names of metrics end with that of a filter, mostly `none`."""
    return [
        Outcome(
            task,
            {
                name.removesuffix(",none"): value
                for name, value in found.items()
                if isinstance(value, float) and "_stderr," not in name
            },
            0,
            "",
        )
        for task, found in results.items()
    ]


def read_baseline(file: Path) -> dict[str, Mapping[str, float]]:
    """The scores of an evaluation's output, or of the scores.json in a folder.

    Raises:
        ConfigError: it is none.
    """
    file = file / SCORES if file.is_dir() else file
    try:
        return {one.dataset: one.metrics for one in outcomes(json.loads(file.read_text())["results"])}
    except OSError as error:
        raise ConfigError(f"--baseline={file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--baseline={file}: must be a JSON file that --output has named before") from None


def check_output(output: Path) -> None:
    """Raises ConfigError where no file can be written."""
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output={output}: must be a file's name in a folder that is there")


def check_counts(asked: Evaluation) -> None:
    """Raises ConfigError where lm-eval would take a number that means nothing for one that does."""
    for key, least in (("batch_size", 1), ("num_fewshot", 0), ("limit", 1)):
        count = getattr(asked, key)
        if count is not None and count < least:
            raise ConfigError(f"--{key.replace('_', '-')}={count}: must be {least} or more")


def check_enough(tasks: Iterable[Any], limit: int | None) -> None:
    """Raises ConfigError where a process would have no question of a task, which lm-eval cannot do."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for task in leaves(tasks):
        count = len(task.eval_docs) if limit is None else min(len(task.eval_docs), limit)
        if count < processes:
            key = f"--tasks={task.task_name}" if limit is None else f"--limit={limit}"
            raise ConfigError(f"{key}: {task.task_name} has {count} questions for {processes} processes; start fewer")


def leaves(tasks: Iterable[Any]) -> Iterator[Any]:
    """The tasks, those of groups included."""
    for task in tasks:
        yield from task.get_all_tasks() if hasattr(task, "get_all_tasks") else (task,)


def known_folder(path: Path | None, key: str) -> Path | None:
    """Raises ConfigError where it is none."""
    if path is not None and not path.is_dir():
        raise ConfigError(f"{key}={path}: there is no such folder")
    return None if path is None else path.absolute()
