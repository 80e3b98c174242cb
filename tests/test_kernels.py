"""Attention backends, 8-bit floats, overlap and offload: what goes together, and what Megatron is told.

The kernels themselves run in test_gpu.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.transformer.enums import AttnBackend
from test_families import TINY, make_layout, run_of

from nemo_vlm import options
from nemo_vlm.config import DataConfig, ParallelConfig, RunConfig, StepConfig, TrainerConfig
from nemo_vlm.config.checks import show
from nemo_vlm.data.loader import pad_multiple
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import one_process
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.attention import CoreAttention
from nemo_vlm.mcore.config import ACTIVATIONS, context, language_config
from nemo_vlm.mcore.layers import takes_our_attention
from nemo_vlm.models.build import build_chunks
from nemo_vlm.planning.machine import check_kernels
from nemo_vlm.planning.memory import hold

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
FULL = {"activations_checkpoint_granularity": "full"}


def run_with(step: dict, precision: str = "bf16", data: dict | None = None, model: dict | None = None, **parallel):
    run = run_of("gpt", TINY["gpt"], precision=precision)
    return replace(
        run,
        trainer=TrainerConfig(precision=precision),
        model=replace(
            run.model, **{"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16} | (model or {})
        ),
        step=StepConfig(2, 8, **step),
        data=DataConfig(**data or {}),
        parallel=ParallelConfig(**parallel),
    )


FP8 = {"fp8": True}
UB = {"ub_tp_comm_overlap": True}
OFFLOAD = {"cpu_offloading": True}
GRAPHS = {"enable_cuda_graph": True}
FIXED = {"data": {"pad_to": 128}}
APART = [
    (dict(step=FP8 | {"transformer_impl": "local"}), "model.fp8=true: is Transformer Engine's; take model.transformer"),
    (dict(step={"attention_backend": "flash", "transformer_impl": "local"}), "model.attention_backend=flash: is Trans"),
    (dict(step={"attention_backend": "fused"}, precision="32"), "model.attention_backend=fused: computes in 16 bits"),
    (
        dict(step={"attention_backend": "flash"}, model={"kv_channels": 12}),
        "model.attention_backend=flash: model.kv_ch",
    ),
    (dict(step=FP8, precision="32"), "trainer.precision=32: must be bf16 with model.fp8"),
    (dict(step=FP8, precision="16-mixed"), "trainer.precision=16-mixed: must be bf16 with model.fp8"),
    (dict(step=FP8, model={"hidden_size": 40}), "model.hidden_size=40: with model.fp8=true and tensor_model_paral"),
    (dict(step=FP8, model={"ffn_hidden_size": 48}, **TP2_SP), "model.ffn_hidden_size=48: with model.fp8=true and te"),
    (dict(step=FP8, model={"kv_channels": 2}), "model.num_attention_heads=4: with model.fp8=true and tensor_model_p"),
    (dict(step=FP8, data={"pad_to": 136}), "model.data.pad_to=136: must be batch, or no less than model.encoder_seq_"),
    (
        dict(step=FP8, data={"pad_to": 160}, context_parallel_size=2),
        "model.data.pad_to=160: must be batch, or no less than model.encoder_seq_length=128 and a multiple of 64 with "
        "model.fp8=true",
    ),
    (
        dict(step={}, data={"pad_to": 100000, "packing": True}),
        "model.data.pad_to=100000: must be batch or 128 with model.data.packing=true, since no pack is longer",
    ),
    (
        dict(step={"attention_backend": "unfused"}, context_parallel_size=2),
        "model.attention_backend=unfused: must be flash, fused or local with model.context_parallel_size above 1",
    ),
    (
        dict(step=UB, **FIXED),
        "model.ub_tp_comm_overlap=true: needs model.tensor_model_parallel_size above 1 and model.seq",
    ),
    (dict(step=UB, tensor_model_parallel_size=2, **FIXED), "model.ub_tp_comm_overlap=true: needs model.tensor_model"),
    (dict(step=UB, **TP2_SP), "model.ub_tp_comm_overlap=true: all batches must be as long; give model.data.pad_to="),
    (dict(step=UB, precision="32", **TP2_SP, **FIXED), "model.ub_tp_comm_overlap=true: its buffers are bf16"),
    (dict(step=OFFLOAD, pipeline_model_parallel_size=2), "model.cpu_offloading=true: not with a pipeline (model.pipe"),
    (dict(step=OFFLOAD | FULL), "model.cpu_offloading=true: what is recomputed need not be kept; leave out model.act"),
    (dict(step=OFFLOAD | {"cpu_offloading_num_layers": 4}), "model.cpu_offloading_num_layers=4: must be from 1 to 3,"),
    (dict(step=OFFLOAD | {"cpu_offloading_num_layers": 0}), "model.cpu_offloading_num_layers=0: must be from 1 to 3,"),
    (dict(step=FP8 | {"fp8_e4m3": True, "fp8_hybrid": True}), "model.fp8_e4m3=true: model.fp8_hybrid=true too; one"),
    (
        dict(step=FP8 | {"fp8_recipe": "tensorwise", "fp8_margin": 1}),
        "model.fp8_margin=1: must be 0 with model.fp8_recipe=tensorwise, which looks at no step before",
    ),
    (dict(step=GRAPHS), "model.enable_cuda_graph=true: all batches must be as long; give model.data.pad_to=128"),
    (
        dict(step=GRAPHS | FULL, data={"data_impl": "sft_idxmap"}, fsdp=True, pipeline_model_parallel_size=2),
        "model.enable_cuda_graph=true: not with model.pipeline_model_parallel_size=2, where each micro-batch has "
        "graphs of its own; nor with packed samples, whose borders differ; nor with model.fsdp=true, which moves the "
        "weights; nor with model.activations_checkpoint_granularity=full",
    ),
    (dict(step=FP8 | {"fp8_hybrid": False}), "model.fp8_e4m3=false: model.fp8_hybrid=false too; one of them goes"),
]


@pytest.mark.parametrize(("settings", "message"), APART, ids=[message[:50] for _, message in APART])
def test_what_does_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        options.check(run_with(**settings))
    assert "\n" not in str(error.value)


TOGETHER = [
    dict(step=FP8 | UB, **TP2_SP, **FIXED),
    dict(step=UB, data={"data_impl": "sft_idxmap"}, **TP2_SP),
    dict(step=FP8, model={"num_query_groups": 1}, **TP2_SP),  # which each rank has a copy of
    dict(step=FP8 | {"fp8_e4m3": True} | FULL, pipeline_model_parallel_size=2),
    dict(step=OFFLOAD | {"attention_backend": "flash"}),
    dict(step=GRAPHS | FP8 | {"fp8_recipe": "tensorwise"}, **TP2_SP, **FIXED),
    dict(step=GRAPHS, data={"data_impl": "mmap"}),
    dict(step={"attention_backend": "local", "transformer_impl": "local"}, precision="32"),
    dict(step=FP8, data={"pad_to": 144, "packing": True}, model={"encoder_seq_length": 136}),
    dict(step={"cpu_offloading_num_layers": 31}),  # NeMo's recipes have it beside cpu_offloading=false
]


@pytest.mark.parametrize("settings", TOGETHER, ids=str)
def test_what_goes_together(settings: dict) -> None:
    options.check(run_with(**settings))


@pytest.mark.parametrize(
    "setting", [FP8, UB, OFFLOAD, GRAPHS, *({"attention_backend": b} for b in ("flash", "fused"))], ids=str
)
def test_a_machine_without_transformer_engine_says_so_before_the_run(setting: dict) -> None:
    ((key, value),) = setting.items()
    told = f"model.{key}={show(value)}: needs Transformer Engine on a CUDA device; leave it out"
    with pytest.raises(ConfigError, match=f"^{told}$"):
        check_kernels(StepConfig(**setting), gpus=0, env={})


def test_a_tower_s_heads_are_looked_at_too() -> None:
    llava = run_of("llava", TINY["llava"], precision="bf16")
    tower = replace(llava.model.mm_cfg.vision_encoder, hidden_size=80, num_attention_heads=4)
    model = replace(llava.model, mm_cfg=replace(llava.model.mm_cfg, vision_encoder=tower), kv_channels=16)
    for backend in ("auto", "unfused"):
        options.check(replace(llava, model=model, step=replace(llava.step, attention_backend=backend)))
    with pytest.raises(ConfigError, match="num_attention_heads=20: must be a multiple of 8; take unfused or local"):
        options.check(replace(llava, model=model, step=replace(llava.step, attention_backend="fused")))


def told(run: RunConfig):
    return language_config(run.model, context(one_process(run.model), run.trainer.precision, run.step))


def test_what_megatron_is_told() -> None:
    plain = told(run_with({}))
    assert (plain.fp8, plain.cpu_offloading, plain.tp_comm_overlap) == (None, False, False)
    assert plain.attention_backend is AttnBackend.auto
    hybrid = told(run_with(FP8 | {"fp8_margin": 1, "fp8_amax_history_len": 7, "fp8_amax_compute_algo": "most_recent"}))
    assert (hybrid.fp8, hybrid.fp8_recipe, hybrid.fp8_margin) == ("hybrid", "delayed", 1)
    assert (hybrid.fp8_amax_history_len, hybrid.fp8_amax_compute_algo) == (7, "most_recent")
    assert told(run_with(FP8 | {"fp8_e4m3": True})).fp8 == "e4m3"
    assert told(run_with(FP8 | {"fp8_recipe": "tensorwise"})).fp8_recipe == "tensorwise"
    graphs = told(run_with(GRAPHS))
    assert (plain.cuda_graph_impl, graphs.cuda_graph_impl, graphs.cuda_graph_scope) == ("none", "local", [])
    offloading = told(run_with(OFFLOAD))
    assert (offloading.cpu_offloading, offloading.cpu_offloading_num_layers) == (True, 3)
    assert told(run_with(OFFLOAD | {"cpu_offloading_num_layers": 2})).cpu_offloading_num_layers == 2


def test_the_tower_s_gelu_is_the_one_that_megatron_fuses() -> None:
    """Where there are kernels for it, Megatron takes its bias_gelu for F.gelu, which is not the same to five digits."""
    hidden, bias = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 64)
    torch.testing.assert_close(bias_gelu_impl(hidden, bias), ACTIVATIONS["gelu_pytorch_tanh"](hidden + bias))
    assert not torch.allclose(bias_gelu_impl(hidden, bias), ACTIVATIONS["gelu"](hidden + bias), atol=1e-5)


def test_in_fp32_the_attention_is_ours_unless_another_is_asked_for() -> None:
    """Transformer Engine's own in fp32 has neither context parallelism nor packed samples."""
    for precision, ours in (("32", {"auto", "local"}), ("bf16", {"local"})):
        backends = ("auto", "flash", "fused", "unfused", "local")
        configs = {name: told(run_with({"attention_backend": name}, precision)) for name in backends}
        assert {name for name, config in configs.items() if takes_our_attention(config)} == ours


