"""Adapters: equal under every layout, alone in checkpoints, merged and exported to the same logits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from distributed import run_ranks
from test_families import (
    TINY,
    assert_same_run,
    build_all,
    make_layout,
    one_rank,
    projector,
    run_of,
    sharded,
    steps_of,
    whole,
)
from tiny_hf import make_llama, make_llava, make_qwen2_vl

from nemo_vlm import checkpoints
from nemo_vlm import layout as layouts
from nemo_vlm.archive import self_contained, write_archive
from nemo_vlm.batch import Batch, collate
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import ExpManagerConfig, LoraConfig, PeftConfig, RunConfig, StartConfig
from nemo_vlm.config.peft import check_given, factors, is_adapter, trains
from nemo_vlm.conversion.convert import Target, to_huggingface
from nemo_vlm.conversion.lora import merge
from nemo_vlm.conversion.peft import export_adapter, language_base
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.inference.restore import build
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.models.build import build_chunks
from nemo_vlm.models.llava.config import LlmConfig
from nemo_vlm.sources.adapters import check_base
from nemo_vlm.sources.opening import open_adapter, open_source
from nemo_vlm.sources.starting import first_weights, settle
from nemo_vlm.training import saving
from nemo_vlm.training.build import build_engine, make_engine
from nemo_vlm.typed import model_tree

ALL = LoraConfig(target_modules=("all",), adapter_dim=6, alpha=12.0)
LORA = PeftConfig("lora", lora_tuning=ALL)
DROPOUT = PeftConfig("lora", lora_tuning=replace(ALL, adapter_dropout=0.3))


def train(run: RunConfig, layout: Layout):
    """Losses and norms, the gradients of the first step as Adam keeps them, all weights before and after."""
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])  # B is drawn too: more to compare than with zeros
    before = whole(engine.parts())
    results = steps_of(engine, run, layout, 0, 1)
    gradients = whole([part for part in engine.optimizer_parts() if ".exp_avg." in part.name])
    results += steps_of(engine, run, layout, 1, 2)
    found = results, gradients, before, whole(engine.parts()), set(whole(engine.kept_parts()))
    groups.shut_down()
    return found


@pytest.fixture(scope="module")
def reference():
    run = replace(run_of("llava", TINY["llava"]), peft=LORA)
    return run_ranks(train, 1, run, make_layout(run, 1))[0]


@pytest.mark.parametrize("layout", ["ddp", "tp2", "tp2_sp", "cp2", "pp2_vpp2", "fsdp", "fsdp_tp2_sp"])
def test_every_layout_trains_the_adapters_as_one_process(layout: str, reference) -> None:
    run, where = sharded(replace(run_of("llava", TINY["llava"]), peft=LORA), layout, micro_batch_size=2)
    results, gradients, before, after, kept = run_ranks(train, where.world_size, run, where)[0]
    assert_same_run(results, reference[0])
    assert gradients.keys() == reference[1].keys()
    for key, value in gradients.items():
        torch.testing.assert_close(value, reference[1][key], rtol=1e-3, atol=2e-7, msg=lambda m, k=key: f"{k}: {m}")
    assert kept == {name for name in after if trains(name, run.model)} == reference[4]
    assert sum(map(is_adapter, kept)) == 2 * 4 * run.model.num_layers and len(kept) > sum(map(is_adapter, kept))
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == kept


def test_full_recomputation_trains_the_adapters_alike(reference) -> None:
    """Layers are recomputed where an input needs a gradient, and the frozen embedding's output would need none."""
    full = dict(granularity="full", method="uniform", num_layers=1)
    run = replace(run_of("llava", TINY["llava"]), peft=LORA)
    step = replace(run.step, **{f"activations_checkpoint_{key}": value for key, value in full.items()})
    run = replace(run, step=step)
    results, gradients, *_ = run_ranks(train, 1, run, make_layout(run, 1))[0]
    assert_same_run(results, reference[0])
    for key, value in gradients.items():
        torch.testing.assert_close(value, reference[1][key], rtol=1e-3, atol=2e-7, msg=lambda m, k=key: f"{k}: {m}")


