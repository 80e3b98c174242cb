"""The scripts of Pai-Megatron-Patch that train: what each takes, in its order, and what it always sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from nemo_vlm.porting import pai_qwen2_5 as qwen2_5
from nemo_vlm.porting import pai_qwen3_vl as qwen3_vl
from nemo_vlm.porting import pai_rules as rules
from nemo_vlm.porting.pai_rules import CALLBACK, NODES, SCHED
from nemo_vlm.porting.table import (
    Argument,
    Check,
    Item,
    Rule,
    Size,
    Values,
    Workflow,
    one_of,
    rate,
    text,
    to,
    truth,
    whole,
)
from nemo_vlm.porting.table import unless_empty as maybe

SIZES = {
    "qwen2_5": {
        "0.5B": Size("qwen2_5_0_5b", 24),
        "1.5B": Size("qwen2_5_1_5b", 28),
        "3B": Size("qwen2_5_3b", 36),
        "7B": Size("qwen2_5_7b", 28),
        "14B": Size("qwen2_5_14b", 48),
        "32B": Size("qwen2_5_32b", 64),
        "72B": Size("qwen2_5_72b", 80),
    },
    "qwen2_vl": {"2B": Size("qwen2_vl_2b", 28), "7B": Size("qwen2_vl_7b", 28), "72B": Size("qwen2_vl_72b", 80)},
    "qwen3_vl": {
        "2B": Size("qwen3_vl_2b", 28),
        "4B": Size("qwen3_vl_4b", 36),
        "8B": Size("qwen3_vl_8b", 36),
        "32B": Size("qwen3_vl_32b", 64),
        "A3B": Size("qwen3_vl_30b_a3b", 48, experts=128),
        "A22B": Size("qwen3_vl_235b_a22b", 94, experts=128),
    },
}


def chosen(values: Values, name: str) -> Iterator[Item]:
    yield "model", values.size.model


def model(sizes: Mapping[str, Size], rule: Rule = chosen, unheeded: str = "others: error") -> Argument:
    here = ", ".join(f"{name}: `model={size.model}`" for name, size in sizes.items())
    return Argument("MODEL_SIZE", here, one_of(*sizes), rule, unheeded)


def size(name: str, key: str) -> Argument:
    return Argument(name, f"`{key}`", whole(1), to(key))


def place(name: str, key: str) -> Argument:
    return Argument(name, f"`{key}`", text, rules.path(key))


LONG_WARMUP = "as long as the decay, which did not start: error"
SEQUENCE = "`model.sequence_parallel`; true with TP > 1 also `model.ub_tp_comm_overlap`, where it can be"
RECOMPUTED = (
    "full: `model.activations_checkpoint_granularity=full`, `..._method=uniform`, `..._num_layers`; sel: `selective`; "
    "offload: `model.cpu_offloading`, `model.cpu_offloading_num_layers`; none: nothing"
)
COMMON = {
    argument.name: argument
    for argument in (
        Argument(
            "ENV",
            "dsw: nothing, all GPUs of this machine; dlc: `trainer.num_nodes`, `trainer.devices`, and the node's "
            "MASTER_ADDR, MASTER_PORT, NODE_RANK",
            one_of("dsw", "dlc"),
            rules.nodes,
            "dsw, a layout of more than 8 ranks: a note; dlc, ranks that it does not divide, and others: error",
        ),
        size("BATCH_SIZE", "model.micro_batch_size"),
        size("GLOBAL_BATCH_SIZE", "model.global_batch_size"),
        Argument("LR", "`model.optim.lr`", rate, to("model.optim.lr")),
        Argument("MIN_LR", f"`{SCHED}.min_lr`", rate, rules.least_rate, "above LR, which did not start: error"),
        Argument("SEQ_LEN", "nothing: PAD_LEN is the limit", whole(1), unheeded="another than PAD_LEN: a note"),
        Argument(
            "PAD_LEN",
            "`model.encoder_seq_length`, `model.data.pad_to`, `model.data.too_long=drop`",
            whole(1),
            rules.pad_length("drop"),
        ),
        Argument(
            "PR",
            "fp16: `trainer.precision=16-mixed`; bf16: `bf16-mixed`; fp8: that and `model.fp8`, `model.fp8_hybrid`, "
            "`model.fp8_amax_compute_algo`, `model.fp8_amax_history_len`",
            one_of("fp16", "bf16", "fp8"),
            rules.precision,
            "others, which ran in fp32: error",
        ),
        size("TP", "model.tensor_model_parallel_size"),
        Argument(
            "PP",
            "`model.pipeline_model_parallel_size`",
            whole(1),
            rules.pipeline,
            "layers that do not divide by it, which did not start: uneven stages, with a note",
        ),
        size("CP", "model.context_parallel_size"),
        Argument("SP", SEQUENCE, truth, rules.sequence),
        Argument("DO", "true: `model.optim.name=distributed_fused_adam`; false: `fused_adam`", truth, rules.optimizer),
        Argument(
            "FL",
            "true: `model.attention_backend=flash`; false: `fused`",
            truth,
            rules.attention,
            "others: error",
        ),
        Argument(
            "AC",
            RECOMPUTED,
            rules.recompute_mode,
            rules.recompute,
            "false: as none, with a note; true and others, offload with PP > 1: error",
        ),
        size("SAVE_INTERVAL", f"{CALLBACK}.every_n_train_steps"),
        place("DATASET_PATH", "model.data.data_path"),
        place("VALID_DATASET_PATH", "model.data.validation_path"),
        Argument(
            "PRETRAIN_CHECKPOINT_PATH",
            "`model.restore_from_path`; none: nothing, with `--tokenizer DIR` for `model.tokenizer.type`",
            text,
            rules.checkpoint,
        ),
        Argument("TRAIN_ITERS", "`trainer.max_steps`", whole(1), rules.iterations),
        Argument(
            "LR_WARMUP_ITERS",
            f"`{SCHED}.warmup_steps`, `{SCHED}.constant_steps`",
            whole(0),
            rules.warmup_iterations,
            LONG_WARMUP,
        ),
    )
}
OVERLAPPED = (
    "true: `model.optim.name=distributed_fused_adam`, `model.optim.overlap_grad_sync`, `model.optim.overlap_param_sync`"
)


def offload(check: Check, rule: Rule, here: str, unheeded: str) -> Argument:
    return Argument("OPTIMIZER_OFFLOAD", f"false: nothing; {here}", check, rule, unheeded)


def output(family: str) -> Argument:
    return Argument("OUTPUT_BASEPATH", "`exp_manager.exp_dir`, `exp_manager.name`", text, rules.run_folder(family))


def ordered(names: str, *own: Argument) -> tuple[Argument, ...]:
    """The arguments of these names, those of the script's own before the common ones."""
    found = COMMON | {argument.name: argument for argument in own}
    return tuple(found[name] for name in names.split())


