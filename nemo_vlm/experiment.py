"""The page to read first: what a run consists of, from the command line to its end.

The only module that sees Hydra and OmegaConf. Everything heavy is imported inside the tasks, so that --help and
--cfg job answer at once.
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_vlm import layout as layouts
from nemo_vlm import typed
from nemo_vlm.config import ExpManagerConfig, RunConfig, TrainerConfig
from nemo_vlm.errors import ConfigError, Failure, Stopped, explain
from nemo_vlm.inference.settings import GenerateConfig
from nemo_vlm.logs import quieten_lightning, set_up_logging
from nemo_vlm.models.base import FAMILIES, family
from nemo_vlm.parallel import rank, supervisor
from nemo_vlm.planning.network import check_interfaces
from nemo_vlm.training import schedules
from nemo_vlm.typed import defaults, model_tree, plain, plain_defaults, unknown_key

if TYPE_CHECKING:
    from nemo_vlm.training.module import Plan

Task = Callable[[dict[str, Any]], None]
CONF = Path(__file__).resolve().parents[1] / "conf"
FREE_TEXT = "prompt"  # a setting whose value may be any text
log = logging.getLogger("nemo_vlm")


def train(tree: dict[str, Any]) -> None:
    """Train a model and write its .nemo archive."""
    plan, tokenizer = prepare(read(tree))
    run, layout = plan.run, plan.layout
    if supervisor.needed(layout.world_size, os.environ):
        return supervisor.supervise(layout.ranks_per_node, layout.num_nodes, run.trainer.hang_timeout, os.environ)
    announce(plan)

    import pytorch_lightning as pl

    from nemo_vlm.parallel.megatron import MegatronStrategy
    from nemo_vlm.training import callbacks, exp_manager
    from nemo_vlm.training.module import TrainingModule

    quieten_lightning()
    saving = callbacks.SaveCheckpoints(run)
    last_acts = [saving, callbacks.Curves(), callbacks.SaveArchive(tokenizer)]
    trainer = pl.Trainer(
        strategy=MegatronStrategy(layout, run.step.seed, run.trainer.hang_timeout),
        **trainer_arguments(run.trainer, plan),
        logger=exp_manager.loggers(run.exp_manager),
        callbacks=[
            callbacks.FailFast(),
            *last_acts,
            callbacks.EndAtOnce(*last_acts),
        ]
        + [callbacks.Progress()] * run.trainer.enable_progress_bar,
    )
    opened = exp_manager.open_run(run.exp_manager, settings(run))  # the Trainer knows which rank this is
    with rank.watched(run.trainer.hang_timeout):
        trainer.fit(TrainingModule(plan, opened))
    if saving.stop.signalled:
        raise Stopped


def evaluate(tree: dict[str, Any]) -> None:
    """Answer the questions of a LLaVA JSON with an archive's model, greedily, and score the answers."""
    from nemo_vlm.inference.evaluate import EvaluateConfig, evaluate_archive

    evaluate_archive(typed.read(EvaluateConfig, tree, ""))


def generate(tree: dict[str, Any]) -> None:
    """Let a model answer prompts, greedily."""
    from nemo_vlm.inference import answers

    generation = answers.prepare(typed.read(GenerateConfig, tree, ""), os.environ)
    if not rank.supervised():
        answers.make_ready(generation, os.environ)
    layout, hang_timeout = generation.layout, generation.run.trainer.hang_timeout
    if supervisor.needed(layout.world_size, os.environ):
        return supervisor.supervise(layout.ranks_per_node, layout.num_nodes, hang_timeout, os.environ)
    try:
        with rank.watched(hang_timeout):
            answers.answer(generation)
    except Exception as error:
        rank.fail(error, layout.world_size)
        raise


def plan(task: Task, plan_file: str | None, tree: dict[str, Any]) -> None:
    """Print what a task would be, and what each rank would hold; neither its machine nor its data need be here."""
    from nemo_vlm.inference.evaluate import EvaluateConfig
    from nemo_vlm.planning import plan as planning

    if task is generate:
        from nemo_vlm.inference import answers

        planned = answers.prepare(typed.read(GenerateConfig, tree, ""), os.environ).planned
    elif task is evaluate:
        config = typed.read(EvaluateConfig, tree, "")
        planned = planning.evaluation(config.neva_model_file, config.precision, config.batch_size)
    else:
        planned = planning.training(read(tree), os.environ)
    planning.show(planned, plan_file)


def read(tree: Mapping[str, Any]) -> RunConfig:
    """The settings, checked as far as that needs no look at the machine; neither torch, where no weights are named."""
    run = typed.read_run(tree, family(str(tree["model"].get("family")), "config").Config)
    if run.start.restore_from_path or any(path for _, path in run.model.pretrained.values()):
        from nemo_vlm.sources import starting

        run, decided = starting.settle(run, given_keys())
        if decided and not rank.supervised():
            log.info("as the weights that the run starts from: %s", ", ".join(decided))
    layouts.check(run)
    schedules.check(run.optim, run.trainer.max_steps)
    if run.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that every module and every rank agrees
    return run