def masks(run: RunConfig, layouts: list[Layout]) -> list[dict[str, torch.Tensor]]:
    """What dropout leaves of the same input beside a layer split by columns and one split by rows."""
    found = []
    for layout in layouts:
        groups.initialize(layout, seed=1)
        (chunk,) = build_chunks(run, layout)
        modules = {name: module for name, module in chunk.named_modules() if name.endswith("_adapter")}
        names = [f"language_model.decoder.layers.0.self_attention.linear_{kind}_adapter" for kind in ("qkv", "proj")]
        found.append({name[-12:]: modules[name].drop(torch.ones(16, 2, 24)) for name in names})
        groups.shut_down()
    return found


def test_dropout_is_alike_only_where_ranks_hold_the_same_input() -> None:
    run = replace(run_of("gpt", TINY["gpt"]), peft=DROPOUT)
    layouts = [sharded(run, name)[1] for name in ("tp2", "tp2_sp", "cp2", "ddp")]
    alike = [
        {name: torch.equal(mask, other[name]) for name, mask in one.items()}
        for one, other in zip(*run_ranks(masks, 2, run, layouts), strict=True)
    ]
    assert [list(each.values()) for each in alike] == [[True, False], *[[False, False]] * 3]


def with_base(name: str, base: Path, folder: Path, adapters: PeftConfig) -> RunConfig:
    """A run that starts from a directory of Hugging Face."""
    manager = ExpManagerConfig(name="lora", exp_dir=str(folder))
    run = run_of(name, open_source(base, "base").model)
    return replace(run, start=StartConfig(str(base)), peft=adapters, exp_manager=manager)


def save_and_go_on(run: RunConfig, layout: Layout):
    groups.initialize(layout, seed=1)
    engine = build_engine(run, layout)
    steps_of(engine, run, layout, 0, 2)
    saver = saving.Saver(run, layout)
    saver.save(engine, Position(2, 16, metrics={"global_step": 2.0}))
    results = steps_of(engine, run, layout, 2, 2)
    saver.wait()
    groups.shut_down()
    return results


def resume(run: RunConfig, layout: Layout, path: Path):
    groups.initialize(layout, seed=5)
    engine = build_engine(run, layout, first_weights=False)
    saving.load(engine, path, run.exp_manager, layout)
    results = steps_of(engine, run, layout, 2, 2)
    groups.shut_down()
    return results


def test_a_checkpoint_of_adapters_alone_resumes_bit_equal(tmp_path: Path) -> None:
    run, where = sharded(with_base("llava", make_llava(tmp_path / "base"), tmp_path, DROPOUT), "tp2_sp", 4)
    expected = run_ranks(save_and_go_on, 2, run, where)[0]
    (path,) = checkpoints.complete(checkpoints.folder_of(run.exp_manager))
    assert run_ranks(resume, 2, run, where, path)[0] == expected
    with pytest.raises(ConfigError, match="model_path=.*: holds LoRA adapters .*merge_lora.py --base .*/base --ad"):
        open_source(path, "model_path")


HF = {
    "gpt": (make_llama, transformers.LlamaForCausalLM),
    "llava": (make_llava, transformers.LlavaForConditionalGeneration),
    "qwen2_vl": (make_qwen2_vl, transformers.Qwen2VLForConditionalGeneration),
}


@torch.no_grad()
def logits(model: torch.nn.Module, batch: Batch, vocab_size: int) -> torch.Tensor:
    return model(batch)[..., :vocab_size].clone()


