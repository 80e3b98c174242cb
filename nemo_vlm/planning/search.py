"""Which layout of so many ranks is expected to be fastest, of all that the rules allow and the memory holds."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track

from nemo_vlm import layout as layouts
from nemo_vlm import options
from nemo_vlm.config import ParallelConfig, RunConfig, StepConfig
from nemo_vlm.config.plan import PlanConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import written_whole
from nemo_vlm.planning.activations import activation_bytes, buffer_bytes
from nemo_vlm.planning.communication import Case, case_for
from nemo_vlm.planning.hardware import GIB, Hardware, named
from nemo_vlm.planning.parameters import Parameters, counter
from nemo_vlm.planning.report import aligned
from nemo_vlm.planning.rules import RESERVE
from nemo_vlm.planning.schedule import Stages, estimated_length, length
from nemo_vlm.planning.timing import StepTime, step_flops, step_time

FIRST = "first_pipeline_num_layers"
SEARCHED = (  # of ParallelConfig
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    FIRST,
    "sequence_parallel",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "fsdp",
    "fsdp_sharding_strategy",
    "pipeline_layers",
    "num_layer_list",
)
OF_RECOMPUTATION = tuple(f"activations_checkpoint_{part}" for part in ("granularity", "method", "num_layers"))
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTED = (0.0, 0.5, 1.0)  # shares of a stage's layers, one after another as memory asks
MOST_VIRTUAL = 10
MOST_EXPERT = 64
LEAST_TOKENS = 1024  # of a sample on each context-parallel rank
SHOWN = 10
COLUMNS = ("layout", "micro-batch", "recompute", "GiB", "bubble", "s a step", "tokens/s/GPU", "MFU")
Counter = Callable[[int], Parameters]  # by tensor-parallel size
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A run in one of its layouts.

    Attributes:
        memory: bytes of the rank that holds most; those of activations are added when it is looked at closely.
        recomputing: how much, a place in RECOMPUTED.
    """

    case: Case
    time: StepTime
    memory: float
    recomputing: int

    @property
    def run(self) -> RunConfig:
        return self.case.run


def best(run: RunConfig, wanted: PlanConfig) -> RunConfig:
    """Print the best layouts of a settled run, write the first into wanted.search_file, and return the run in it.

    Raises:
        ConfigError: no layout is allowed, or none fits the memory.
    """
    if run.trainer.devices == "auto":
        raise ConfigError("trainer.devices=auto: a search needs a number of ranks on each node")
    found = ranked(run, wanted)
    for line in aligned([COLUMNS, *map(cells, found)]):
        log.info("%s", line)
    path = Path(wanted.search_file)
    write(found[0].run, wanted, path)
    log.info("wrote %s; use it as --config-dir %s parallel=%s", path, path.parent.parent, path.stem)
    return found[0].run


def replaced(given: Collection[str]) -> list[str]:
    """Of the settings on the command line, those that a search decides itself."""
    decided = {"parallel", *(f"model.{key}" for key in (*SEARCHED, "micro_batch_size", *OF_RECOMPUTATION))}
    return sorted(decided & set(given))


def ranked(run: RunConfig, wanted: PlanConfig) -> list[Candidate]:
    """The fastest that fit, the best first."""
    hardware, parameters = named(wanted.hardware), counter(run)
    allowed = [candidate(case, parameters, 0) for case in cases(run, wanted)]
    if not allowed:
        raise ConfigError(
            f"search=true: no layout of {ranks(run)} ranks suits the model and "
            f"model.global_batch_size={run.step.global_batch_size}"
        )
    room = hardware.memory * (1 - RESERVE)
    found = list(islice(fitting(allowed, parameters, room), 2 * SHOWN))
    if not found:
        raise ConfigError(nearest(allowed, parameters, hardware, room))
    log.info("%d layouts with their micro-batches are allowed; the best that fit %s:", len(allowed), hardware.name)
    simulated = (replace(one, time=timed(one.case, parameters, length)) for one in found)
    return sorted(simulated, key=rank_of)[:SHOWN]


def fitting(candidates: Iterable[Candidate], parameters: Counter, room: float) -> Iterator[Candidate]:
    """Those that fit, the fastest first; one that does not comes back later and recomputes more."""
    numbers = itertools.count()  # so that no two are compared
    waiting = [(*rank_of(one), next(numbers), one) for one in candidates]
    heapq.heapify(waiting)
    while waiting:
        one = heapq.heappop(waiting)[-1]
        if one.memory <= room and (memory := heaviest(one.case, parameters, room)) <= room:
            yield replace(one, memory=memory)
        elif one.memory <= room and one.recomputing + 1 < len(RECOMPUTED):
            more = candidate(one.case, parameters, one.recomputing + 1)
            heapq.heappush(waiting, (*rank_of(more), next(numbers), more))


