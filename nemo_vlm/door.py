"""The door: Hydra's command line in, one task out, every error in one line. The only module that sees Hydra.

Everything heavy is imported inside the tasks, so that --help and --cfg job answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_vlm import typed
from nemo_vlm.command_line import beside, given_keys, is_override, quoted
from nemo_vlm.config import ExpManagerConfig, SamplesConfig, TrainerConfig
from nemo_vlm.config.plan import KEYS, PlanConfig
from nemo_vlm.errors import ConfigError, Failure, Stopped, explain
from nemo_vlm.experiment import BESIDE, Task, plan
from nemo_vlm.inference.settings import EvaluateConfig, GenerateConfig, NevaInferenceConfig
from nemo_vlm.logs import set_up_logging
from nemo_vlm.models.base import FAMILIES, family
from nemo_vlm.parallel import rank
from nemo_vlm.typed import defaults, plain_defaults, unknown_key

CONF = Path(__file__).resolve().parents[1] / "conf"
log = logging.getLogger("nemo_vlm")


def launch(task: Task, config_name: str) -> None:
    """The body of every example: compose the settings by Hydra's command line, run the task, report errors in one line.

    The environment variable NEMO_CONFIG chooses another recipe of conf/.
    """
    rank.attach(os.environ)
    # argparse wants the flags, as -m, in front
    sys.argv[1:] = sorted((beside(quoted(one), BESIDE.get(task, ())) for one in sys.argv[1:]), key=is_override)
    store_defaults()
    asked = os.environ.get("HYDRA_FULL_ERROR", "0")
    show_traceback = asked == "1"
    failures: list[Failure] = []
    jobs = Jobs(sys.argv[0])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own errors and exits

    @hydra.main(
        config_path=str(CONF),
        config_name=os.environ.get("NEMO_CONFIG", config_name),
        version_base="1.3",
    )
    def main(cfg: DictConfig) -> None:
        nonlocal show_traceback
        before = dict(os.environ)
        os.environ["HYDRA_FULL_ERROR"] = asked  # for the ranks that the task starts
        job = jobs.name()
        try:
            tree: Any = OmegaConf.to_container(cfg, resolve=True)
            check_family(tree)
            show_traceback |= bool(tree.pop("debug"))
            chosen = task_or_plan(task, tree)
            set_up_logging()
            become_one_run(tree, jobs.script)
            chosen(tree)
        except Exception as error:  # told below: Hydra would print about it
            failures.append(replace(failure(error), job=job))
            jobs.note(failures[-1])
        finally:  # Lightning leaves LOCAL_RANK and its like to the next job of a multirun
            os.environ.clear()
            os.environ.update(before)

    try:
        main()
    except Exception as error:  # of the composition, or of a launcher
        failures.append(failure(error))
    except Stopped:
        pass
    finish(failures + jobs.noted(), show_traceback)


def task_or_plan(task: Task, tree: dict[str, Any]) -> Task:
    """The task, or its plan where dry_run=true; the settings of that are taken out of the tree."""
    dry_run = typed.convert(tree.pop("dry_run"), bool, "dry_run")
    wanted = typed.read(PlanConfig, {key: tree.pop(key) for key in KEYS if key in tree}, "")
    if not dry_run:
        wanted.refuse_without_plan(given_keys())
    return partial(plan, task, wanted) if dry_run else task


def check_family(tree: dict[str, Any]) -> None:
    """Raises ConfigError: a model of another family than the one that the recipe has data and a tokenizer for."""
    job, asked = HydraConfig.get(), tree.get("model", {}).get("family")
    recipe = job.job.config_name or ""
    trained = family_of(recipe)
    if trained in (None, asked) or "data" in given_keys():
        return
    if others := [path.stem for path in sorted(CONF.glob("*.yaml")) if family_of(path.stem) == asked]:
        given = f"model={job.runtime.choices.get('model')} (model.family={asked})"
        right = f"data=NAME, or --config-name {' or '.join(others)}"
        raise ConfigError(f"{given}: the data and the tokenizer of {recipe} are a {trained}'s; give {right}")


def family_of(recipe: str) -> str | None:
    """That of a recipe's own model; None of one without a model or data, and of one that is not in conf/."""
    path = CONF / f"{recipe}.yaml"
    entries: Any = OmegaConf.load(path).defaults if path.exists() else []
    chosen = {key: value for entry in entries if isinstance(entry, DictConfig) for key, value in entry.items()}
    name = chosen.get("model") if chosen.get("data") else None
    while name not in (None, *FAMILIES):
        name = OmegaConf.load(CONF / "model" / f"{name}.yaml").defaults[0]
    return name