@pytest.mark.parametrize("name", HF)
def test_adapters_merged_and_exported_give_the_same_logits(name: str, tmp_path: Path) -> None:
    make, hf_class = HF[name]
    base = make(tmp_path / "base")
    run = with_base(name, base, tmp_path, LORA)
    config, tiny, layout = run.model, family(name, "tiny"), one_process(run.model, 4)
    batch = collate(tiny.samples(config, 4, torch.Generator().manual_seed(0)))

    with one_rank(config):
        engine = build_engine(run, layout)
        (model,) = (module.module.model for module in engine.updater.modules)
        first = logits(model, batch, config.vocab_size)
        losses = [engine.step([batch], lr=2e-2).loss for _ in range(20)]
        saver = saving.Saver(run, layout)
        saver.save(engine, Position(20, 80, metrics={"global_step": 20.0}))
        trained = logits(model, batch, config.vocab_size)
        (adapter,) = checkpoints.complete(saver.folder)
        merge([str(base)], str(adapter), tmp_path / "merged.nemo", "auto", verify=True)
        merged = build(open_source(tmp_path / "merged.nemo", "merged"), config, "32", layout)
        torch.testing.assert_close(logits(merged, batch, config.vocab_size), trained, rtol=0, atol=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    assert (trained - first).abs().max() > 1

    import peft  # here: it takes seconds, and every rank imports this module

    export_adapter(str(adapter), tmp_path / "peft", base=None)
    theirs = hf_class.from_pretrained(base, attn_implementation="eager").eval()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    assert theirs.peft_config["default"].base_model_name_or_path == str(base)
    with torch.no_grad():
        exported, mask = theirs(**tiny.hf_inputs(config, batch)).logits, batch.labels >= 0
    torch.testing.assert_close(exported[mask], trained[mask], rtol=0, atol=1e-4)


def write_tensors(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_archive(path, config, {}, specs, tensors.items())
    return path


def adapter_of(run: RunConfig, path: Path) -> Path:
    """Of query, key and value only, and not trained yet: B is 0."""
    tensors = {}
    for rule in family(run.family, "mapping").rules(run.model):
        if rule.ours.endswith("linear_qkv.weight"):
            a, b = factors(rule.ours)
            tensors |= {a: torch.randn(6, rule.shape[1]), b: torch.zeros(rule.shape[0], 6)}
    return write_tensors(path, self_contained(model_tree(run), has_tokenizer=False, has_base=True), tensors)


def test_the_base_is_joined_as_the_run_had_it(tmp_path: Path, caplog) -> None:
    """Two whole models, of which each gives a part; in another order, or by other names, the later has its say."""
    one = make_llava(tmp_path / "one")
    source = open_source(one, "")
    tensors = {name: source.reader.read(name) for name in source.reader.names()}
    tree = self_contained(source.tree, has_tokenizer=False)
    two = write_tensors(tmp_path / "two.nemo", tree, {name: 2 * value for name, value in tensors.items()})
    mm_cfg = replace(
        source.model.mm_cfg,
        llm=LlmConfig(from_pretrained=str(one)),
        vision_encoder=replace(source.model.mm_cfg.vision_encoder, from_pretrained=str(two)),
        pretrain_mm_mlp_adapter=str(two),
        freeze_mm_mlp_adapter=True,
    )
    run = replace(run_of("llava", replace(source.model, mm_cfg=mm_cfg)), peft=LORA)
    adapter = open_adapter(adapter_of(run, tmp_path / "lora.nemo"), "--adapter")
    assert adapter.bases == [str(one), str(two), str(two)]
    with caplog.at_level(logging.INFO):
        merge(adapter.bases, str(adapter), tmp_path / "merged.nemo", "auto", verify=True)
        merge([str(two), str(one)], str(adapter), tmp_path / "by_hand.nemo", "auto", verify=True)
    assert f"the base: language_model from {one}, vision_model from {two}, vision_projection from {two}" in caplog.text
    merged, by_hand = (open_source(tmp_path / name, "").reader for name in ("merged.nemo", "by_hand.nemo"))
    for part, reader in first_weights(run).items():
        for name in reader.names():
            assert torch.equal(merged.read(name), reader.read(name)), name
            assert torch.equal(merged.read(name), tensors[name] * (1 if part == "language_model" else 2)), name
    assert all(torch.equal(by_hand.read(name), value) for name, value in tensors.items())
    assert language_base(adapter) == str(one)
    assert language_base(replace(adapter, tree=adapter.tree | {"restore_from_path": str(two)})) == str(two)


def test_a_projector_that_hugging_face_has_not_is_merged(tmp_path: Path) -> None:
    config = projector("mlp_downsample", TINY["llava"])
    with one_rank(config):
        tensors = whole(build_all(run_of("llava", config), one_process(config))[1])
    run = run_of("llava", config)
    base = write_tensors(tmp_path / "base.nemo", self_contained(model_tree(run), has_tokenizer=False), tensors)
    run = replace(run, start=StartConfig(str(base)), peft=LORA)
    adapter = adapter_of(run, tmp_path / "lora.nemo")
    merge([str(base)], str(adapter), tmp_path / "merged.nemo", "auto", verify=True)
    merged = open_source(tmp_path / "merged.nemo", "").reader
    assert merged.names() == tensors.keys() and "vision_projection.norm.bias" in merged.names()
    assert all(torch.equal(merged.read(name), value) for name, value in tensors.items())
    with pytest.raises(ConfigError, match="adapter_type=mlp_downsample: Hugging Face's LLaVA knows mlp2x_gelu only"):
        export_adapter(str(adapter), tmp_path / "peft", base=None)
    with pytest.raises(ConfigError, match="adapter_type=mlp_downsample: Hugging Face's LLaVA knows mlp2x_gelu only"):
        to_huggingface(open_source(base, ""), Target(tmp_path / "hf"))


def test_parts_beside_adapters() -> None:
    """With all of them frozen the adapters train; to unfreeze one is refused, as is LoRA's shape without LoRA."""
    config = TINY["llava"]
    vision = replace(config.mm_cfg.vision_encoder, freeze=True)
    mm_cfg = replace(config.mm_cfg, llm=LlmConfig(freeze=True), vision_encoder=vision, freeze_mm_mlp_adapter=True)
    frozen = run_of("llava", replace(config, mm_cfg=mm_cfg))
    layouts.check(replace(frozen, peft=LORA))
    with pytest.raises(ConfigError, match="all frozen"):
        layouts.check(frozen)
    tree, key = model_tree(run_of("llava", config)), "model.mm_cfg.vision_encoder.freeze"
    check_given(PeftConfig(), tree, {key})
    check_given(LORA, tree, {"model.restore_from_path"})
    check_given(LORA, model_tree(frozen), {key})
    with pytest.raises(ConfigError, match=f"{key}=false: with model.peft.peft_scheme=lora it stays frozen"):
        check_given(LORA, tree, {key})
    with pytest.raises(ConfigError, match="lora_tuning.adapter_dim=6: must be left out without peft_scheme=lora"):
        PeftConfig(lora_tuning=LoraConfig(adapter_dim=6))


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    run = replace(run_of("llava", TINY["llava"]), peft=LORA)
    with pytest.raises(ConfigError, match="peft_scheme=lora: .* brings those of language_model and vision_model; give"):
        check_base(run)
    with pytest.raises(ConfigError, match="model.peft.restore_from_path=x.nemo: needs model.peft.peft_scheme=lora"):
        PeftConfig(restore_from_path="x.nemo")
    with pytest.raises(ConfigError, match="adapter_dropout=1.0: must be 0 or more, below 1"):
        LoraConfig(adapter_dropout=1.0)

    run = with_base("gpt", make_llama(tmp_path / "base"), tmp_path, LORA)
    with one_rank(run.model):
        layout = one_process(run.model, 4)
        saver = saving.Saver(run, layout)
        saver.save(build_engine(run, layout), Position(1, 4, metrics={"global_step": 1.0}))
    (path,) = checkpoints.complete(saver.folder)
    tree = model_tree(replace(run, peft=PeftConfig("lora", str(path))))
    settled, changed = settle(tree, {"model.restore_from_path"})
    assert (
        settled["peft"]["lora_tuning"]["adapter_dim"] == 6 and "model.peft.lora_tuning.alpha=12.0 (not 32.0)" in changed
    )
    with pytest.raises(ConfigError, match="model.peft.lora_tuning.alpha=32.0: .*step_000001 has 12.0"):
        settle(tree, {"model.peft.lora_tuning.alpha"})
    with pytest.raises(ConfigError, match="adapter of .* is for a layer of shape .*, the base .* has"):
        merge(
            [str(make_llama(tmp_path / "other", intermediate_size=128))], str(path), tmp_path / "m.nemo", "auto", True
        )