def test_one_process_builds_models_with_different_attention() -> None:
    """Megatron tells Transformer Engine in the environment, and stops where an earlier choice stands there."""
    llava = run_of("llava", TINY["llava"])
    for backend, flags in (("flash", "100"), ("fused", "010"), ("local", "000"), ("auto", "111")):
        run, layout = replace(llava, step=replace(llava.step, attention_backend=backend)), make_layout(llava, 1)
        with groups.pretend(layout):
            (model,) = build_chunks(run, layout)
        assert [os.environ[f"NVTE_{name}_ATTN"] for name in ("FLASH", "FUSED", "UNFUSED")] == list(flags)
        for part in (model.vision_model, model.language_model):
            assert part.config.attention_backend is AttnBackend[backend]
        assert isinstance(model.language_model.decoder.layers[0].self_attention.core_attention, CoreAttention)


def test_a_plan_needs_no_machine() -> None:
    plain, loaded = run_with({}), run_with(FP8 | OFFLOAD | GRAPHS | {"attention_backend": "fused"})
    layout = one_process(plain.model)
    assert hold(loaded, layout, 0, 0) == hold(plain, layout, 0, 0)


def test_eight_bit_products_take_tokens_by_the_sixteen() -> None:
    for settings, tp, expected in (({}, 1, 1), (FP8, 1, 16), ({}, 2, 2), (FP8, 2, 32)):
        run = run_with(settings)
        layout = replace(one_process(run.model), ranks_per_node=tp, tensor=tp, sequence_parallel=tp > 1)
        assert pad_multiple(run, layout, packed=False) == expected
        assert options.row_length(run, layout) % expected == 0
    assert options.row_length(run_with(FP8, data={"pad_to": 96}), one_process(run.model)) == 96
