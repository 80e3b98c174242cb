"""What goes together of the data and the model, of kernels, 8-bit floats, overlap and offload; the rules of the layout
itself stand in layout.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nemo_vlm.config import LanguageConfig, ParallelConfig, RunConfig, StepConfig, demand
from nemo_vlm.config.checks import show
from nemo_vlm.config.data import OF_MEDIA, PAIRS
from nemo_vlm.config.optim import SHARDED
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, expert_tensor_size, positive, splits_sequence

OF_EXPERTS = ("moe_", "expert_")  # what their settings begin with
HEAD_MULTIPLE = 8  # numbers of a head in 16-bit kernels of attention
FP8_MULTIPLE = 16  # every dimension of a product in 8-bit floats (Transformer Engine's assert_dim_for_fp8_exec, cuBLAS)


def check(run: RunConfig) -> None:
    """What can be said without a look at the machine.

    Raises:
        ConfigError: options that exclude each other or do not suit the model, or sizes that 8-bit products do not take.
    """
    step = run.step
    check_data(run)
    check_optimizer(run)
    check_padding(run)
    check_experts(run)
    if run.trainer.accelerator == "npu":
        check_npu(step)
    if step.transformer_impl == "local":
        for setting in of_transformer_engine(step):
            raise ConfigError(f"{setting}: is Transformer Engine's; take model.transformer_impl=auto")
    if step.attention_backend in ("flash", "fused"):
        check_fast_attention(run)
    if run.parallel.context_parallel_size > 1:
        right = "flash, fused or local with model.context_parallel_size above 1"
        demand(step.attention_backend != "unfused", "model.attention_backend", step.attention_backend, right)
    if step.fp8:
        check_fp8(run)
    if step.ub_tp_comm_overlap:
        check_overlap(run)
    if step.cpu_offloading:
        check_offloading(run)
    if step.enable_cuda_graph:
        check_graphs(run)


def check_data(run: RunConfig) -> None:
    """What model.data says of images, which the model may say otherwise."""
    data = run.data
    if run.model.tiles_images and data.image_aspect_ratio == "keep":
        right = "square or pad with model.mm_cfg.use_image_tile=true, since tiles are cut from squares"
        raise ConfigError(f"model.data.image_aspect_ratio=keep: must be {right}")
    check_media(run)
    for key in ("max_visual_tokens_per_micro_batch", "balance_visual_tokens"):
        if getattr(data, key) and not run.model.reads_media:
            raise ConfigError(f"model.data.{key}={show(getattr(data, key))}: the {run.family} family reads text only")
    check_feature_cache(run)
    for key, fact in run.model.image_facts.items():
        given = getattr(data, key)
        if given not in (None, fact, (fact, fact)):
            shown = list(given) if isinstance(given, tuple) else given
            raise ConfigError(f"model.data.{key}={shown}: the model says {fact}; leave it out")


def check_feature_cache(run: RunConfig) -> None:
    """Features can be kept only of a tower that stays as it is."""
    data, key = run.data, "model.data.cache_vision_features"
    if data.vision_cache_dir is not None and not data.cache_vision_features:
        raise ConfigError(f"model.data.vision_cache_dir={data.vision_cache_dir}: goes with {key}=true")
    if not data.cache_vision_features:
        return
    if not run.model.reads_media:
        raise ConfigError(f"{key}=true: the {run.family} family reads text only")
    if run.peft.lora is None and not run.model.parts["vision_model"].freeze:
        raise ConfigError(f"{key}=true: the tower trains; give model.mm_cfg.vision_encoder.freeze=true")


def check_media(run: RunConfig) -> None:
    """Settings of images and videos are for a family that follows them, and leave something between them."""
    chosen, facts = run.model.media_choices(run.data), run.model.image_facts
    for setting in fields(run.data):
        key, given = setting.name, getattr(run.data, setting.name)
        if key in OF_MEDIA and given != setting.default and key not in (chosen | facts):
            follows = f"it follows {', '.join(chosen)}" if chosen else "it reads text only"
            preset = ", or data=sharegpt for LLaVA JSON" * (key == "image_aspect_ratio")
            right = f"take {show(setting.default)}{preset}"
            raise ConfigError(f"model.data.{key}={show(given)}: not for the {run.family} family; {follows}; {right}")
    for low, high in PAIRS:
        if low in chosen and chosen[low] > chosen[high]:
            raise ConfigError(f"model.data.{high}={chosen[high]}: must not be below model.data.{low}={chosen[low]}")


def check_npu(step: StepConfig) -> None:
    """Attention and layers are torch's own there."""
    chosen = ["model.transformer_impl=transformer_engine"] * (step.transformer_impl == "transformer_engine")
    for setting in chosen + of_transformer_engine(step):
        raise ConfigError(f"{setting}: needs a CUDA device, and trainer.accelerator=npu; leave it out")


