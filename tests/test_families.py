"""The contract of every family under nemo_vlm/models: parity with Hugging Face, and with itself under every layout."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from distributed import run_ranks
from safetensors.torch import load_file, save_file

from nemo_vlm.batch import IGNORE_INDEX, Sample, collate
from nemo_vlm.config import (
    DataConfig,
    ExpManagerConfig,
    LanguageConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StepConfig,
    TokenizerConfig,
    TrainerConfig,
)
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import InMemory
from nemo_vlm.layout import Layout, one_process, resolve
from nemo_vlm.mapping import Ours, Rule, Theirs
from nemo_vlm.mcore import groups, weights
from nemo_vlm.mcore.config import DTYPES
from nemo_vlm.mcore.engine import Engine, materialize
from nemo_vlm.models.base import FAMILIES, family
from nemo_vlm.models.build import build_chunks
from nemo_vlm.models.llava.config import Config as LlavaConfig
from nemo_vlm.models.qwen2_vl.config import Config as QwenConfig
from nemo_vlm.models.qwen3_vl.config import Config as Qwen3Config
from nemo_vlm.sources import starting
from nemo_vlm.sources.huggingface import as_in_file
from nemo_vlm.training.build import make_engine
from nemo_vlm.typed import model_tree, read_model

NUM_STEPS = 3


def siglip(config: LlavaConfig) -> LlavaConfig:
    vision = replace(
        config.mm_cfg.vision_encoder,
        model_type="siglip",
        activation=None,
        layernorm_epsilon=None,
        class_token_length=None,
        use_head=True,
        image_size=36,  # a rest that makes no patch
    )
    return replace(config, mm_cfg=replace(config.mm_cfg, vision_encoder=vision))


def last_layer(config: LlavaConfig) -> LlavaConfig:
    vision = replace(config.mm_cfg.vision_encoder, vision_select_layer=-1)
    return replace(config, mm_cfg=replace(config.mm_cfg, vision_encoder=vision))


def odd(config: LlavaConfig) -> LlavaConfig:
    """Five vision heads and three layers: neither divides by two."""
    vision = replace(config.mm_cfg.vision_encoder, num_attention_heads=5)
    return replace(config, num_layers=3, mm_cfg=replace(config.mm_cfg, vision_encoder=vision))


def three_heads(config: QwenConfig | Qwen3Config) -> QwenConfig | Qwen3Config:
    """Of the tower: they do not divide by two. Tied embeddings, as Qwen2-VL 2B."""
    vision = replace(config.mm_cfg.vision_encoder, num_attention_heads=3)
    return replace(tied(config), mm_cfg=replace(config.mm_cfg, vision_encoder=vision))


def dense(config: Qwen3Config) -> Qwen3Config:
    """Qwen3-VL without experts."""
    return replace(config, num_moe_experts=None, moe_ffn_hidden_size=None)


def three_layers(config: Qwen3Config) -> Qwen3Config:
    """Of the decoder, as many as DeepStack has features, and three heads in the tower. Tied, as Qwen3-VL 2B and 4B."""
    return replace(three_heads(dense(config)), num_layers=3)


def tied(config: LanguageConfig) -> LanguageConfig:
    return replace(config, share_embeddings_and_output_weights=True)


def interpolated(config: LanguageConfig) -> LanguageConfig:
    return replace(config, seq_len_interpolation_factor=2.0)


def llama3_scaled(config: LanguageConfig) -> LanguageConfig:
    return replace(config, rope_scaling_factor=8.0, rotary_base=500000.0)


def biased(config: LanguageConfig) -> LanguageConfig:
    return replace(config, bias=True, qkv_bias=True)


def qwen2(config: LanguageConfig) -> LanguageConfig:
    """As Qwen2.5 0.5B: 14 heads, 2 groups, biases of queries, keys and values, tied embeddings."""
    return replace(tied(config), hidden_size=112, num_attention_heads=14, kv_channels=8, qkv_bias=True)


def qwen3(config: LanguageConfig) -> LanguageConfig:
    return replace(config, qk_layernorm=True, layernorm_epsilon=1e-6)


def projector(kind: str, config: LlavaConfig) -> LlavaConfig:
    return replace(config, mm_cfg=replace(config.mm_cfg, mm_mlp_adapter_type=kind))


TINY = {name: family(name, "tiny").config() for name in FAMILIES}
VARIANTS = {name: (name, config) for name, config in TINY.items()} | {
    "llava_siglip": ("llava", siglip(TINY["llava"])),
    "llava_last_layer": ("llava", last_layer(TINY["llava"])),
    "llava_odd": ("llava", odd(TINY["llava"])),
    "gpt_tied": ("gpt", tied(TINY["gpt"])),
    "gpt_biased": ("gpt", biased(TINY["gpt"])),
    "gpt_qwen2": ("gpt", qwen2(TINY["gpt"])),
    "gpt_qwen3": ("gpt", qwen3(TINY["gpt"])),
    "llava_qwen2": ("llava", replace(TINY["llava"], qkv_bias=True)),
    "llava_qwen3": ("llava", qwen3(TINY["llava"])),
    "qwen2_vl_odd": ("qwen2_vl", three_heads(TINY["qwen2_vl"])),
    "qwen3_vl_dense": ("qwen3_vl", dense(TINY["qwen3_vl"])),
    "qwen3_vl_odd": ("qwen3_vl", three_layers(TINY["qwen3_vl"])),
    "gpt_linear_rope": ("gpt", interpolated(TINY["gpt"])),
    "gpt_llama3_rope": ("gpt", llama3_scaled(TINY["gpt"])),
}


def run_of(
    name: str,
    config: LanguageConfig,
    parallel: ParallelConfig = ParallelConfig(),
    step: StepConfig = StepConfig(micro_batch_size=2, global_batch_size=8),
    optim: OptimConfig = OptimConfig(lr=1e-2, eps=1e-6),  # below, rounding decides steps, and routers' choices by them
    precision: str = "32",
) -> RunConfig:
    trainer = TrainerConfig(precision=precision, gradient_clip_val=1.0, max_steps=NUM_STEPS)
    return RunConfig(name, trainer, ExpManagerConfig(), config, parallel, step, DataConfig(), optim, TokenizerConfig())


def settle(run: RunConfig, given: Collection[str] = ()) -> RunConfig:
    """The run with what the checkpoints that it starts from decide."""
    tree, _ = starting.settle(model_tree(run), given)
    return replace(run, **read_model(tree, type(run.model)))


def build_all(run: RunConfig, layout: Layout):
    """The chunks of this rank with drawn weights, and their parts."""
    chunks = build_chunks(run, layout)
    parts = []
    for chunk in chunks:
        materialize(chunk, DTYPES["32" if layout.fsdp else run.trainer.precision])
        parts += weights.parts(chunk, run.model.vocab_size)
    weights.draw(parts, seed=7, std=0.05, num_layers=run.model.num_layers)
    with torch.no_grad():  # drawn biases and norms are 0 and 1: parity should not rest on that
        for part in parts:
            if len(part.shape) == 1:
                noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(len(part.name)))
                part.data.add_(0.1 * noise[part.slices])
    return chunks, parts


def build(name: str, config: LanguageConfig, layout: Layout):
    """The whole model in one process, and its parts."""
    (model,), parts = build_all(run_of(name, config), layout)
    return model, parts


@contextmanager
def one_rank(config: LanguageConfig):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        groups.initialize(one_process(config), seed=0)
        yield
    finally:
        groups.shut_down()
        torch.distributed.destroy_process_group()


def to_hugging_face(name: str, config: LanguageConfig, ours: dict, folder: Path):
    """The Hugging Face model of our weights, read by transformers from hub names."""
    mapping = family(name, "mapping")
    theirs = Theirs(mapping.rules(config), InMemory(ours))
    tensors = {key: theirs.read(key).clone(memory_format=torch.contiguous_format) for key in theirs.names()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hf_config = mapping.hf_config(config)
    (folder / "config.json").write_text(json.dumps(hf_config))
    cls = getattr(transformers, hf_config["architectures"][0])
    model, info = cls.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def whole(parts: list[weights.Part]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in weights.gather(parts, weights.placements(parts))}


def saved(model, rules: list[Rule], folder: Path) -> Ours:
    """Our tensors of what the Hugging Face model writes; transformers 5 has a layout of its own for experts."""
    model.save_pretrained(folder)
    written = InMemory(load_file(folder / "model.safetensors"))
    return Ours(as_in_file(rules, written), written)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_gradients_and_weights_equal_hugging_face(variant: str, tmp_path: Path) -> None:
    name, config = VARIANTS[variant]
    tiny, rules = family(name, "tiny"), family(name, "mapping").rules(config)
    batch = collate(tiny.samples(config, 6, torch.Generator().manual_seed(0)))
    with one_rank(config):
        model, parts = build(name, config, one_process(config))
        ours = whole(parts)
        theirs = to_hugging_face(name, config, ours, tmp_path)

        logits = model(batch)[..., : config.vocab_size]
        expected = theirs(**tiny.hf_inputs(config, batch)).logits
        visible = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        assert (logits - expected)[visible].abs().max() <= 1e-4
        assert torch.equal(logits.argmax(-1)[visible], expected.argmax(-1)[visible])

        mask = batch.labels != IGNORE_INDEX
        loss = model(batch, batch.labels)[mask].mean()
        expected_loss = torch.nn.functional.cross_entropy(expected[mask], batch.labels[mask])
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        loss.backward()
        expected_loss.backward()

        back = saved(theirs, rules, tmp_path / "again")
        assert all(torch.equal(back.read(key), ours[key]) for key in ours)

        for parameter in theirs.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = saved(theirs, rules, tmp_path / "gradients")
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, gradient in whole(weights.parts(model, config.vocab_size)).items():
            wanted = gradients.read(key)
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), key
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


LAYOUTS = {
    name: (world_size, ParallelConfig(**settings))
    for name, world_size, settings in [
        ("ddp", 2, {}),
        ("tp2", 2, dict(tensor_model_parallel_size=2)),
        ("tp2_sp", 2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        ("pp2", 2, dict(pipeline_model_parallel_size=2)),
        ("pp2_empty_first", 2, dict(pipeline_model_parallel_size=2, first_pipeline_num_layers=0)),
        ("pp2_vpp2", 2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
        ("fsdp", 2, dict(fsdp=True)),
        ("fsdp_grad", 2, dict(fsdp=True, fsdp_sharding_strategy="grad")),
        ("hsdp", 4, dict(fsdp=True, fsdp_sharding_strategy="hybrid")),
        ("fsdp_tp2", 4, dict(fsdp=True, tensor_model_parallel_size=2)),
        ("fsdp_tp2_sp", 4, dict(fsdp=True, tensor_model_parallel_size=2, sequence_parallel=True)),
        ("tp2_pp2", 4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
        (
            "tp2_pp2_vpp2",
            4,
            dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        ),
        ("tp4", 4, dict(tensor_model_parallel_size=4, sequence_parallel=True)),  # more ranks than query groups
        ("pp4", 4, dict(pipeline_model_parallel_size=4)),
        (
            "tp2_sp_pp2",
            4,
            dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
        ),
        ("cp2", 2, dict(context_parallel_size=2)),
        (
            "tp2_sp_cp2",
            4,
            dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
        ),
        ("tp2_dp2", 4, dict(tensor_model_parallel_size=2)),
        ("pp2_dp2", 4, dict(pipeline_model_parallel_size=2)),
    ]
}


EXPERT_LAYOUTS = {
    name: (world_size, ParallelConfig(**settings))
    for name, world_size, settings in [
        ("ep2", 2, dict(expert_model_parallel_size=2)),
        ("etp2", 2, dict(expert_tensor_parallel_size=2)),
        (
            "tp2_ep2",
            2,
            dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
        ),
        ("pp2_ep2", 4, dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2)),
        ("cp2_ep2", 2, dict(context_parallel_size=2, expert_model_parallel_size=2)),
    ]
}
# FSDP's strategies and further copies know no models; with experts, tensor parallelism is sequence-parallel anyway.
OF_ONE_FAMILY = {"fsdp_grad", "hsdp"}
LIKE_OTHERS = {"tp2", "fsdp_tp2", "tp2_pp2", "pp2_dp2"}
EVERY_LAYOUT = [
    (name, layout)
    for name in FAMILIES
    for layout in (EXPERT_LAYOUTS | LAYOUTS if TINY[name].num_moe_experts else LAYOUTS)
    if not (TINY[name].num_moe_experts and layout in LIKE_OTHERS or name != "llava" and layout in OF_ONE_FAMILY)
]


def make_layout(run: RunConfig, world_size: int) -> Layout:
    return resolve(replace(run, trainer=replace(run.trainer, devices=world_size)), 0, {})


def sharded(run: RunConfig, layout: str, micro_batch_size: int = 1) -> tuple[RunConfig, Layout]:
    """The run under one of LAYOUTS, or EXPERT_LAYOUTS."""
    world_size, parallel = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run = replace(run, parallel=parallel, step=replace(run.step, micro_batch_size=micro_batch_size))
    return run, make_layout(run, world_size)


def micro_batches(layout: Layout, samples: list[Sample]):
    """This rank's share of a global batch."""
    first, size = groups.data_parallel_rank() * layout.samples_per_rank, layout.micro_batch_size
    mine = samples[first : first + layout.samples_per_rank]
    pad = layout.tensor if layout.sequence_parallel else 1
    return [collate(mine[i : i + size], pad) for i in range(0, len(mine), size)]


