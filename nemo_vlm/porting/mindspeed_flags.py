"""The flags of MindSpeed-MM's finetune_qwen2vl_*.sh and pretrain_qwen2vl_7b.sh, of all their versions."""

from __future__ import annotations

from nemo_vlm.porting import mindspeed_rules as rules
from nemo_vlm.porting.flags import switch
from nemo_vlm.porting.mindspeed_rules import TEXT
from nemo_vlm.porting.pai_rules import CALLBACK, SCHED
from nemo_vlm.porting.table import Argument, Check, Rule, nothing, one_of, rate, text, to, whole
from nemo_vlm.porting.table import unless_empty as maybe


def value(name: str, key: str, check: Check, default: str = "") -> Argument:
    """A flag whose value becomes that of a key."""
    return Argument(name, f"`{key}`", maybe(check), to(key), default=default)


def passed(names: str, why: str) -> tuple[Argument, ...]:
    """Flags with a value that nothing takes the place of."""
    return tuple(Argument(name, f"nothing: {why}", maybe(text)) for name in names.split())


def bare(names: str, why: str) -> tuple[Argument, ...]:
    """Those without a value."""
    return tuple(on(name, f"nothing: {why}") for name in names.split())


def of_model(names: str) -> tuple[Argument, ...]:
    """Flags of the architecture, which model.json tells: the flags, each with its key there."""
    pairs = (pair.split("=") for pair in names.split())
    here, unheeded = f"nothing: its key of `{TEXT}` in model.json tells", "another than there: a note; 1: none"
    return tuple(Argument(name, here, maybe(rate), rules.told(f"{TEXT}.{key}"), unheeded) for name, key in pairs)


def parallel(what: str) -> Argument:
    key = what.replace("-", "_")
    return value(f"--{what}", f"model.{key}", whole(1), "1")


def on(name: str, here: str, rule: Rule = nothing, unheeded: str = "") -> Argument:
    """A flag without a value, whose absence says something, too."""
    return Argument(name, here, switch, rule, unheeded, "false")


LAUNCHER = (
    value("--nproc_per_node", "trainer.devices", whole(1), "1"),
    value("--nnodes", "trainer.num_nodes", whole(1), "1"),
    Argument("--node_rank", "of several nodes: NODE_RANK in front of the line", maybe(whole(0)), default="0"),
    Argument("--master_addr", "of several nodes: MASTER_ADDR in front of the line", maybe(text), default="localhost"),
    Argument("--master_port", "of several nodes: MASTER_PORT in front of the line", maybe(whole(1)), default="29500"),
)
KERNEL = "the kernels are chosen by what is installed, and compute the same"
MODEL = "model.json tells the architecture"
TOKENS = "the tokenizer and the preset tell"

