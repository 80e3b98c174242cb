"""What a run would be, for any cluster, on any machine: layout, groups, batch, and what every rank holds.

No rank is started and no weight allocated; a tokenizer is read where it is here, data and checkpoints never are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_vlm import checkpoints
from nemo_vlm import layout as layouts
from nemo_vlm.config import ExpManagerConfig, LanguageConfig, RunConfig
from nemo_vlm.config.plan import PlanConfig
from nemo_vlm.data import presence
from nemo_vlm.data.tokenizer import tokenizer_exists
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import written_whole
from nemo_vlm.layout import Layout
from nemo_vlm.mcore.ranks import first_replica, rank_groups
from nemo_vlm.mcore.weights import Bounds
from nemo_vlm.planning import machine
from nemo_vlm.planning.activations import activation_bytes, buffer_bytes
from nemo_vlm.planning.communication import Case, case_for
from nemo_vlm.planning.expected import expected
from nemo_vlm.planning.memory import EXPERTS, Holding, alike, hold, moved, with_others
from nemo_vlm.planning.parameters import of_holding
from nemo_vlm.planning.picture import draw
from nemo_vlm.planning.report import report
from nemo_vlm.planning.workload import in_words
from nemo_vlm.sources.starting import with_tokenizer
from nemo_vlm.sources.tokenizers import load_tokenizer
from nemo_vlm.typed import plain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A run with everything settled that its plan needs.

    Attributes:
        trains: gradients and optimizer state are kept.
        notes: what was not found here, and what was assumed for it.
        wanted: hardware and samples that it is planned for, and where it goes.
    """

    run: RunConfig
    layout: Layout
    trains: bool
    notes: list[str]
    wanted: PlanConfig = field(default_factory=PlanConfig)


def show(planned: Planned) -> None:
    """Print the plan, and write and draw what is wanted of it.

    Raises:
        ConfigError: hardware that is not in the table, or a file that cannot be written.
    """
    wanted = planned.wanted
    if wanted.plan_picture is not None and not planned.trains:
        raise ConfigError(f"plan_picture={wanted.plan_picture}: goes with training, which has a schedule")
    plan = describe(planned)
    for line in report(plan):
        log.info("%s", line)
    if wanted.plan_file is not None:
        write(plan, Path(wanted.plan_file))
        log.info("wrote %s", wanted.plan_file)
    if wanted.plan_picture is not None:
        try:
            draw(plan, case_of(planned), Path(wanted.plan_picture))
        except OSError as error:
            raise ConfigError(f"plan_picture={wanted.plan_picture}: cannot be written ({error.strerror})") from None
        log.info("drew %s", wanted.plan_picture)


def check_files(wanted: PlanConfig) -> None:
    """Raises ConfigError for the first file that could not be written when all is planned; nothing is left behind."""
    for key in ("plan_file", "plan_picture", *["search_file"] * wanted.search):
        if (given := getattr(wanted, key)) is None:
            continue
        path = Path(given)
        try:
            folder = next(each for each in path.absolute().parents if each.exists())
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(f"{key}={path}: cannot be written ({error.strerror})") from None


def training(run: RunConfig, env: Mapping[str, str]) -> Planned:
    """The plan of a training run.

    Raises:
        ConfigError: sizes that do not divide, or a vocabulary whose size nothing here tells.
    """
    accelerator, notes = run.trainer.accelerator, []
    gpus = machine.num_gpus("cpu" if accelerator == "cpu" else "auto")
    given = run.trainer.devices != "auto"
    if accelerator in ("gpu", "npu") and not gpus and not given:
        lacking = f"no {accelerator.upper()} is here to be counted"
        notes.append(f"trainer.devices=auto: {lacking}; planned with as many as the layout needs")
    if run.optim.offload is not False:
        notes.append("model.optim.offload: the optimizer's bytes are counted where they are offloaded to as well")
    layout = layouts.resolve(run, gpus, {} if given else env)  # another job's WORLD_SIZE does not matter then
    if layout.sequence_parallel and not run.parallel.sequence_parallel:
        notes.append("model.sequence_parallel: is on, as experts need beside tensor parallelism")
    run, found = settle(run)
    notes += [*found, *absent_data(run), *absent_checkpoint(run.exp_manager)]
    return Planned(run, layout, True, notes)