def become_one_run(tree: dict[str, Any], script: str) -> None:
    """Make this job of a multirun a run of its own, with its number in its name.

    The ranks repeat the command line, which must then be that of one job. Lightning's own handling of Hydra wants
    files in an output folder that is not written here, so Hydra's state is hidden from it.
    """
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN and "exp_manager" in tree:
        name = f"{tree['exp_manager']['name']}_{job.job.num}"
        tree["exp_manager"]["name"] = name
        flags = {"main": "--config-path", "command-line": "--config-dir"}
        sources = [source for source in job.runtime.config_sources if source.provider in flags and source.path]
        places = [part for source in sources for part in (flags[source.provider], source.path)]
        sys.argv = [script, *places, *job.overrides.task, f"exp_manager.name={name}"]
        os.environ["NEMO_CONFIG"] = job.job.config_name
    HydraConfig.instance().cfg = None


@dataclass(frozen=True)
class Jobs:
    """The jobs of a multirun. One that runs in another process leaves its failure in a file."""

    script: str
    home: int = field(default_factory=os.getpid)
    notes: Path = field(default_factory=lambda: Path.cwd() / f".failed_jobs_{os.getpid()}_{time.time_ns()}")

    def name(self) -> str:
        """Number and overrides of the present job; nothing outside a multirun."""
        job = HydraConfig.get()
        return f"#{job.job.num} {' '.join(job.overrides.task)}" if job.mode == RunMode.MULTIRUN else ""

    def note(self, failure: Failure) -> None:
        if failure.job:
            log.error("job %s failed: %s", failure.job, failure.message)
        if os.getpid() != self.home:
            self.notes.mkdir(exist_ok=True)
            number = failure.job.split()[0].strip("#")  # under srun, several ranks may note the same job
            (self.notes / f"{number}.json").write_text(json.dumps(asdict(failure)))

    def noted(self) -> list[Failure]:
        notes = sorted(self.notes.glob("*.json"), key=lambda note: int(note.stem))
        failures = [Failure(**json.loads(note.read_text())) for note in notes]
        shutil.rmtree(self.notes, ignore_errors=True)
        return failures


def finish(failures: list[Failure], show_traceback: bool) -> None:
    """Tell what failed, all of it in one line, and end this process with its exit code."""
    if not failures:
        return
    message, code = failures[0].message, min(one.code for one in failures)
    if failures[0].job:
        told = "; ".join(f"{one.job}: {one.message}" for one in failures)
        message = f"{len(failures)} job{'s' * (len(failures) > 1)} failed: {told}"
    trace = "".join(one.trace for one in failures)
    if rank.supervised():
        rank.leave(Failure(message, code, trace))
    sys.stderr.write(trace * show_traceback + rank.prefix() + message + "\n")
    sys.exit(code)


def failure(error: Exception) -> Failure:
    """Hydra's and OmegaConf's errors are the user's mistakes; so is a choice that Hydra cannot even look for."""
    if isinstance(error, HydraException | OmegaConfBaseException) or "Config group override" in str(error):
        return Failure(one_line(error), 2, "".join(traceback.format_exception(error)))
    return explain(error)


def one_line(error: Exception) -> str:
    """What Hydra and OmegaConf say, in our form."""
    cause = error.__cause__
    if (
        isinstance(cause, OmegaConfBaseException)
        and isinstance(cause.parent_node, DictConfig)
        and cause.key not in cause.parent_node
    ):
        if cause.full_key in KEYS:  # of conf/plan.yaml alone
            return f"{cause.full_key}: unknown key here; python examples/plan.py search=true searches for a layout"
        return unknown_key(str(cause.full_key), {str(key) for key in cause.parent_node})
    text = " ".join(str(error).split("Config search path")[0].split())
    missing = re.search(r"Could not find '(.*)/([^']+)'(?: Available options in '.*': (.*))?", text)
    if missing:
        group, name, options = missing.groups()
        known = ", ".join((options or "").split())
        return f"{group}={name}: no such choice; there are {known}; --config-dir=FOLDER adds those of FOLDER/{group}"
    if no_setting := re.search(r"Error parsing override '(.*?)' missing EQUAL", text):
        return f"{no_setting[1]}: settings are KEY=VALUE, as model=llava_7b"
    return text.replace("Check that it's in your config search path.", "").strip()


def store_defaults() -> None:
    """Offer the dataclasses' defaults to the composition, so that every key is there, and --help its first lines."""
    store: Any = ConfigStore.instance()
    store.__deepcopy__ = lambda memo: store  # there is one; --help would copy it for every group that it lists
    store.store(group="trainer", name="base", node=plain_defaults(TrainerConfig))
    store.store(group="exp_manager", name="base", node=plain_defaults(ExpManagerConfig))
    store.store(group="samples", name="base", node=plain_defaults(SamplesConfig))
    store.store(name="generation", node=plain_defaults(GenerateConfig))
    store.store(name="neva_generation", node=plain_defaults(NevaInferenceConfig))
    store.store(name="evaluation", node=plain_defaults(EvaluateConfig))
    purpose = f"{sys.modules['__main__'].__doc__ or ''}\n"  # of the example: what --help begins with
    store.store(group="hydra/help", name="example", node={"defaults": ["default"], "header": purpose})
    for name in FAMILIES:
        store.store(
            group="model",
            name=name,
            node={"family": name, **defaults(family(name, "config").Config)},
        )