def of_transformer_engine(step: StepConfig) -> list[str]:
    """The settings that nothing else has, as key=value."""
    switches = ("fp8", "ub_tp_comm_overlap", "cpu_offloading", "moe_grouped_gemm", "moe_permute_fusion")
    found = [f"model.{name}=true" for name in (*switches, "enable_cuda_graph") if getattr(step, name)]
    backend = step.attention_backend
    return found + [f"model.attention_backend={backend}"] * (backend not in ("auto", "local"))


def check_fast_attention(run: RunConfig) -> None:
    """What neither flash-attn nor cuDNN takes."""
    backend = f"model.attention_backend={run.step.attention_backend}"
    if run.trainer.precision == "32":
        raise ConfigError(f"{backend}: computes in 16 bits, and trainer.precision=32; take bf16, or local")
    right = "local" if run.parallel.context_parallel_size > 1 else "unfused or local"
    sizes = {"model.kv_channels": run.model.kv_channels or 0}
    if run.model.media:
        vision: Any = run.model.media.vision_encoder
        head = "model.mm_cfg.vision_encoder.hidden_size / num_attention_heads"
        sizes[head] = vision.hidden_size // vision.num_attention_heads
    for key, size in sizes.items():
        if size % HEAD_MULTIPLE:
            raise ConfigError(f"{backend}: {key}={size}: must be a multiple of {HEAD_MULTIPLE}; take {right}")


def check_optimizer(run: RunConfig) -> None:
    """Sharding, overlap and offload of the optimizer, each where it can be."""
    optim, sharded = run.optim, run.optim.distributed or run.optim.name in SHARDED
    overlaps = optim.overlap_grad_sync or optim.overlap_param_sync
    if run.parallel.fsdp and (sharded or overlaps or optim.offloads):
        raise ConfigError(
            f"model.fsdp=true: FSDP shards and overlaps the optimizer itself; model.optim.name={optim.name}, "
            "distributed, overlap_grad_sync, overlap_param_sync and offload are for the other layouts, take fused_adam"
        )
    if (sharded or optim.overlap_param_sync) and optim.offloads and run.trainer.precision == "32":
        asked = "distributed=true" if sharded else "overlap_param_sync=true"
        asked = f"name={optim.name}" if optim.name in SHARDED else asked
        raise ConfigError(
            f"model.optim.offload={optim.offload}: with model.optim.{asked} it needs "
            "trainer.precision=bf16-mixed or 16-mixed (Megatron offloads main weights of their own)"
        )
    if optim.distributed is False and optim.offloads and run.trainer.precision != "32":
        raise ConfigError(
            f"model.optim.distributed=false: with model.optim.offload={optim.offload} and "
            f"trainer.precision={run.trainer.precision} it must be true (Megatron offloads sharded main weights)"
        )