LAYERS = Argument(
    "MP_AC_LAYERS",
    "`model.activations_checkpoint_num_layers`, `model.cpu_offloading_num_layers`",
    maybe(whole(1)),
    unheeded="with AC=sel or none: a note; no divisor of a stage's layers, or all layers offloaded: error",
)
VIRTUAL = Argument(
    "MP_VP", "`model.virtual_pipeline_model_parallel_size`, from the layers", maybe(whole(1)), rules.virtual
)
FIRST = Argument("MP_PP0_LAYERS", "`model.first_pipeline_num_layers`", maybe(whole(0)), rules.first_stage)
PACKING_OFF = Argument(
    "MP_SFT_PACKING",
    "`model.data.packing=false`",
    maybe(rules.packing_refused),
    rules.unpacked,
    "true, which the script takes back: error",
)
DLC = tuple(Argument(name, "the node's variables", maybe(text)) for name in NODES)
POLICIES = "static: `model.optim.offload=1.0`; auto: `auto`"
SHARES, PASSED_ON = f"{POLICIES}; 0 to 1: that share", "done, with a note, though the script never passes it on"


def fixed(weight_decay: float, std: float, interval: int, *own: Item) -> tuple[Item, ...]:
    """What the scripts set whatever is typed. All checkpoints are kept; without the optimizer there, with it here."""
    return (
        *own,
        ("model.init_method_std", std),
        ("model.optim.weight_decay", weight_decay),
        ("model.optim.betas", [0.9, 0.95]),
        (f"{SCHED}.name", "CosineAnnealing"),
        ("trainer.gradient_clip_val", 1.0),
        ("trainer.val_check_interval", interval),
        ("trainer.limit_val_batches", 10),
        ("model.data.num_workers", 8),
        (f"{CALLBACK}.save_top_k", -1),
    )