def prepare(run: RunConfig) -> tuple[Plan, Any]:
    """Everything else that can be known before a rank starts: layout resolved, machine checked, data found.

    Returns:
        the plan of the run, and its tokenizer.
    """
    from nemo_vlm import checkpoints
    from nemo_vlm.data import digits, records
    from nemo_vlm.data.tokenizer import located
    from nemo_vlm.planning import machine
    from nemo_vlm.sources.tokenizers import load_tokenizer
    from nemo_vlm.training.module import Plan

    check_interfaces(os.environ)
    checkpoints.choose(run.exp_manager)
    gpus = machine.num_gpus(run.trainer.accelerator)
    layout = layouts.resolve(run, gpus, os.environ)
    if run.data.data_path is None:
        raise ConfigError("model.data.data_path=null: give a LLaVA JSON, or choose data=digits_vqa")
    if run.data.prepare == "digits" and Path(run.data.data_path).name in digits.FILES:
        digits.write(Path(run.data.data_path).parent)
    tokenizer = load_tokenizer(run.tokenizer)
    parts = family(run.family, "processor")
    run = replace(run, model=parts.settle(run.model, tokenizer), tokenizer=located(run.tokenizer))
    machine.check_machine(run, layout, gpus, os.environ)
    processor = parts.Processor(run.model, run.data, tokenizer)
    dataset = records.RecordDataset(records.read_records(run.data.data_path, run.data.image_folder), processor)
    accelerator: Any = "cuda" if gpus else "cpu"
    return Plan(run, layout, accelerator, dataset), tokenizer


def announce(plan: Plan) -> None:
    """What is going to run, in two lines."""
    from nemo_vlm.mcore.layers import kernels

    run, layout = plan.run, plan.layout
    log.info("%s: %s on %d %s ranks", run.exp_manager.name, run.family, layout.world_size, plan.accelerator)
    how = "Megatron's distributed optimizer" if run.optim.distributed else "AdamW"
    log.info("model.optim.name=%s: %s%s", run.optim.name, how, " on FSDP2's shards" if layout.fsdp else "")
    log.info("%d samples, %s kernels, %s", len(plan.dataset), kernels(run.step.transformer_impl), layout)  # type: ignore[arg-type]


def settings(run: RunConfig) -> dict[str, Any]:
    """The settled settings of a run, in the tree they came from."""
    return {
        "trainer": plain(run.trainer),
        "exp_manager": plain(run.exp_manager),
        "model": model_tree(run),
    }


def trainer_arguments(trainer: TrainerConfig, plan: Plan) -> dict[str, Any]:
    """Lightning's part of `trainer.*`; steps, precision and clipping are the engine's, the loader ends the run."""
    return dict(
        devices=plan.layout.ranks_per_node,
        num_nodes=plan.layout.num_nodes,
        accelerator=plan.accelerator,
        max_epochs=1,
        enable_progress_bar=trainer.enable_progress_bar,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def launch(task: Task, config_name: str) -> None:
    """The body of every example: compose the settings by Hydra's command line, run the task, report errors in one line.

    The environment variable NEMO_CONFIG chooses another recipe of conf/.
    """
    rank.attach(os.environ)
    # argparse wants the flags, as -m, in front
    sys.argv[1:] = sorted(map(quoted, sys.argv[1:]), key=is_override)
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


def quoted(argument: str) -> str:
    """An override whose value is any text, in the quotes without which Hydra reads its own grammar into it."""
    key, equals, text = argument.partition("=")
    if key != FREE_TEXT or not equals or text[:1] in ("'", '"'):
        return argument
    text = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return f'{key}="{text}"'


def given_keys() -> set[str]:
    """The settings on the command line."""
    return {argument.lstrip("+").partition("=")[0] for argument in sys.argv[1:] if is_override(argument)}


def is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def task_or_plan(task: Task, tree: dict[str, Any]) -> Task:
    """The task, or its plan where dry_run=true; the settings of that are taken out of the tree."""
    dry_run = typed.convert(tree.pop("dry_run"), bool, "dry_run")
    plan_file = typed.convert(tree.pop("plan_file"), str | None, "plan_file")
    if plan_file is not None and not dry_run:
        raise ConfigError(f"plan_file={plan_file}: goes with dry_run=true")
    return partial(plan, task, plan_file) if dry_run else task


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
        return unknown_key(str(cause.full_key), {str(key) for key in cause.parent_node})
    text = " ".join(str(error).split("Config search path")[0].split())
    missing = re.search(r"Could not find '(.*)/([^']+)'(?: Available options in '.*': (.*))?", text)
    if missing:
        group, name, options = missing.groups()
        return f"{group}={name}: no such choice; there are {', '.join((options or '').split())}"
    return text.replace("Check that it's in your config search path.", "").strip()


def store_defaults() -> None:
    """Offer the dataclasses' defaults to the composition, so that every key is there to be overridden."""
    store = ConfigStore.instance()
    store.store(group="trainer", name="base", node=plain_defaults(TrainerConfig))
    store.store(group="exp_manager", name="base", node=plain_defaults(ExpManagerConfig))
    store.store(name="generation", node=plain_defaults(GenerateConfig))
    for name in FAMILIES:
        store.store(
            group="model",
            name=name,
            node={"family": name, **defaults(family(name, "config").Config)},
        )