FLAGS = (
    parallel("tensor-model-parallel-size"),
    parallel("pipeline-model-parallel-size"),
    parallel("context-parallel-size"),
    *passed("--context-parallel-algo", "how ranks exchange keys and values changes no result"),
    Argument(
        "--num-layer-list",
        "`model.num_layer_list`",
        maybe(rules.is_list),
        rules.first_layers,
        f"another than `{TEXT}.num_layer_list`: error",
    ),
    on("--sequence-parallel", "`model.sequence_parallel`", to("model.sequence_parallel")),
    value("--micro-batch-size", "model.micro_batch_size", whole(1)),
    value("--global-batch-size", "model.global_batch_size", whole(1)),
    Argument(
        "--train-iters",
        "`model.data.train_samples`, so many global batches",
        maybe(whole(1)),
        rules.samples("model.data.train_samples"),
    ),
    value("--lr", "model.optim.lr", rate),
    value("--min-lr", f"{SCHED}.min_lr", rate, "0"),
    Argument(
        "--lr-decay-style",
        f"`{SCHED}.name`: CosineAnnealing, PolynomialDecayAnnealing or constant; not given: linear, as Megatron's",
        one_of("cosine", "linear", "constant"),
        rules.decay,
        default="linear",
    ),
    Argument("--lr-decay-iters", f"`{SCHED}.max_samples`", maybe(whole(1)), rules.samples(f"{SCHED}.max_samples")),
    value("--lr-warmup-fraction", f"{SCHED}.warmup_ratio", rate),
    Argument(
        "--lr-warmup-iters", f"`{SCHED}.warmup_samples`", maybe(whole(0)), rules.samples(f"{SCHED}.warmup_samples")
    ),
    value("--weight-decay", "model.optim.weight_decay", rate, "0.01"),
    value("--clip-grad", "trainer.gradient_clip_val", rate, "1.0"),
    Argument("--adam-beta1", "`model.optim.betas`", rate, rules.betas, default="0.9"),
    Argument("--adam-beta2", "`model.optim.betas`", rate, default="0.999"),
    value("--adam-eps", "model.optim.eps", rate, "1e-8"),
    on(
        "--use-distributed-optimizer",
        "`model.optim.name=distributed_fused_adam`; "
        "not given: `fused_adam`, which shards where there are several replicas, too",
        rules.optimizer,
    ),
    on("--overlap-grad-reduce", "`model.optim.overlap_grad_sync`", to("model.optim.overlap_grad_sync")),
    on("--overlap-param-gather", "`model.optim.overlap_param_sync`", to("model.optim.overlap_param_sync")),
    value("--seed", "model.seed", whole(0), "1234"),
    on("--bf16", "`trainer.precision=bf16-mixed`; neither this nor --fp16: `32`", rules.precision),
    on("--fp16", "`trainer.precision=16-mixed`"),
    Argument(
        "--initial-loss-scale",
        "--fp16: `model.native_amp_init_scale`; --bf16 has none",
        maybe(rate),
        rules.loss_scale,
    ),
    on(
        "--calculate-per-token-loss",
        "`model.loss_reduction=token`; neither this nor the next: `micro_batch`",
        rules.loss,
    ),
    on("--calculate-per-sample-loss", "`model.loss_reduction=sample`"),
    Argument(
        "--recompute-granularity",
        "`model.activations_checkpoint_granularity`",
        maybe(one_of("full", "selective")),
        rules.recompute,
    ),
    value("--recompute-method", "model.activations_checkpoint_method", one_of("uniform", "block")),
    value("--recompute-num-layers", "model.activations_checkpoint_num_layers", whole(1)),
    Argument(
        "--load",
        "`model.restore_from_path`; where it is --save: `exp_manager.resume_if_exists`",
        maybe(text),
        rules.load,
    ),
    on("--no-load-optim", "with --load as --save: `exp_manager.resume_optimizer=false`", unheeded="without it: a note"),
    on("--no-load-rng", "with --load as --save: `exp_manager.resume_rng=false`"),
    Argument("--save", "`exp_manager.exp_dir`, `exp_manager.name` (the script's)", maybe(text), rules.save),
    on("--no-save-optim", f"`{CALLBACK}.save_optimizer=false`"),
    on("--no-save-rng", f"`{CALLBACK}.save_rng=false`"),
    value("--save-interval", f"{CALLBACK}.every_n_train_steps", whole(1)),
    value("--log-interval", "trainer.log_every_n_steps", whole(1), "100"),
    Argument(
        "--eval-interval",
        "`trainer.val_check_interval`, where data.json has data for it",
        maybe(whole(1)),
        rules.validation("trainer.val_check_interval"),
        default="1000",
    ),
    Argument(
        "--eval-iters",
        "`trainer.limit_val_batches`, where data.json has data for it",
        maybe(whole(1)),
        rules.validation("trainer.limit_val_batches"),
        default="100",
    ),
    value("--num-workers", "model.data.num_workers", whole(0)),
    Argument(
        "--distributed-backend",
        "`trainer.accelerator=npu`",
        one_of("nccl", "hccl"),
        rules.backend,
        default="nccl",
    ),
    Argument("--distributed-timeout-minutes", "`trainer.hang_timeout`, in seconds", maybe(whole(1)), rules.timeout),
    Argument("--mm-data", "the JSON of the data, below", maybe(text)),
    Argument("--mm-model", "the JSON of the model, below", maybe(text)),
    Argument("--mm-tool", "the JSON of the profiler, below", maybe(text)),
    *of_model(
        "--num-layers=num_layers --hidden-size=hidden_size --ffn-hidden-size=ffn_hidden_size "
        "--num-attention-heads=num_attention_heads --num-query-groups=num_query_groups "
        "--max-position-embeddings=max_position_embeddings --rotary-base=rope_theta "
        "--norm-epsilon=layernorm_epsilon --init-method-std=init_method_std "
        "--attention-dropout=attention_dropout --hidden-dropout=hidden_dropout"
    ),
    *passed("--position-embedding-type --normalization", MODEL),
    *bare(
        "--group-query-attention --untie-embeddings-and-output-weights --disable-bias-linear --add-qkv-bias --swiglu "
        "--use-rotary-position-embeddings",
        MODEL,
    ),
    *passed("--tokenizer-type --tokenizer-name-or-path", "data.json's `model_name_or_path` is the tokenizer"),
    *passed("--vocab-size --padded-vocab-size --make-vocab-size-divisible-by", TOKENS),
    Argument(
        "--seq-length",
        "`model.encoder_seq_length`, with `model.data.too_long=truncate`, where data.json has no `cutoff_len`",
        maybe(whole(1)),
        rules.limit,
        default="1024",
    ),
    *bare("--variable-seq-lengths", "batches are as long as their longest sample"),
    *bare("--use-mcore-models", "there is no other"),
    *bare(
        "--use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb --use-flash-attn --no-masked-softmax-fusion "
        "--attention-softmax-in-fp32 --no-gradient-accumulation-fusion --reuse-fp32-param",
        KERNEL,
    ),
    *bare("--enable-dummy-optimizer", "a stage without trained weights needs no care"),
    *passed("--ckpt-format", "what training checkpoints are is fixed; they load in any layout"),
    *bare("--log-tps", "metrics.csv always has tokens_per_sec"),
    *bare("--enable-one-logger", "exp_manager has loggers: `create_wandb_logger` and its like"),
)
EXPORTED = "set in front of the line; torch_npu and CANN read it, nothing else here does"
NPU_VARIABLES = (
    "ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_GLOBAL_LOG_LEVEL ASCEND_LAUNCH_BLOCKING TASK_QUEUE_ENABLE COMBINED_ENABLE "
    "CPU_AFFINITY_CONF HCCL_CONNECT_TIMEOUT NPU_ASD_ENABLE HOST_CACHE_CAPACITY ACLNN_CACHE_LIMIT CLOSE_MATMUL_K_SHIFT "
    "MULTI_STREAM_MEMORY_REUSE PYTORCH_NPU_ALLOC_CONF"
)
VARIABLES = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "set in front of the line",
    **dict.fromkeys(NPU_VARIABLES.split(), EXPORTED),
}
SHELL = {
    "NPUS_PER_NODE": "`trainer.devices`",
    "NNODES": "`trainer.num_nodes`",
    "NODE_RANK, MASTER_ADDR, MASTER_PORT": "of several nodes: the same, in front of the line",
    "WORLD_SIZE, DP, GRAD_ACC_STEP": "nothing of their own: `model.global_batch_size` is GBS, their product",
    "MBS, GBS": "`model.micro_batch_size`, `model.global_batch_size`",
    "TP, PP, CP": "`model.tensor_model_parallel_size` and its like",
    "SEQ_LEN": "as --seq-length, below",
    "MM_DATA, MM_MODEL, MM_TOOL": "read, and translated key by key",
    "LOAD_PATH": "`model.restore_from_path`, or `exp_manager.resume_if_exists` where it is SAVE_PATH",
    "SAVE_PATH": "`exp_manager.exp_dir`",
}