VISION = fixed(0.01, 0.02, 1000, ("data", "energon"), ("model.loss_reduction", "micro_batch"))

QWEN2_5 = Workflow(
    "qwen2_5",
    "examples/qwen2_5/run_mcore_qwen.sh",
    ordered(
        "ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP CP SP DO FL SFT AC "
        "OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH "
        "TRAIN_TOKENS_OR_ITERS WARMUP_TOKENS_OR_ITERS OUTPUT_BASEPATH",
        model(SIZES["qwen2_5"]),
        Argument(
            "SEQ_LEN",
            "idxmap: `model.encoder_seq_length`; raw: nothing",
            whole(1),
            qwen2_5.sequence_length,
            "raw, another than PAD_LEN: a note",
        ),
        Argument(
            "PAD_LEN",
            "raw: `model.encoder_seq_length`, `model.data.pad_to`, `model.data.too_long=truncate`; idxmap with SFT: "
            "`model.data.pad_to`",
            whole(1),
            qwen2_5.padded_length,
            "idxmap, another than SEQ_LEN: error",
        ),
        Argument("SP", SEQUENCE, truth, qwen2_5.sequence, "false with TP > 1, which did not start: error"),
        Argument(
            "DO",
            f"{OVERLAPPED}; AC=offload: without these two, and false: `fused_adam`",
            truth,
            qwen2_5.optimizer,
            "false without AC=offload, which did not start: error",
        ),
        Argument(
            "SFT",
            "true: `examples/gpt_finetune.py`, `model.loss_reduction=sample`; false: `examples/gpt_pretrain.py`, "
            "`model.loss_reduction=token`",
            truth,
            qwen2_5.task,
            "others: error",
        ),
        offload(rules.offload_policy, rules.offload, POLICIES, "others: error"),
        Argument(
            "DATASET_PATH",
            "`model.data.data_path`; a blend `0.3 a 0.7 b`: `[0.3,a,0.7,b]`",
            text,
            qwen2_5.training_data,
        ),
        Argument(
            "VALID_DATASET_PATH",
            "`model.data.validation_path`, of a blend its prefixes; idxmap, the same as DATASET_PATH: "
            "`model.data.splits_string=99,1,0`",
            text,
            qwen2_5.validation_data,
            "idxmap, another: validates, with a note",
        ),
        Argument(
            "TRAIN_TOKENS_OR_ITERS",
            f"SFT=false: `model.data.train_tokens`, `{SCHED}.max_tokens` in whole steps; true: `trainer.max_steps`",
            whole(1),
            qwen2_5.length,
            "less than a global batch, which did not start: error",
        ),
        Argument(
            "WARMUP_TOKENS_OR_ITERS",
            f"SFT=false: `{SCHED}.warmup_tokens`, in whole steps; true: `{SCHED}.warmup_steps`, "
            f"`{SCHED}.constant_steps`",
            whole(0),
            qwen2_5.warmup,
            f"tokens that are no whole steps: rounded down, as there, with a note; {LONG_WARMUP}",
        ),
        output("qwen2.5"),
    ),
    (
        Argument(
            "MP_DATASET_TYPE",
            "raw: `data=sft_json`; idxmap: `data=mmap`, with SFT `data=sft_idxmap`",
            maybe(one_of("idxmap", "raw")),
            unheeded="others, and raw without SFT: error",
            default="idxmap",
        ),
        LAYERS,
        VIRTUAL,
        Argument(
            "MP_SFT_PACKING",
            "SFT=false: `model.data.reset_position_ids`, `model.data.reset_attention_mask`; idxmap with SFT: nothing, "
            "packed files tell where a sequence ends; raw: `model.data.packing`",
            maybe(truth),
            qwen2_5.packed,
            "raw, never packed: packed, with a note",
        ),
        *DLC,
    ),
    SIZES["qwen2_5"],
    qwen2_5.script,
    fixed(0.1, 0.008, 10000),
)