def check_padding(run: RunConfig) -> None:
    """A length that is given must hold every sample, suit the layout and the products, and be no pack's in vain."""
    parallel, limit, pad_to = run.parallel, run.model.encoder_seq_length, run.data.pad_to
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    multiple = token_multiple(tensor, splits_sequence(run), context, run.step.fp8)
    if pad_to != "batch":
        longest = -(-limit // multiple) * multiple
        right = f"batch, or no less than model.encoder_seq_length={limit}"
        right += f" and a multiple of {multiple}" * (multiple > 1)
        right += " with model.fp8=true" * run.step.fp8
        demand(pad_to >= limit and pad_to % multiple == 0, "model.data.pad_to", pad_to, right)
        right = f"batch or {longest} with model.data.packing=true, since no pack is longer"
        demand(pad_to == longest or not run.data.packing, "model.data.pad_to", pad_to, right)


def check_experts(run: RunConfig) -> None:
    """Sizes that divide, and how tokens reach experts; adapters are for what all tokens pass through."""
    model, parallel, step, lora = run.model, run.parallel, run.step, run.peft.lora
    if model.num_moe_experts is None:
        check_dense(run)
        return
    check_expert_sizes(model, parallel)
    if step.moe_token_dispatcher_type == "allgather":
        check_allgather(run)
    if step.fp8 or step.cpu_offloading:
        key = "fp8" if step.fp8 else "cpu_offloading"
        raise ConfigError(f"model.{key}=true: not with model.num_moe_experts={model.num_moe_experts}; leave it out")
    if lora and not lora.linears <= {"linear_qkv", "linear_proj"}:
        targets = ", ".join(lora.target_modules)
        right = "[attention], [attention_qkv] or [attention_dense] with model.num_moe_experts"
        demand(False, "model.peft.lora_tuning.target_modules", f"[{targets}]", right)


def check_dense(run: RunConfig) -> None:
    """Settings of experts are for a model that has some."""
    for section in (run.parallel, run.step):
        for setting in fields(section):
            if setting.name.startswith(OF_EXPERTS):
                value, default = getattr(section, setting.name), setting.default
                right = f"{show(default)} with model.num_moe_experts=null"
                demand(value == default, f"model.{setting.name}", show(value), right)


def check_expert_sizes(model: LanguageConfig, parallel: ParallelConfig) -> None:
    """Experts must divide by the ranks that share them, and the width of each by those that share it."""
    count, width = model.num_moe_experts, model.moe_ffn_hidden_size
    expert, tensor = parallel.expert_model_parallel_size, expert_tensor_size(parallel)
    assert count is not None and width is not None, "both are filled in when the settings are read"
    for key, size in (("expert_model_parallel_size", expert), ("expert_tensor_parallel_size", tensor)):
        positive(f"model.{key}", size)
    positive("model.moe_ffn_hidden_size", width)
    demand(count % expert == 0, "model.num_moe_experts", count, f"a multiple of expert_model_parallel_size={expert}")
    right = f"a multiple of expert_tensor_parallel_size={tensor}"
    demand(width % tensor == 0, "model.moe_ffn_hidden_size", width, right)
    if parallel.fsdp:
        right = "1 with model.fsdp=true, which shards experts as all weights"
        demand(expert == 1, "model.expert_model_parallel_size", expert, right)
        same = (
            f"{parallel.tensor_model_parallel_size} with model.fsdp=true, as tensor_model_parallel_size; leave it out"
        )
        demand(tensor == parallel.tensor_model_parallel_size, "model.expert_tensor_parallel_size", tensor, same)


def check_allgather(run: RunConfig) -> None:
    """Megatron gathers as many tokens of each rank as it has itself."""
    key, size = "model.moe_token_dispatcher_type", run.parallel.pipeline_model_parallel_size
    right = f"alltoall with model.pipeline_model_parallel_size={size}, where every micro-batch has a length of its own"
    demand(size == 1, key, "allgather", right)
    if gathers_samples(run):
        check_lengths(run, f"{key}=allgather")


def gathers_samples(run: RunConfig) -> bool:
    """Whether ranks that see different samples gather each other's tokens for their experts."""
    parallel, gathers = run.parallel, run.step.moe_token_dispatcher_type == "allgather"
    one_sample = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    shared = parallel.expert_model_parallel_size * expert_tensor_size(parallel)
    return gathers and one_sample % shared != 0


def check_lengths(run: RunConfig, key: str) -> None:
    """All micro-batches must be of one length."""
    if run.data.pad_to == "batch" and run.data.has_records:
        raise ConfigError(f"{key}: all batches must be as long; give model.data.pad_to={run.model.encoder_seq_length}")
    if splits_packs(run):
        raise ConfigError(f"{key}: not with packed samples and model.context_parallel_size above 1")


def check_fp8(run: RunConfig) -> None:
    """Weights are bf16, and what a rank has of each is a multiple of 16 both ways."""
    demand(run.trainer.precision.startswith("bf16"), "trainer.precision", run.trainer.precision, "bf16 with model.fp8")
    model, tp = run.model, run.parallel.tensor_model_parallel_size
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert groups is not None and size is not None, "both are filled in when the settings are read"
    sizes = {
        "model.hidden_size": (model.hidden_size, model.hidden_size),
        "model.ffn_hidden_size": (model.ffn_hidden_size, model.ffn_hidden_size // tp),
        "model.num_attention_heads": (heads, heads * size // tp),
        "model.num_query_groups": (groups, (heads // tp + 2 * max(groups // tp, 1)) * size),
    }
    for key, (value, part) in sizes.items():
        if part % FP8_MULTIPLE:
            raise ConfigError(
                f"{key}={value}: with model.fp8=true and tensor_model_parallel_size={tp}, each rank's linear layer "
                f"would be {part} wide, no multiple of {FP8_MULTIPLE}"
            )


def packs(run: RunConfig) -> bool:
    """Whether the rows of its batches hold several samples, which see only themselves."""
    return run.data.packing or run.data.reset_attention_mask or run.data.data_impl == "sft_idxmap"


def splits_packs(run: RunConfig) -> bool:
    """Whether packed samples are split over ranks: each is padded for it, so that packs differ in length."""
    return packs(run) and run.parallel.context_parallel_size > 1


def check_overlap(run: RunConfig) -> None:
    """Transformer Engine's buffers are made once: what passes through them is sequence-parallel, and of one size."""
    key = "model.ub_tp_comm_overlap=true"
    if not splits_sequence(run):
        raise ConfigError(f"{key}: needs model.tensor_model_parallel_size above 1 and model.sequence_parallel=true")
    check_lengths(run, key)
    if not run.trainer.precision.startswith("bf16"):
        raise ConfigError(f"{key}: its buffers are bf16, and trainer.precision={run.trainer.precision}")


def check_offloading(run: RunConfig) -> None:
    """Megatron's constraints (TransformerConfig.__post_init__)."""
    key, pipeline, count = "model.cpu_offloading=true", run.parallel.pipeline_model_parallel_size, run.model.num_layers
    if pipeline > 1:
        raise ConfigError(f"{key}: not with a pipeline (model.pipeline_model_parallel_size={pipeline})")
    granularity = run.step.activations_checkpoint_granularity
    if granularity is not None:
        raise ConfigError(
            f"{key}: what is recomputed need not be kept; leave out "
            f"model.activations_checkpoint_granularity={granularity}"
        )
    layers = offloaded_layers(run.step, count)
    right = f"from 1 to {count - 1}, one less than model.num_layers"
    demand(0 < layers < count, "model.cpu_offloading_num_layers", layers, right)


def check_graphs(run: RunConfig) -> None:
    """A graph is captured once, of shapes and weights that stay where they are (Megatron's CudaGraphManager)."""
    key, granularity = "model.enable_cuda_graph=true", run.step.activations_checkpoint_granularity
    check_lengths(run, key)
    stages = run.parallel.pipeline_model_parallel_size
    unfit = {
        f"model.pipeline_model_parallel_size={stages}, where each micro-batch has graphs of its own": stages > 1,
        "packed samples, whose borders differ": packs(run),
        f"model.num_moe_experts={run.model.num_moe_experts}, whose tokens differ": run.model.num_moe_experts,
        "DeepStack, whose features are not there without images": run.model.deepstack_layers,
        "model.fsdp=true, which moves the weights": run.parallel.fsdp,
        "model.cpu_offloading=true": run.step.cpu_offloading,
        "model.activations_checkpoint_granularity=full": granularity == "full",
        f"model.data.eval_samples={run.data.eval_samples}, whose prompts are shorter": run.data.eval_samples,
    }
    if found := [what for what, is_so in unfit.items() if is_so]:
        raise ConfigError(f"{key}: not with {'; nor with '.join(found)}")


def offloaded_layers(step: StepConfig, num_layers: int) -> int:
    given = step.cpu_offloading_num_layers
    return num_layers - 1 if given is None else given


def token_multiple(tensor: int, sequence_parallel: bool, context: int, fp8: bool) -> int:
    """What the tokens of a row are a multiple of in the layers: the ranks and chunks they are split over, fp8's 16."""
    ranks = tensor if sequence_parallel else 1
    chunks = 2 * context if context > 1 else 1
    return ranks * chunks * (FP8_MULTIPLE if fp8 else 1)


def least_multiple(run: RunConfig, layout: Layout) -> int:
    """What rows are padded to a multiple of, at least."""
    return token_multiple(layout.tensor, layout.sequence_parallel, layout.context, run.step.fp8)


def row_length(run: RunConfig, layout: Layout) -> int:
    """Tokens of each row where all micro-batches are of one length."""
    multiple = least_multiple(run, layout)
    longest = run.model.encoder_seq_length if run.data.pad_to == "batch" else run.data.pad_to
    return -(-longest // multiple) * multiple