def samples_of_step(run: RunConfig, number: int) -> list[Sample]:
    """A global batch; of the second, half are text alone, the others have a view, in the Qwens a video: ranks and
    micro-batches see none, or videos alone.
    """
    size, make = run.step.global_batch_size, family(run.family, "tiny").samples
    if number != 1:
        return make(run.model, size, torch.Generator().manual_seed(number))
    found = sorted(
        make(run.model, 2 * size, torch.Generator().manual_seed(number)), key=lambda sample: len(sample.images)
    )[:size]
    views = [len(sample.images) for sample in found]
    assert not run.model.reads_media or views == [0] * (size // 2) + [1] * (size // 2)
    assert "qwen" not in run.family or all(time > 1 for sample in found for time, _, _ in sample.images.grids)
    return found


def steps_of(engine: Engine, run: RunConfig, layout: Layout, first: int = 0, count: int = NUM_STEPS):
    """Loss, gradient norm and tokens of steps on fixed batches."""
    results = []
    for number in range(first, first + count):
        results.append(engine.step(micro_batches(layout, samples_of_step(run, number)), lr=run.optim.lr))
    return [(result.loss, result.grad_norm, result.counts[0]) for result in results]


def train(run: RunConfig, layout: Layout):
    """Losses and gradient norms of a few steps, and the whole weights after them (on rank 0)."""
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    results = steps_of(engine, run, layout)
    final = whole(engine.parts())
    groups.shut_down()
    return results, final


def single(run: RunConfig):
    return run_ranks(train, 1, run, make_layout(run, 1))[0]


def train_all(runs: list[tuple[RunConfig, Layout]]):
    return [train(*run) for run in runs]


def on_ranks(runs: dict[str, tuple[RunConfig, Layout]]) -> dict[str, list]:
    """What each rank returned of each run: those of as many ranks are trained one after another, in one start."""
    found = {}
    for world_size in {where.world_size for _, where in runs.values()}:
        names = [name for name, (_, where) in runs.items() if where.world_size == world_size]
        results = run_ranks(train_all, world_size, [runs[name] for name in names])
        found |= dict(zip(names, zip(*results, strict=True), strict=True))
    return found


def assert_same_run(got, expected, loss: float = 1e-5, norm: float = 1e-4) -> None:
    for (a_loss, a_norm, a_tokens), (b_loss, b_norm, b_tokens) in zip(got, expected, strict=True):
        assert a_loss == pytest.approx(b_loss, rel=loss)
        assert a_norm == pytest.approx(b_norm, rel=norm)
        assert a_tokens == b_tokens


def assert_same_weights(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """After steps of 1e-2: Adam turns rounding of near-zero gradients into parts of a step."""
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture(scope="module")
def reference():
    known = {}

    def get(variant: str):
        if variant not in known:
            known[variant] = single(run_of(*VARIANTS[variant]))
        return known[variant]

    return get


def in_micro_batches(name: str, layout: str) -> tuple[RunConfig, Layout]:
    """So many that each rank has some to add up."""
    run, where = sharded(run_of(name, TINY[name]), layout)
    return sharded(run, layout, 2 if where.pipeline > 1 else where.samples_per_rank // 2)


@pytest.fixture(scope="module")
def everywhere():
    """A family in every layout of its own."""
    layouts = {name: [layout for its, layout in EVERY_LAYOUT if its == name] for name in FAMILIES}
    return functools.cache(lambda name: on_ranks({layout: in_micro_batches(name, layout) for layout in layouts[name]}))


@pytest.mark.parametrize(("name", "layout"), EVERY_LAYOUT)
def test_every_layout_trains_as_one_process(name: str, layout: str, everywhere, reference) -> None:
    results = everywhere(name)[layout]
    expected, expected_weights = reference(name)
    for steps, _ in results:  # every rank reports the same
        assert_same_run(steps, expected)
    assert_same_weights(results[0][1], expected_weights)


ODD = [
    *product(["llava_odd", "qwen2_vl_odd", "gpt_tied"], ["tp2", "pp2", "tp2_sp", "fsdp", "fsdp_tp2"]),
    *product(["gpt_biased"], ["tp2", "pp2", "tp2_sp"]),
    *product(["qwen3_vl_odd"], ["tp2_sp", "pp2"]),
]


@pytest.fixture(scope="module")
def oddly():
    return on_ranks({key: sharded(run_of(*VARIANTS[key[0]]), key[1], micro_batch_size=2) for key in ODD})


@pytest.mark.parametrize(("variant", "layout"), ODD)
def test_odd_shapes_train_as_one_process(variant: str, layout: str, oddly, reference) -> None:
    assert_same_run(oddly[variant, layout][0][0], reference(variant)[0])


def recomputed(run: RunConfig, granularity: str, method: str | None = None, layers: int | None = None) -> RunConfig:
    settings = dict(activations_checkpoint_method=method, activations_checkpoint_num_layers=layers)
    return replace(run, step=replace(run.step, activations_checkpoint_granularity=granularity, **settings))


def two_steps(cases: list[tuple[RunConfig, Layout]]):
    """Of each: losses, gradient norms and tokens; the tokens that each expert of each layer got in the second."""
    found = []
    for run, layout in cases:
        groups.initialize(layout, seed=1)
        engine = make_engine(run, layout, build_all(run, layout)[0])
        shares = [micro_batches(layout, samples_of_step(run, number)) for number in range(2)]
        results = [engine.step(share, lr=run.optim.lr) for share in shares]
        numbers = [(result.loss, result.grad_norm, result.counts[0]) for result in results]
        found.append((numbers, results[-1].experts.tokens))
        groups.shut_down()
    return found


def test_deepstack_and_experts_are_recomputed() -> None:
    """Features are inputs of what is recomputed, where a run of layers takes one of them, all, or what others left."""
    run = run_of("qwen3_vl", TINY["qwen3_vl"])
    cases = [
        recomputed(sharded(run, layout)[0], *how)
        for layout, how in [
            ("ddp", ("full", "uniform", 4)),
            ("pp2", ("full", "uniform", 2)),
            ("pp2_vpp2", ("full", "uniform", 1)),
            ("fsdp", ("full", "block", 1)),
            ("tp2_ep2", ("full", "block", 2)),
            ("cp2_ep2", ("selective",)),
        ]
    ]
    ((expected, loads),) = run_ranks(two_steps, 1, [(run, make_layout(run, 1))])[0]
    for results, found in run_ranks(two_steps, 2, [(case, make_layout(case, 2)) for case in cases])[0]:
        assert_same_run(results, expected)
        assert torch.equal(found, loads)


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_equal_torch_adamw(name: str) -> None:
    """One process against torch's own parts: cross entropy over the global batch, clipping, AdamW with weight decay."""
    config, optim = TINY[name], OptimConfig(lr=1e-2, weight_decay=0.3, betas=(0.9, 0.95))
    run = run_of(name, config, optim=optim)
    steps, trained = single(run)
    with one_rank(config):
        model, _ = build(name, config, one_process(config))
        kinds = [
            [p for p in model.parameters() if p.requires_grad and (p.dim() > 1) == decays] for decays in (True, False)
        ]
        groups_of_theirs = [{"params": kinds[0], "weight_decay": 0.3}, {"params": kinds[1], "weight_decay": 0.0}]
        theirs = torch.optim.AdamW(groups_of_theirs, lr=1e-2, betas=(0.9, 0.95), eps=optim.eps)
        for number, (loss, norm, _) in enumerate(steps):
            batch = collate(samples_of_step(run, number))
            logits = model(batch)[..., : config.vocab_size]
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            theirs.zero_grad()
            expected.backward()
            expected_norm = torch.nn.utils.clip_grad_norm_(kinds[0] + kinds[1], 1.0)
            assert number or expected_norm > 1.0  # clipping is at work
            assert (loss, norm) == (
                pytest.approx(expected.item(), rel=1e-5),
                pytest.approx(expected_norm.item(), rel=1e-4),
            )
            theirs.step()
        assert_same_weights(trained, whole(weights.parts(model, config.vocab_size)))


def test_identity_needs_equal_widths() -> None:
    config = projector("identity", TINY["llava"])
    with pytest.raises(ConfigError, match="widths differ, 40 and 48"), one_rank(config):
        build("llava", config, one_process(config))


def test_deepstack_has_its_limits() -> None:
    tiny, vision = TINY["qwen3_vl"], TINY["qwen3_vl"].mm_cfg.vision_encoder
    nine = replace(vision, num_layers=9, deepstack_visual_indexes=tuple(range(9)))
    with pytest.raises(ConfigError, match=r"deepstack_visual_indexes=\[0, .*8\]: must be 8 layers at most"):
        replace(tiny, num_layers=9, mm_cfg=replace(tiny.mm_cfg, vision_encoder=nine))
    with pytest.raises(ConfigError, match=r"model.num_layers=2: must be 3 or more"):
        replace(tiny, num_layers=2)


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp1x_gelu", "mlp3x_gelu", "mlp4x_gelu"])
def test_projectors_train_split_as_whole(kind: str) -> None:
    config = projector(kind, TINY["llava"])
    if kind == "identity":
        vision = replace(config.mm_cfg.vision_encoder, hidden_size=config.hidden_size)
        config = replace(config, mm_cfg=replace(config.mm_cfg, vision_encoder=vision))
    run, where = sharded(run_of("llava", config), "tp2", micro_batch_size=4)
    assert_same_run(run_ranks(train, 2, run, where)[0][0], single(run_of("llava", config))[0])


def test_an_optimizer_state_held_whole_trains_as_one_process(reference) -> None:
    """Which the others do with a state shared by the data-parallel ranks."""
    optim = OptimConfig(distributed=False, lr=1e-2, eps=1e-6)
    run, where = sharded(run_of("llava", TINY["llava"], optim=optim), "ddp", micro_batch_size=2)
    results, final = run_ranks(train, 2, run, where)[0]
    expected, expected_weights = reference("llava")
    assert_same_run(results, expected)
    assert_same_weights(final, expected_weights)


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_reductions_do_not_depend_on_the_micro_batch(reduction: str) -> None:
    whole_run = run_of("llava", TINY["llava"], step=StepConfig(2, 8, loss_reduction=reduction))
    run, where = sharded(whole_run, "ddp", micro_batch_size=4)
    assert_same_run(run_ranks(train, 2, run, where)[0][0], single(whole_run)[0])


@pytest.mark.parametrize(("name", "layout"), [("llava", "tp2"), ("llava", "fsdp"), ("qwen2_vl", "fsdp")])
def test_bf16_follows_fp32(name: str, layout: str, reference) -> None:
    run, where = sharded(run_of(name, TINY[name], precision="bf16-mixed"), layout, micro_batch_size=2)
    assert_same_run(run_ranks(train, 2, run, where)[0][0], reference(name)[0], loss=2e-2, norm=2e-1)


def angles_of(run: RunConfig, layout: Layout):
    """Dtypes of the input of a layer's attention, and of the rotary angles that reach it."""
    groups.initialize(layout, seed=1)
    (model,), _ = build_all(run, layout)
    seen = set()
    layers = [model.language_model.decoder.layers[0], model.vision_model.layers[0]]
    engine = make_engine(run, layout, [model])

    def look(module, args, kwargs) -> None:
        angles = kwargs["rotary_pos_emb"]
        seen.add((args[0].dtype, None if angles is None else angles.dtype))

    for layer in layers:
        layer.self_attention.register_forward_pre_hook(look, with_kwargs=True)
    steps_of(engine, run, layout, 0, 1)
    groups.shut_down()
    return seen


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_rotary_angles_stay_exact_in_half_precision(name: str, layout: str) -> None:
    """bf16 cannot tell position 257 from 256. LLaVA's tower has none."""
    run, where = sharded(run_of(name, TINY[name], precision="bf16-mixed"), layout)
    angles = {torch.float32} | ({None} if name == "llava" else set())
    assert run_ranks(angles_of, 2, run, where)[0] == {(torch.bfloat16, dtype) for dtype in angles}