VISION_RECOMPUTE = Argument(
    "AC",
    RECOMPUTED,
    rules.vision_recompute_mode,
    rules.recompute,
    "false, and true as in its README: as none, with a note; others, offload with PP > 1: error",
)

QWEN2_VL = Workflow(
    "qwen2_vl",
    "examples/qwen2_vl/run_mcore_qwen.sh",
    ordered(
        "ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP CP DO FL AC OPTIMIZER_OFFLOAD "
        "SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS LR_WARMUP_ITERS "
        "OUTPUT_BASEPATH",
        model(SIZES["qwen2_vl"]),
        VISION_RECOMPUTE,
        offload(rules.offload_share, rules.unheard_offload, SHARES, PASSED_ON),
        output("qwen2-vl"),
    ),
    (
        LAYERS,
        FIRST,
        Argument("MP_VP", "nothing", maybe(whole(1)), rules.unheard_virtual, "left out, with a note"),
        PACKING_OFF,
        *DLC,
    ),
    SIZES["qwen2_vl"],
    lambda values: "examples/qwen2_vl_finetune.py",
    VISION,
)

QWEN2_VL_SP = Workflow(
    "qwen2_vl",
    QWEN2_VL.script,
    ordered(
        " ".join(QWEN2_VL.names).replace(" DO ", " SP DO "),
        *(argument for argument in QWEN2_VL.arguments if argument.name not in COMMON),
        VISION_RECOMPUTE,
        offload(rules.offload_share, rules.offload, SHARES, ""),
    ),
    (LAYERS, FIRST, VIRTUAL, PACKING_OFF, *DLC),
    SIZES["qwen2_vl"],
    QWEN2_VL.command,
    VISION,
)


def expert(name: str, key: str, rule: Callable[[str], Rule], also: str = "") -> Argument:
    unheeded = "another than 1 for a size without experts"
    return Argument(name, f"A3B, A22B: `{key}`", whole(1), rule(key), f"{unheeded}{also}: error")


def beside_experts(name: str, rule: Rule, refused: str) -> Argument:
    """A common argument, of whose values one does not go with experts."""
    common = COMMON[name]
    return replace(common, rule=rule, unheeded=f"{common.unheeded}; {refused} with A3B, A22B: error")


QWEN3_VL = Workflow(
    "qwen3_vl",
    "examples/qwen3_vl/run_mcore_qwen.sh",
    ordered(
        " ".join(QWEN2_VL.names).replace(" DO ", " ETP EP SP DO "),
        model(SIZES["qwen3_vl"], qwen3_vl.model),
        expert("ETP", "model.expert_tensor_parallel_size", qwen3_vl.expert_size),
        expert("EP", "model.expert_model_parallel_size", qwen3_vl.experts, ", or no divisor of 128 experts"),
        beside_experts("PR", qwen3_vl.precision, "fp8"),
        beside_experts("AC", qwen3_vl.recompute, "offload"),
        Argument("SP", SEQUENCE, truth, qwen3_vl.sequence, "A3B, A22B: false with TP > 1, which did not start: error"),
        Argument("DO", OVERLAPPED, truth, rules.overlapping_optimizer, "false, which did not start: error"),
        offload(rules.offload_share, rules.unheard_offload, SHARES, PASSED_ON),
        output("qwen3-vl"),
    ),
    (
        LAYERS,
        FIRST,
        VIRTUAL,
        Argument(
            "MP_SFT_PACKING", "`model.data.packing`, without `model.ub_tp_comm_overlap`", maybe(truth), rules.packing
        ),
        *DLC,
    ),
    SIZES["qwen3_vl"],
    lambda values: "examples/qwen3_vl_finetune.py",
    VISION,
)

QWEN3_VL_TABLE = replace(  # as its README lists them, where there are no experts
    QWEN3_VL,
    arguments=ordered(
        " ".join(QWEN2_VL_SP.names),
        model(SIZES["qwen3_vl"], qwen3_vl.model_of_table, "A3B, A22B, and others: error"),
        *(one for one in QWEN3_VL.arguments if one.name in ("SP", "DO", "OPTIMIZER_OFFLOAD", "OUTPUT_BASEPATH")),
    ),
)

TRAINING = (QWEN2_5, QWEN2_VL, QWEN2_VL_SP, QWEN3_VL_TABLE, QWEN3_VL)
