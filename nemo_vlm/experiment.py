"""The page to read first: what a run consists of, from its settings to its end.

Everything heavy is imported inside the tasks, so that the door answers --help and --cfg job at once.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nemo_vlm import layout as layouts
from nemo_vlm import logs, options, typed
from nemo_vlm.command_line import given_keys
from nemo_vlm.config import RunConfig, TrainerConfig
from nemo_vlm.config.peft import check_given
from nemo_vlm.config.plan import PlanConfig
from nemo_vlm.data import presence
from nemo_vlm.errors import ConfigError, Stopped
from nemo_vlm.inference.settings import EvaluateConfig, GenerateConfig, NevaInferenceConfig
from nemo_vlm.models.base import family, starts
from nemo_vlm.parallel import rank, supervisor
from nemo_vlm.planning.network import check_interfaces
from nemo_vlm.training import log_file, schedules, versions
from nemo_vlm.typed import model_tree, plain

if TYPE_CHECKING:
    from pytorch_lightning import Callback

    from nemo_vlm.data.dataset import Datasets
    from nemo_vlm.inference.answers import Generation
    from nemo_vlm.inference.evaluate import Evaluation
    from nemo_vlm.planning.show_data import ShowConfig
    from nemo_vlm.training.module import Plan

Task = Callable[[dict[str, Any]], None]
LAST = 20  # steps whose mean loss is told at the end
log = logging.getLogger("nemo_vlm")


def train(tree: dict[str, Any]) -> None:
    """Train a model and write its .nemo archive."""
    run = read(tree)
    presence.check(run.data)
    plan, tokenizer = prepare(run)

    from nemo_vlm.training.exp_manager import archive_version

    run, layout, former = plan.run, plan.layout, archive_version(plan.run.exp_manager)
    if supervisor.needed(layout.world_size, os.environ):
        env = versions.told(run.exp_manager, os.environ)
        supervisor.supervise(layout, run.trainer.hang_timeout, env)
    else:
        with log_file.kept(run.exp_manager, os.environ):
            fit(plan, tokenizer)
    if rank.first(os.environ):
        conclude(plan, writes_archive=archive_version(run.exp_manager) not in (None, former))


def fit(plan: Plan, tokenizer: Any, watching: Sequence[Callback] = ()) -> None:
    """A rank's share of training.

    Args:
        watching: callbacks beside the run's own.
    """
    run, layout = plan.run, plan.layout
    announce(plan)

    import pytorch_lightning as pl

    from nemo_vlm.checkpoints import run_folder
    from nemo_vlm.mcore.cpu import BACKENDS
    from nemo_vlm.parallel.megatron import MegatronStrategy
    from nemo_vlm.parallel.npu import NpuAccelerator
    from nemo_vlm.training import callbacks, exp_manager, expert_loads, profiling
    from nemo_vlm.training.module import TrainingModule

    logs.quieten_lightning()
    saving = callbacks.SaveCheckpoints(run)
    pictures = [callbacks.Curves(), expert_loads.ExpertPicture()]
    last_acts = [saving, *pictures, callbacks.SaveArchive(run, tokenizer, saving)]
    trainer = pl.Trainer(
        strategy=MegatronStrategy(layout, run.step.seed, run.trainer.hang_timeout, BACKENDS[plan.accelerator]),
        accelerator=NpuAccelerator() if plan.accelerator == "npu" else plan.accelerator,
        **trainer_arguments(run.trainer, plan),
        logger=exp_manager.loggers(run.exp_manager),
        callbacks=[
            callbacks.FailFast(),
            *[callbacks.StopEarly()] * run.exp_manager.create_early_stopping_callback,
            *last_acts,
            callbacks.EndAtOnce(*last_acts),
            *[profiling.Profile(run_folder(run.exp_manager))] * (run.trainer.profile == "torch"),
            *watching,
        ]
        + [callbacks.Progress()] * run.trainer.enable_progress_bar,
    )
    opened = exp_manager.open_run(run.exp_manager, settings(run))  # the Trainer knows which rank this is
    with rank.watched(run.trainer.hang_timeout):
        trainer.fit(TrainingModule(plan, opened))
    if saving.stop.signalled:
        raise Stopped


def conclude(plan: Plan, writes_archive: bool) -> None:
    """What came of it: the loss beside what it is measured by, and samples.

    Args:
        writes_archive: the run did; one that it found is of other weights.
    """
    from nemo_vlm.checkpoints import run_folder
    from nemo_vlm.training.exp_manager import read_rows

    run, entropy = plan.run, plan.unigram_entropy
    if entropy is not None:
        losses = [float(row["reduced_train_loss"]) for row in read_rows(run_folder(run.exp_manager) / "metrics.csv")]
        last = losses[-LAST:]
        told = "loss of the last %d steps: %.3f nats a token; unigram entropy of the text: %.3f"
        log.info(told, len(last), sum(last) / len(last), entropy)
    wanted = [run.samples.prompts, run.samples.questions]
    if any(wanted) and not writes_archive:
        log.info("no samples: the run wrote no archive")
    elif any(wanted):
        from nemo_vlm.inference import samples

        for tell, given in zip((samples.show, samples.score), wanted, strict=True):
            try:
                if given:
                    tell(run)
            except ConfigError as error:  # the run itself went well
                log.warning("no samples: %s", error)


def evaluate(tree: dict[str, Any]) -> None:
    """Score a model's answers to the questions of a LLaVA JSON."""
    from nemo_vlm.inference import evaluate as evaluation

    answer(evaluation.prepare(typed.read(EvaluateConfig, tree, ""), os.environ))


