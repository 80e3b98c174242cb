"""The page to read first: what a run consists of, from its settings to its end.

Everything heavy is imported inside the tasks, so that the door answers --help and --cfg job at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm import layout as layouts
from nemo_vlm import typed
from nemo_vlm.command_line import given_keys
from nemo_vlm.config import RunConfig, TrainerConfig
from nemo_vlm.errors import ConfigError, Stopped
from nemo_vlm.inference.settings import GenerateConfig
from nemo_vlm.logs import quieten_lightning
from nemo_vlm.models.base import family
from nemo_vlm.parallel import rank, supervisor
from nemo_vlm.planning.network import check_interfaces
from nemo_vlm.training import schedules
from nemo_vlm.typed import model_tree, plain

if TYPE_CHECKING:
    from nemo_vlm.training.module import Plan

Task = Callable[[dict[str, Any]], None]
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
