"""What goes together of the data and the model, of kernels, 8-bit floats, overlap and offload; the rules of the layout
itself stand in layout.
"""

from __future__ import annotations

from dataclasses import fields

from nemo_vlm.config import RunConfig, StepConfig, demand
from nemo_vlm.config.checks import show
from nemo_vlm.config.data import OF_MEDIA, PAIRS
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout

FP8_MULTIPLE = 16  # every dimension of a product in 8-bit floats (Transformer Engine's assert_dim_for_fp8_exec, cuBLAS)


def check(run: RunConfig) -> None:
    """What can be said without a look at the machine.

    Raises:
        ConfigError: options that exclude each other or do not suit the model, or sizes that 8-bit products do not take.
    """
    step = run.step
    check_data(run)
    check_padding(run)
    if run.trainer.accelerator == "npu":
        check_npu(step)
    if step.transformer_impl == "local":
        for setting in of_transformer_engine(step):
            raise ConfigError(f"{setting}: is Transformer Engine's; take model.transformer_impl=auto")
    if step.attention_backend in ("flash", "fused") and run.trainer.precision == "32":
        raise ConfigError(
            f"model.attention_backend={step.attention_backend}: computes in 16 bits, and trainer.precision=32; "
            "take bf16, or local"
        )
    if run.parallel.context_parallel_size > 1:
        right = "flash, fused or local with model.context_parallel_size above 1"
        demand(step.attention_backend != "unfused", "model.attention_backend", step.attention_backend, right)
    if step.fp8:
        check_fp8(run)
    if step.ub_tp_comm_overlap:
        check_overlap(run)
    if step.cpu_offloading:
        check_offloading(run)


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
    for key, fact in run.model.image_facts.items():
        given = getattr(data, key)
        if given not in (None, fact, (fact, fact)):
            shown = list(given) if isinstance(given, tuple) else given
            raise ConfigError(f"model.data.{key}={shown}: the model says {fact}; leave it out")


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
    switches = ("fp8", "ub_tp_comm_overlap", "cpu_offloading")
    found = [f"model.{name}=true" for name in switches if getattr(step, name)]
    backend = step.attention_backend
    return found + [f"model.attention_backend={backend}"] * (backend not in ("auto", "local"))


def check_padding(run: RunConfig) -> None:
    """A length that is given must hold every sample, and suit the layout and the products."""
    parallel, limit, pad_to = run.parallel, run.model.encoder_seq_length, run.data.pad_to
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    multiple = token_multiple(tensor, parallel.sequence_parallel, context, run.step.fp8)
    if pad_to != "batch":
        right = f"batch, or no less than model.encoder_seq_length={limit} and a multiple of {multiple}"
        right += " with model.fp8=true" * run.step.fp8
        demand(pad_to >= limit and pad_to % multiple == 0, "model.data.pad_to", pad_to, right)


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


def check_overlap(run: RunConfig) -> None:
    """Transformer Engine's buffers are made once: what passes through them is sequence-parallel, and of one size."""
    key = "model.ub_tp_comm_overlap=true"
    if run.parallel.tensor_model_parallel_size == 1 or not run.parallel.sequence_parallel:
        raise ConfigError(f"{key}: needs model.tensor_model_parallel_size above 1 and model.sequence_parallel=true")
    if run.data.pad_to == "batch" and run.data.has_records:
        raise ConfigError(f"{key}: all batches must be as long; give model.data.pad_to={run.model.encoder_seq_length}")
    packs = run.data.packing or run.data.reset_attention_mask or run.data.data_impl == "sft_idxmap"
    if packs and run.parallel.context_parallel_size > 1:  # each sample is padded to be split
        raise ConfigError(f"{key}: not with packed samples and model.context_parallel_size above 1")
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
    """Tokens of each row under ub_tp_comm_overlap, whose buffers are made for them."""
    multiple = least_multiple(run, layout)
    longest = run.model.encoder_seq_length if run.data.pad_to == "batch" else run.data.pad_to
    return -(-longest // multiple) * multiple