def generate(tree: dict[str, Any]) -> None:
    """Let a model answer prompts, texts as they are or messages."""
    from nemo_vlm.inference import answers

    answer(answers.prepare(typed.read(GenerateConfig, tree, ""), os.environ))


def infer(tree: dict[str, Any]) -> None:
    """Let a model answer questions, put into the conversation template that it was trained with."""
    from nemo_vlm.inference import answers

    answer(answers.prepare(typed.read(NevaInferenceConfig, tree, ""), os.environ))


def answer(task: Evaluation | Generation) -> None:
    """Run a task of inference on all its ranks."""
    if not rank.supervised():
        task.make_ready(os.environ)
    layout, hang_timeout = task.model.layout, task.model.run.trainer.hang_timeout
    if supervisor.needed(layout.world_size, os.environ):
        return supervisor.supervise(layout, hang_timeout, os.environ)
    try:
        with rank.watched(hang_timeout):
            task.run()
    except Exception as error:
        rank.fail(error, layout.world_size)
        raise


def show(tree: dict[str, Any]) -> None:
    """Print what a run would be trained on."""
    from nemo_vlm.planning import machine, show_data

    config = split_off(tree)
    with logs.only_warnings(config.json):
        run = read(tree)
        presence.check(run.data)
        layout = layouts.resolve(run, machine.num_gpus(run.trainer.accelerator), os.environ)
        run, tokenizer, datasets = open_data(run)
        show_data.show(config, run, layout, datasets.train, tokenizer)


def split_off(tree: dict[str, Any]) -> ShowConfig:
    """Take what `show` has beside a run's settings out of them."""
    from nemo_vlm.planning.show_data import ShowConfig

    return typed.read(ShowConfig, {key: tree.pop(key) for key in BESIDE[show] if key in tree}, "")


BESIDE: dict[Task, tuple[str, ...]] = {show: ("n", "json", "picture")}  # settings that a task has beside a recipe's
ASKS: dict[Task, type] = {evaluate: EvaluateConfig, generate: GenerateConfig, infer: NevaInferenceConfig}


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is looked for: of what a plan imports and builds there is much, and hardly any is garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@uncollected()
def plan(task: Task, wanted: PlanConfig, tree: dict[str, Any]) -> None:
    """Print what a task would be, and what each rank would hold; neither its machine nor its data need be here."""
    from nemo_vlm.planning import plan as planning

    planning.check_files(wanted)
    if task is show:
        split_off(tree)
    if task in ASKS:
        from nemo_vlm.inference.laid_out import lay_out

        planned = lay_out(typed.read(ASKS[task], tree, ""), os.environ).planned
    else:
        from nemo_vlm.sources import starting
        from nemo_vlm.training import durations

        model, absent = starting.without_absent(tree["model"])
        run = read({**tree, "model": model})
        length = durations.in_words(run, 0) if run.trainer.max_epochs is None else []  # the data need not be here
        if wanted.search:
            from nemo_vlm.planning import search
            from nemo_vlm.planning.workload import check_sizes

            check_sizes(run, wanted.plan_tokens, wanted.plan_images)
            if replaced := search.replaced(given_keys()):
                log.info("search=true: what it finds takes the place of %s", ", ".join(replaced))
            run = search.best(planning.settle(run)[0], wanted)
        planned = planning.training(run, os.environ)
        planned = replace(planned, notes=[*length, *absent, *planned.notes])
    planning.show(replace(planned, wanted=wanted))