def rank_of(one: Candidate) -> tuple[float, int]:
    """By time; of equally fast layouts, the one with fewer kinds of groups."""
    return one.time.seconds, len(in_words(one).split())


def heaviest(case: Case, parameters: Counter, room: float) -> float:
    """Bytes of the rank that holds most: the first stage waits for most micro-batches, the last has the logits.

    Args:
        room: where one stage needs more, the others are not asked.
    """
    layout, most = case.layout, 0.0
    buffers = buffer_bytes(case.run, layout, case.fullest)
    for stage in {0, min(1, layout.pipeline - 1), layout.pipeline - 1}:
        kept = parameters(layout.tensor).memory(case.run, layout, stage).total
        most = max(most, kept + buffers + sum(activation_bytes(case.run, layout, stage, case.fullest).values()))
        if most > room:
            break
    return most


def cases(run: RunConfig, wanted: PlanConfig) -> Iterator[Case]:
    """The run in every layout and micro-batch that the rules allow."""
    one = layouts.one_process(run.model)
    alone = case_for(run, one, wanted)
    tried, sizes = list(layouts_of(run, tower_layers(alone))), (1,) if run.data.packing else MICRO_BATCHES
    shown = sys.stderr.isatty()
    for parallel in track(tried, "layouts", disable=not shown, console=Console(stderr=True), transient=True):
        choice = replace(run, parallel=parallel)
        replicas = ranks(run) // layouts.replica_size(parallel)
        for size in allowed_sizes(choice, [n for n in sizes if run.step.global_batch_size % (n * replicas) == 0]):
            sized = replace(choice, step=replace(plain_step(choice), micro_batch_size=size))
            with contextlib.suppress(ConfigError):
                layout = layouts.resolve(sized, 0, {})
                yield case_for(sized, layout, wanted)


def allowed_sizes(run: RunConfig, sizes: Sequence[int]) -> Sequence[int]:
    """None of them where a rule forbids the layout, which no micro-batch changes."""
    try:
        layouts.check(run)
        options.check(run)
    except ConfigError:
        return ()
    return sizes


def plain_step(run: RunConfig) -> StepConfig:
    """Nothing is recomputed."""
    return replace(run.step, **dict.fromkeys(OF_RECOMPUTATION))


def candidate(case: Case, parameters: Counter, number: int) -> Candidate:
    """That recomputes so much: a place in RECOMPUTED."""
    if number:
        case = replace(case, run=recomputing(case.run, RECOMPUTED[number]))
    layout, count = case.layout, parameters(case.layout.tensor)
    memory = max(count.memory(case.run, layout, stage).total for stage in {0, layout.pipeline - 1})
    return Candidate(case, timed(case, parameters, estimated_length), memory, number)


def timed(case: Case, parameters: Counter, schedule: Callable[[Stages, int], float]) -> StepTime:
    return step_time(case, parameters(case.layout.tensor).heaviest(case.layout), schedule)


def recomputing(run: RunConfig, share: float) -> RunConfig:
    """Some layers of each stage, or all."""
    parallel = run.parallel
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    some = int(share * run.model.num_layers / stages)
    values = ("full", "block", some) if share < 1 and some else ("full", "uniform", 1)
    return replace(run, step=replace(run.step, **dict(zip(OF_RECOMPUTATION, values, strict=True))))  # type: ignore[arg-type]


def nearest(allowed: Sequence[Candidate], parameters: Counter, hardware: Hardware, room: float) -> str:
    """What the layout lacks that needs least."""
    lightest = sorted(allowed, key=lambda one: one.memory)[: 4 * SHOWN]
    last = len(RECOMPUTED) - 1
    tight = (candidate(one.case, parameters, last) for one in lightest)
    weighed = (replace(one, memory=heaviest(one.case, parameters, math.inf)) for one in tight)
    one = min(weighed, key=lambda one: one.memory)
    return (
        f"hardware={hardware.name}: no layout of {one.case.layout.world_size} ranks fits; the nearest, "
        f"{in_words(one)}, needs {one.memory / GIB:.1f} GiB a rank of {room / GIB:.1f}"
    )


def ranks(run: RunConfig) -> int:
    assert isinstance(run.trainer.devices, int), "a search knows its ranks"
    return run.trainer.devices * run.trainer.num_nodes


