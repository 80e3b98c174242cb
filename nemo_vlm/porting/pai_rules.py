"""Pai-Megatron-Patch's arguments as settings of ours.

A value that its scripts pass over in silence is an error here that names the right one; where the intent is clear, it
is honoured, with a note. The rules say what those scripts do, from their text: examples/qwen2_5/run_mcore_qwen.sh
(revision 19a5f4d), examples/qwen2_vl (db5faaf and a098ca5), examples/qwen3_vl (4f7ae50 and a098ca5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from nemo_vlm import layout
from nemo_vlm.config import ParallelConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.shell import Text
from nemo_vlm.porting.table import Item, Note, Rule, Values, one_of, rate, text, whole

NODES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "KUBERNETES_CONTAINER_RESOURCE_GPU")  # of dlc
NODE_GPUS = 8  # of a machine that dsw stands for
PARALLEL = ("TP", "PP", "CP", "ETP", "EP")  # sizes of a layout; the last two are Qwen3-VL's
FIRST_STAGE = "MP_PP0_LAYERS"
SCHED = "model.optim.sched"
CALLBACK = "exp_manager.checkpoint_callback_params"


def path(key: str) -> Rule:
    """The rule of a path, whose characters mean nothing."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        yield key, Text(values[name])

    return rule


def nodes(values: Values, name: str) -> Iterator[Item]:
    """dsw is the machine that it is typed on; dlc tells a node of many who it is."""
    need, sizes = least_ranks(values), ", ".join(f"{key}={values[key]}" for key in PARALLEL if key in values)
    if values[name] == "dsw":
        if (count := -(-need // NODE_GPUS)) > 1:
            yield Note(
                f"{name}=dsw: {sizes} need {need} ranks, not the {NODE_GPUS} of one node; take ENV=dlc, or start the "
                f"line on each of {count} nodes with trainer.num_nodes={count} behind it, and MASTER_ADDR, MASTER_PORT "
                "and NODE_RANK in the environment"
            )
        return
    for variable in NODES:
        if not values[variable]:
            raise ConfigError(f"{name}=dlc: {variable} is not set; give --env {variable}=...")
        if variable not in ("MASTER_ADDR", "RANK"):
            whole(1)(variable, values[variable])
    whole(0)("RANK", values["RANK"])
    num_nodes, gpus = values.number("WORLD_SIZE"), values.number("KUBERNETES_CONTAINER_RESOURCE_GPU")
    if num_nodes * gpus % need:
        raise ConfigError(
            f"WORLD_SIZE={num_nodes}: {sizes} need a multiple of {need} ranks, and its nodes have {num_nodes} x {gpus}"
        )
    yield "trainer.num_nodes", num_nodes
    yield "trainer.devices", gpus


def least_ranks(values: Values) -> int:
    """Of one copy of the model: its dense layers and its experts are laid out each in its own way over each stage."""
    dense = values.number("TP") * values.number("CP")
    experts = values.number("ETP") * values.number("EP") if "EP" in values else 1
    return math.lcm(dense, experts) * values.number("PP")


def least_rate(values: Values, name: str) -> Iterator[Item]:
    if float(values[name]) > float(values["LR"]):
        raise ConfigError(f"{name}={values[name]}: Megatron stops there; must not be above LR={values['LR']}")
    yield f"{SCHED}.min_lr", values[name]


def precision(values: Values, name: str) -> Iterator[Item]:
    yield "trainer.precision", "16-mixed" if values[name] == "fp16" else "bf16-mixed"
    if values[name] == "fp8":
        yield "model.fp8", True
        yield "model.fp8_hybrid", True
        yield "model.fp8_amax_compute_algo", "max"
        yield "model.fp8_amax_history_len", 1024


def attention(values: Values, name: str) -> Iterator[Item]:
    yield "model.attention_backend", "flash" if values.true(name) else "fused"


def recompute_mode(name: str, value: str) -> None:
    """`false` stands in the README as the mode that is off, and does turn it off, as every other unknown mode."""
    if value not in ("full", "sel", "offload", "none", "false"):
        raise ConfigError(f"{name}={value}: means none there; must be sel or full (recomputation), offload, or none")


def vision_recompute_mode(name: str, value: str) -> None:
    """Qwen2-VL's; `true`, which turns nothing on, stands in the example of its README."""
    if value != "true":
        recompute_mode(name, value)


def recompute(values: Values, name: str) -> Iterator[Item]:
    mode, count = values[name], "MP_AC_LAYERS"
    check_recompute(values, name)
    if mode == "full":
        yield "model.activations_checkpoint_granularity", "full"
        yield "model.activations_checkpoint_method", "uniform"
        yield "model.activations_checkpoint_num_layers", int(values[count] or 1)
    elif mode == "sel":
        yield "model.activations_checkpoint_granularity", "selective"
    elif mode == "offload":
        yield "model.cpu_offloading", True
        yield "model.cpu_offloading_num_layers", int(values[count] or 1)
    elif mode in ("false", "true"):
        yield Note(f"{name}={mode}: nothing is recomputed, as there, where it means none; sel and full recompute")
    if values[count] and mode not in ("full", "offload"):
        yield Note(f"{count}={values[count]}: of no effect with {name}={mode}")


def check_recompute(values: Values, name: str) -> None:
    """What Megatron stops at: equal runs of recomputed layers, and no offload of activations beside a pipeline."""
    stages, layers, count = values.number("PP"), values.size.layers, int(values["MP_AC_LAYERS"] or 1)
    if values[name] == "offload" and stages > 1:
        raise ConfigError(f"{name}=offload: Megatron does not offload with PP={stages}; must be sel, full or none")
    if values[name] == "offload" and count >= layers:
        raise ConfigError(f"MP_AC_LAYERS={count}: must be from 1 to {layers - 1}, below the model's {layers} layers")
    if values[name] == "full":
        check_runs(count, stage_layers(values))


def check_runs(count: int, stages: Sequence[int]) -> None:
    if any(layers % count for layers in stages):
        told = " and ".join(map(str, dict.fromkeys(stages)))
        raise ConfigError(f"MP_AC_LAYERS={count}: must divide the layers of a stage, {told}")


def distributed(values: Values) -> bool:
    return values.true("DO") or values["OPTIMIZER_OFFLOAD"] != "false"


def optimizer(values: Values, name: str) -> Iterator[Item]:
    """DO, where nothing is overlapped."""
    if distributed(values) and not values.true(name):
        yield Note(f"{name}=false: OPTIMIZER_OFFLOAD={values['OPTIMIZER_OFFLOAD']} needs it, and turns it on")
    yield "model.optim.name", "distributed_fused_adam" if distributed(values) else "fused_adam"


def overlapping_optimizer(values: Values, name: str) -> Iterator[Item]:
    """DO, where gradients are always reduced, and weights gathered, beside the computation."""
    if not distributed(values):
        raise ConfigError(
            f"{name}=false: the script always sets --overlap-param-gather, which needs the distributed optimizer, and "
            "Megatron stops there; must be true"
        )
    yield from optimizer(values, name)
    yield "model.optim.overlap_grad_sync", True
    yield "model.optim.overlap_param_sync", True


def sequence(values: Values, name: str, hindrance: str = "") -> Iterator[Item]:
    """SP, which brings the overlap of tensor parallelism's communication, unless something keeps it from that here."""
    yield "model.sequence_parallel", values.true(name)
    if not values.true(name) or values.number("TP") == 1:
        return
    hindrance = "PR=fp16: its buffers are bf16" if values["PR"] == "fp16" else hindrance
    if hindrance:
        yield Note(f"{hindrance}; tensor parallelism's communication is not overlapped")
    else:
        yield "model.ub_tp_comm_overlap", True


offload_policy = one_of("false", "static", "auto")


def offload_share(name: str, value: str) -> None:
    """Qwen2-VL's and Qwen3-VL's scripts document both forms."""
    if value in ("false", "static", "auto"):
        return
    try:
        rate(name, value)
        right = float(value) <= 1
    except ConfigError:
        right = False
    if not right:
        raise ConfigError(f"{name}={value}: must be false, static, auto, or a number from 0 to 1")


def offload(values: Values, name: str) -> Iterator[Item]:
    given = values[name]
    if given != "false":
        yield "model.optim.offload", {"static": "1.0", "auto": "auto"}.get(given) or float(given)


def unheard_offload(values: Values, name: str) -> Iterator[Item]:
    """Of the scripts that take it and do not pass it on."""
    yield from offload(values, name)
    if values[name] != "false":
        yield Note(f"{name}={values[name]}: there the script never passes it on; here it is done")


def virtual(values: Values, name: str) -> Iterator[Item]:
    """MP_VP: the layers of each part of the pipeline, of which each of its ranks holds several."""
    if not values[name]:
        return
    stages, layers = values.number("PP"), values.size.layers
    if values.texts.get(FIRST_STAGE):
        raise ConfigError(f"{name}={values[name]}: does not go with {FIRST_STAGE}; give model.pipeline_layers by hand")
    parts, left = divmod(layers, stages * values.number(name))
    if stages == 1 or left:
        raise ConfigError(
            f"{name}={values[name]}: must be a number of layers of which PP={stages} stages (2 or more) make up "
            f"{layers}"
        )
    if values["AC"] == "full":
        check_runs(int(values["MP_AC_LAYERS"] or 1), [values.number(name)])
    if parts > 1:
        yield "model.virtual_pipeline_model_parallel_size", parts


def unheard_virtual(values: Values, name: str) -> Iterator[Item]:
    if values[name]:
        yield Note(f"{name}={values[name]}: that version of the script leaves it out; so does this line")


def pipeline(values: Values, name: str) -> Iterator[Item]:
    """PP, whose stages there must have as many layers each, but for the first with MP_PP0_LAYERS."""
    yield "model.pipeline_model_parallel_size", values[name]
    if values.size.layers % values.number(name) and not values.texts.get(FIRST_STAGE):
        shares = ", ".join(map(str, stage_layers(values)))
        yield Note(
            f"{name}={values[name]}: {values.size.layers} layers do not divide by it, and Megatron stops there; here "
            f"the stages have {shares}"
        )


def stage_layers(values: Values) -> tuple[int, ...]:
    """Of the run that the line starts; MP_VP parts them further."""
    first = values.texts.get(FIRST_STAGE)
    if first:
        other_stages(values, FIRST_STAGE)
    parallel = ParallelConfig(
        pipeline_model_parallel_size=values.number("PP"), first_pipeline_num_layers=int(first) if first else None
    )
    return layout.stage_layers(values.size.layers, parallel)


def first_stage(values: Values, name: str) -> Iterator[Item]:
    """MP_PP0_LAYERS: the first stage, which has the vision tower, takes fewer layers."""
    if values[name]:
        other_stages(values, name)
        yield "model.first_pipeline_num_layers", values.number(name)


def other_stages(values: Values, name: str) -> int:
    """The layers of each stage but the first, which has as many as the argument says."""
    first, stages, layers = values.number(name), values.number("PP"), values.size.layers
    if not 2 <= stages <= layers:
        raise ConfigError(f"{name}={first}: needs PP from 2 to {layers}, and it is {stages}")
    right = range(layers % (stages - 1), layers, stages - 1)
    if first not in right:
        nearest = min(right, key=lambda number: abs(number - first))
        raise ConfigError(
            f"{name}={first}: the other stages of PP={stages} must share what it leaves of {layers} layers evenly; "
            f"the nearest right number is {nearest}"
        )
    return (layers - first) // (stages - 1)


def packing_refused(name: str, value: str) -> None:
    if value != "false":
        raise ConfigError(f"{name}={value}: that script sets it to false; unset it (here: model.data.packing=true)")


def unpacked(values: Values, name: str) -> Iterator[Item]:
    yield "model.data.packing", False


def packing(values: Values, name: str) -> Iterator[Item]:
    yield "model.data.packing", values[name] == "true"
    if values[name] == "true":
        yield Note(f"{name}=true: samples are packed while the run reads them")


def checkpoint(values: Values, name: str) -> Iterator[Item]:
    """The tokenizer comes with the checkpoint."""
    if values.tokenizer:
        text("--tokenizer", values.tokenizer)
        yield "model.tokenizer.type", Text(values.tokenizer)
    if values[name] != "none":
        yield "model.restore_from_path", Text(values[name])
    elif not values.tokenizer:
        raise ConfigError(
            f"{name}=none: the tokenizer was to come from there; give --tokenizer DIR for a run from random weights"
        )


def iterations(values: Values, name: str) -> Iterator[Item]:
    yield "trainer.max_steps", values.number(name)


def warmup_iterations(values: Values, name: str) -> Iterator[Item]:
    """There the decay ends TRAIN_ITERS - LR_WARMUP_ITERS steps after the beginning, so the last ones are at MIN_LR."""
    steps, train = values.number(name), values.number(train_length(values))
    if 2 * steps >= train:
        raise ConfigError(
            f"{name}={steps}: Megatron's warm-up must end before its decay, which ends after {train} - {steps} "
            f"steps; must be below {train / 2:g}"
        )
    yield f"{SCHED}.warmup_steps", steps
    yield f"{SCHED}.constant_steps", steps


def pad_length(too_long: str) -> Rule:
    """PAD_LEN, where it is what limits a sample."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        yield "model.encoder_seq_length", values.number(name)
        yield "model.data.pad_to", values.number(name)
        yield "model.data.too_long", too_long
        if values["SEQ_LEN"] != values[name]:
            yield Note(f"SEQ_LEN={values['SEQ_LEN']}: of no effect on samples; {name}={values[name]} limits them")

    return rule


def run_folder(family: str) -> Rule:
    """The run's folder: its name there was made of the arguments, and still is."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        yield "exp_manager.exp_dir", Text(values[name])
        yield "exp_manager.name", Text(run_name(values, family))

    return rule


def run_name(values: Values, family: str) -> str:
    pretrains = "SFT" in values and not values.true("SFT")
    warmup = next(name for name in values.texts if name.startswith(("WARMUP_", "LR_WARMUP_")))
    lengths = (train_length(values), warmup)
    steps = [str(steps_of(values, name) if pretrains else values.number(name)) for name in lengths]
    pieces = {
        "lr": "LR",
        "minlr": "MIN_LR",
        "bs": "BATCH_SIZE",
        "gbs": "GLOBAL_BATCH_SIZE",
        "seqlen": "SEQ_LEN",
        **{name.lower(): name for name in ("PR", "TP", "PP", "CP", "AC")},
    }
    told = [f"{short}-{values[name]}" for short, name in pieces.items()]
    told += [f"do-{str(distributed(values)).lower()}", f"sp-{values.texts.get('SP', 'false')}"]
    told += [f"ti-{steps[0]}", f"wi-{steps[1]}"]
    return "-".join(["pretrain" if pretrains else "finetune", "mcore", family, values["MODEL_SIZE"], *told])


def train_length(values: Values) -> str:
    """The argument that says how long the run is."""
    return next(name for name in values.texts if name.startswith("TRAIN_"))


def batch_tokens(values: Values) -> int:
    """Tokens of a global batch in pretraining."""
    return values.number("GLOBAL_BATCH_SIZE") * values.number("SEQ_LEN")


def steps_of(values: Values, name: str) -> int:
    """Tokens as the script's steps: full global batches."""
    return values.number(name) // batch_tokens(values)