def settle(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with what its tokenizer decides, where that is here; and what to say of it."""
    if tokenizer_exists(run.tokenizer):
        run, grown = with_tokenizer(run, load_tokenizer(run.tokenizer))
        return run, [grown] if grown else []
    name = run.tokenizer.place or "null"
    size = run.model.vocab_size or demo_vocabulary(run)
    if size is None:
        raise ConfigError(f"model.vocab_size=null: model.tokenizer.type={name} is not here to tell it; give it")
    absent = ": not here" if run.tokenizer.place else ""
    note = f"model.tokenizer.type={name}{absent}; planned with a vocabulary of {size}"
    return replace(run, model=replace(run.model, vocab_size=size)), [note]


def demo_vocabulary(run: RunConfig) -> int | None:
    """Of the tokenizer that a demo's data bring along when they are written, if that is the run's."""
    if run.data.prepare is None or run.tokenizer.type is None or not run.data.files:
        return None
    demo = presence.demo(run.data)
    brought = os.path.abspath(Path(run.data.files[0]).parent / demo.TOKENIZER)
    return demo.NUM_TOKENS if os.path.abspath(run.tokenizer.type) == brought else None


def absent_data(run: RunConfig) -> list[str]:
    halves = ("", "/.nv-meta/dataset.yaml") if run.data.has_records else ("", ".idx", "_text_document.idx")
    files = {path: [Path(path + half) for half in halves] for path in run.data.files}
    absent = [path for path, names in files.items() if not any(name.is_file() for name in names)]
    return [f"model.data.data_path={path}: not here; the plan does not need it" for path in absent]


def absent_checkpoint(config: ExpManagerConfig) -> list[str]:
    step, folder = config.resume_from_step, checkpoints.folder_of(config)
    if step is None or checkpoints.path_of(folder, step) in checkpoints.complete(folder):
        return []
    return [f"exp_manager.resume_from_step={step}: no such checkpoint here; the plan does not need it"]


def describe(planned: Planned) -> dict[str, Any]:
    """The plan as plain containers, fit for JSON."""
    run, layout, holdings = planned.run, planned.layout, hold_all(planned)
    stages = describe_ranks(layout, holdings, in_a_step(planned))
    by_part: Counter[str] = Counter()
    for entry in stages:
        by_part.update(entry["parameters_by_part"])
    return {
        "name": run.exp_manager.name,
        "family": run.family,
        "precision": run.trainer.precision,
        "world_size": layout.world_size,
        "layout": describe_layout(layout),
        "groups": rank_groups(layout),
        "batch": describe_batch(planned),
        "stages": stages,
        "total_parameters": sum(by_part.values()),
        "total_parameters_by_part": dict(by_part),
        "active_parameters": sum(by_part.values()) - idle_parameters(run.model, holdings),
        **outlook(planned, holdings, stages),
    }


def case_of(planned: Planned) -> Case:
    return case_for(planned.run, planned.layout, planned.wanted)


def describe_batch(planned: Planned) -> dict[str, Any]:
    layout, packing = planned.layout, planned.trains and planned.run.data.packing
    return {
        "micro_batch_size": layout.micro_batch_size,
        "global_batch_size": layout.global_batch_size,
        "num_micro_batches": case_of(planned).num_micro_batches if packing else layout.num_micro_batches,
        "samples_per_rank": layout.samples_per_rank,
        "data_parallel_size": layout.data,
        "packing": packing,
    }


def outlook(planned: Planned, holdings: list[Holding], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The notes, and of a run that trains what is expected of a step."""
    if not planned.trains:
        return {"notes": planned.notes}
    run, layout, case = planned.run, planned.layout, case_of(planned)
    counts = [of_holding(run, layout, holding) for holding in holdings[:: layout.ranks_of_copy]]
    most = max(sum(filter(None, entry["bytes"].values())) for entry in stages)
    asked = planned.wanted.plan_images is None and run.model.typical_views(run.data)
    counted = in_words(case.work, run.data.packing, bool(asked and not case.work.visual_tokens))
    notes = [*planned.notes, *copied(run, layout, holdings), counted]
    return expected(case, counts, most) | {"notes": notes}


def copied(run: RunConfig, layout: Layout, holdings: list[Holding]) -> list[str]:
    """What the copies of asynchronous saves take of the host's memory (training.staging), at most."""
    settings, key = run.exp_manager.checkpoint_callback_params, "exp_manager.checkpoint_callback_params.async_save"
    if not (settings.async_save and run.exp_manager.create_checkpoint_callback):
        return []
    most = max(held.memory.weights + held.memory.optimizer * settings.save_optimizer for held in holdings)
    whole = layout.fsdp is not None and not run.parallel.fsdp_sharded_checkpoint
    most *= layout.shards * layout.tensor if whole else 1
    taken = f"takes up to {most / machine.GIB:.3f} GiB of the host's memory for {'the first' if whole else 'each'} rank"
    return [
        f"{key}=true: a copy of what is saved {taken}, {'while it is written' if whole else 'to the end of the run'}"
    ]


def describe_layout(layout: Layout) -> dict[str, Any]:
    """The layout without its batch; `stage_layers` in the order of the pipeline, virtual stages counted singly."""
    fields = plain(layout)
    del fields["micro_batch_size"], fields["num_micro_batches"]
    counts = {"data": layout.data, "expert_data": layout.expert_data, "shards": layout.shards}
    return fields | counts | {"experts_apart": layout.experts_apart}


def in_a_step(planned: Planned) -> list[dict[str, Any]]:
    """What a rank of each stage needs at the peak of a training step, beside what it keeps from step to step."""
    if not planned.trains:
        return [{"activations": None, "buffers": None, "by_part": {}}] * planned.layout.pipeline
    case, found = case_of(planned), []
    buffers = buffer_bytes(case.run, case.layout, case.fullest)
    for stage in range(planned.layout.pipeline):
        parts = activation_bytes(case.run, case.layout, stage, case.fullest)
        found.append({"activations": sum(parts.values()), "buffers": buffers, "by_part": parts})
    return found


def describe_ranks(layout: Layout, holdings: list[Holding], in_a_step: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An entry for each rank of the first copy of the model; the other copies are like it."""
    ranks = first_replica(layout)
    places = [(stage, number, rank) for stage, row in enumerate(ranks) for number, rank in enumerate(row)]
    return [
        {
            "stage": stage,
            "tensor_rank": number % layout.tensor,
            "expert_rank": expert_rank(layout, number),
            "rank": rank,
            "parameters": sum(counts.values()),
            "parameters_by_part": counts,
            "replicated_parameters": holding.num_parameters - sum(counts.values()),
            "padding_parameters": holding.num_padding,
            "bytes": plain(holding.memory) | {key: in_a_step[stage][key] for key in ("activations", "buffers")},
            "activations_by_part": in_a_step[stage]["by_part"],
        }
        for (stage, number, rank), holding, counts in zip(places, holdings, count_once(holdings), strict=True)
    ]


def hold_all(planned: Planned) -> list[Holding]:
    """What the ranks of the first copy of the model hold, stage by stage.

    Of stages that are alike one is built, and of ranks that differ in their experts alone.
    """
    layout, experts = planned.layout, planned.run.model.num_moe_experts or 0
    built, each = math.lcm(layout.tensor, layout.expert_tensor), experts // layout.expert
    holdings: list[Holding] = []
    for stage, row in enumerate(first_replica(layout)):
        if alike(layout, stage - 1, stage):
            holdings += [moved(holding, layout, stage - 1, stage) for holding in holdings[-len(row) :]]
            continue
        for number in range(built):
            with only_first_speaks((stage, number)):
                holdings.append(hold(planned.run, layout, stage, number, planned.trains))
        for number in range(built, len(row)):
            like = holdings[-built]
            shift = expert_rank(layout, number) - expert_rank(layout, number - built)
            holdings.append(with_others(like, shift * each))
    return holdings


def expert_rank(layout: Layout, number: int) -> int:
    """Of the ranks that hold a copy of a stage, which experts the one of that number has."""
    return number // layout.expert_tensor % layout.expert


@contextlib.contextmanager
def only_first_speaks(place: tuple[int, int]) -> Iterator[None]:
    """Log as in a run: what is built alike on every rank is remarked on by the first."""
    logging.disable(logging.NOTSET if place == (0, 0) else logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def count_once(holdings: list[Holding]) -> list[dict[str, int]]:
    """Parameters of each rank by part of the model, each element of a tensor with the first rank that holds it."""
    seen: set[tuple[str, Bounds]] = set()
    names = sorted({part_name(name) for holding in holdings for name, _ in holding.sizes})
    owned = []
    for holding in holdings:
        counts = dict.fromkeys(names, 0)
        for (name, bounds), size in holding.sizes.items():
            if (name, bounds) not in seen:
                counts[part_name(name)] += size
        seen |= holding.sizes.keys()
        owned.append(counts)
    return owned


def idle_parameters(model: LanguageConfig, holdings: list[Holding]) -> int:
    """Those of the experts that one token is not sent to, of all that one copy of the model holds."""
    if model.num_moe_experts is None:
        return 0
    experts = {place: size for held in holdings for place, size in held.sizes.items() if EXPERTS in place[0]}
    return sum(experts.values()) * (model.num_moe_experts - model.moe_router_topk) // model.num_moe_experts


def part_name(tensor_name: str) -> str:
    return tensor_name.partition(".")[0]


def write(plan: dict[str, Any], path: Path) -> None:
    """Write JSON; under its name it appears complete or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"plan_file={path}: cannot be written ({error.strerror})") from None