def layouts_of(run: RunConfig, beside: float) -> Iterator[ParallelConfig]:
    """Every way to share the ranks; what the user says of FSDP's gradients and checkpoints stays.

    Args:
        beside: tower_layers.
    """
    given = replace(run.parallel, **{key: getattr(ParallelConfig(), key) for key in SEARCHED})
    world = ranks(run)
    for tensor in divisors(run.trainer.devices):  # type: ignore[arg-type]
        for pipeline in divisors(world // tensor):
            for context in divisors(world // tensor // pipeline):
                long_enough = context == 1 or run.model.encoder_seq_length >= context * LEAST_TOKENS
                if pipeline > run.model.num_layers or not long_enough:
                    continue
                shared = dict(
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    context_parallel_size=context,
                    sequence_parallel=tensor > 1,
                )
                for experts in experts_of(run, tensor, world // pipeline):
                    for rest in [
                        *virtual_of(run.model.num_layers, beside, pipeline),
                        *fsdp_of(run, world // tensor, pipeline),
                    ]:
                        yield replace(given, **shared, **experts, **rest)  # type: ignore[arg-type]


def experts_of(run: RunConfig, tensor: int, world: int) -> Iterator[dict[str, int]]:
    if run.model.num_moe_experts is None:
        yield {}
        return
    yield {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": tensor}
    for expert in divisors(math.gcd(run.model.num_moe_experts, world)):
        if 1 < expert <= MOST_EXPERT:
            yield {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": 1}


def virtual_of(layers: int, beside: float, pipeline: int) -> Iterator[dict[str, int | None]]:
    """Virtual stages, and the first stage's layers: as many as the others', and fewer where it has a tower to run."""
    for virtual in [n for n in divisors(layers // pipeline) if n <= MOST_VIRTUAL and (n == 1 or pipeline > 1)]:
        stages = pipeline * virtual
        split = {"virtual_pipeline_model_parallel_size": None if virtual == 1 else virtual, FIRST: None}
        yield split
        first = max(round((layers + beside) / stages - beside), 0)
        if pipeline > 1 and first < layers // stages:
            yield split | {FIRST: first}


def tower_layers(case: Case) -> float:
    """How many decoder layers the tower and the projector are worth, by their operations."""
    flops = step_flops(case)
    return case.run.model.num_layers * (flops["vision"] + flops["projector"]) / (flops["decoder"] + flops["attention"])


def fsdp_of(run: RunConfig, replicas: int, pipeline: int) -> Iterator[dict[str, object]]:
    if pipeline == 1 and replicas > 1:
        yield {"fsdp": True, FIRST: None}
        if run.trainer.num_nodes > 1:
            yield {"fsdp": True, "fsdp_sharding_strategy": "hybrid", FIRST: None}


def divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def in_words(one: Candidate) -> str:
    """tp4 pp8 and the like, as the files of conf/parallel are called."""
    layout = one.case.layout
    sizes = {"tp": layout.tensor, "pp": layout.pipeline, "vpp": layout.virtual, "cp": layout.context}
    if one.run.model.num_moe_experts:
        sizes |= {"ep": layout.expert, "etp": layout.expert_tensor if layout.expert_tensor != layout.tensor else 1}
    named_sizes = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    uneven = one.run.parallel.first_pipeline_num_layers
    first = [f"first{uneven}"] if uneven is not None else []
    fsdp = [f"fsdp-{layout.fsdp}" if layout.fsdp != "full" else "fsdp"] if layout.fsdp else []
    return " ".join([*named_sizes, *first, *fsdp, f"dp{layout.data}"])


def recomputed_layers(step: StepConfig) -> str:
    if step.activations_checkpoint_granularity != "full":
        return step.activations_checkpoint_granularity or "none"
    some = step.activations_checkpoint_method == "block"
    return f"{step.activations_checkpoint_num_layers} a stage" if some else "all"


def cells(one: Candidate) -> tuple[str, ...]:
    time, layout = one.time, one.case.layout
    return (
        in_words(one),
        str(layout.micro_batch_size),
        recomputed_layers(one.run.step),
        f"{one.memory / GIB:.1f}",
        f"{100 * time.bubble:.1f} %",
        f"{time.seconds:.3f}",
        f"{time.tokens_per_sec / layout.world_size:,.0f}",
        f"{100 * time.mfu:.1f} %",
    )


def write(run: RunConfig, wanted: PlanConfig, path: Path) -> None:
    """The layout as a file of the group `parallel`, with the micro-batch and what is recomputed.

    Raises:
        ConfigError: it cannot be written.
    """
    keys = {key: getattr(run.parallel, key) for key in SEARCHED}
    keys |= {key: getattr(run.step, key) for key in ("micro_batch_size", *OF_RECOMPUTATION)}
    told = f"# Searched for {run.family} of {run.model.num_layers} layers on {ranks(run)} x {wanted.hardware}."
    lines = ["# @package model", told, *(f"{key}: {json.dumps(value)}" for key, value in keys.items())]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(f"search_file={path}: cannot be written ({error.strerror})") from None