def read(tree: Mapping[str, Any]) -> RunConfig:
    """The settings, checked as far as that needs no look at the machine; neither torch, where no weights are named."""
    model = tree["model"]
    if starts(model):
        from nemo_vlm.sources import starting

        model, decided = starting.settle(model, given_keys())
        if decided and not rank.supervised():
            log.info("as the weights that the run starts from: %s", ", ".join(decided))
    run = typed.read_run({**tree, "model": model}, family(str(model.get("family")), "config").Config)
    if run.data.packing:  # packs take the place of micro-batches, and are as many as a step needs
        run = replace(run, step=replace(run.step, micro_batch_size=1))
    layouts.check(run)
    options.check(run)
    check_given(run.peft, tree["model"], given_keys())
    run = schedules.settle_length(run, given_keys())
    if run.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that every module and every rank agrees
    return run


def prepare(run: RunConfig) -> tuple[Plan, Any]:
    """Everything else that can be known before a rank starts: layout resolved, machine checked, data found.

    Returns:
        the plan of the run, and its tokenizer.
    """
    from nemo_vlm import checkpoints
    from nemo_vlm.data import feature_store
    from nemo_vlm.planning import machine
    from nemo_vlm.sources import adapters
    from nemo_vlm.training import durations, exp_manager, validation
    from nemo_vlm.training.module import Plan

    check_interfaces(os.environ)
    adapters.check_base(run)
    durations.check_past(run, checkpoints.choose(run.exp_manager))
    gpus = machine.num_gpus(run.trainer.accelerator)
    layout = layouts.resolve(run, gpus, os.environ)
    run = replace(run, exp_manager=versions.dated(run.exp_manager, layout, os.environ))
    exp_manager.check_copies(run.exp_manager)
    feature_store.make_home(run.data)
    run, tokenizer, datasets = open_data(run)
    if run.samples.questions is not None:
        from nemo_vlm.inference import samples

        samples.check(run)
    machine.check_machine(run, layout, gpus, os.environ)
    durations.check(run, len(datasets.train))
    device = machine.device_type(run.trainer.accelerator, gpus)
    plan = Plan(run, layout, device, datasets.train, datasets.validation, datasets.unigram_entropy)
    validation.check(run, plan.validation)
    return plan, tokenizer


def open_data(run: RunConfig) -> tuple[RunConfig, Any, Datasets]:
    """The run with what its tokenizer decides, that tokenizer, and the data."""
    from nemo_vlm.data.opening import open_datasets, open_tokenized
    from nemo_vlm.data.tokenizer import located
    from nemo_vlm.sources import chat_templates, starting
    from nemo_vlm.sources.tokenizers import load_tokenizer

    presence.write_demo(run.data)
    tokenizer = load_tokenizer(run.tokenizer)
    run, grown = starting.with_tokenizer(run, tokenizer)
    left_out = chat_templates.leave_out_foreign(tokenizer, run.model, run.data)
    for note in (grown, left_out):
        if note and not rank.supervised():
            log.info("%s", note)
    run = replace(run, tokenizer=located(run.tokenizer))
    if not run.data.has_records:
        return run, tokenizer, open_tokenized(run, tokenizer)
    processor = family(run.family, "processor").Processor(run.model, run.data, tokenizer)
    return run, tokenizer, open_datasets(run, processor)


def announce(plan: Plan) -> None:
    """What is going to run, in two lines."""
    from nemo_vlm.mcore.layers import kernels
    from nemo_vlm.planning.plan import describe_layout
    from nemo_vlm.planning.report import sizes
    from nemo_vlm.training import durations

    run, layout = plan.run, plan.layout
    log.info("%s: %s on %d %s ranks", run.exp_manager.name, run.family, layout.world_size, plan.accelerator)
    for line in durations.in_words(run, len(plan.dataset)):  # type: ignore[arg-type]
        log.info("%s", line)
    sharded = run.optim.shards(layout, run.trainer.precision)
    how = "AdamW" + f", its state sharded over {layout.replicas} ranks" * sharded
    if run.peft.lora:
        log.info("model.peft.peft_scheme=lora: adapters train, and the projector unless it is frozen; nothing else")
    log.info("model.optim.name=%s: %s%s", run.optim.name, how, " on FSDP2's shards" if layout.fsdp else "")
    if plan.unigram_entropy is not None:
        log.info("unigram entropy of the text: %.3f nats a token", plan.unigram_entropy)
    log.info("%d samples, %s kernels", len(plan.dataset), kernels(run.step.transformer_impl))
    log.info("%s; layers of each stage: %s", sizes(describe_layout(layout)), ", ".join(map(str, layout.stage_layers)))


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
        max_epochs=1,
        enable_progress_bar=trainer.enable_progress_bar,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        benchmark=trainer.benchmark,
    )
