"""Qwen2.5 and Qwen3: the logits of transformers and the training of one process, under every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distributed import run_ranks
from test_families import (
    LAYOUTS,
    TINY,
    VARIANTS,
    assert_same_run,
    build,
    build_all,
    make_layout,
    one_rank,
    qwen2,
    qwen3,
    run_of,
    steps_of,
    to_hugging_face,
    whole,
)

from nemo_vlm.batch import Batch, collate
from nemo_vlm.config import LanguageConfig, ParallelConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import one_process
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.inference import Forward
from nemo_vlm.models.base import family
from nemo_vlm.models.hf_decoder import decoder_config
from nemo_vlm.sources.megatron import from_config_json
from nemo_vlm.training.build import make_engine

MODELS = {
    "qwen2_tied": qwen2(TINY["gpt"]),
    "qwen2": replace(qwen2(TINY["gpt"]), share_embeddings_and_output_weights=False),
    "qwen3": qwen3(TINY["gpt"]),  # heads x head size is not the hidden size
}
PARALLEL = {"single": (1, ParallelConfig())} | LAYOUTS
FOR_ALL = ("single", "tp2", "tp2_sp", "pp2", "cp2", "fsdp", "tp2_pp2")
CASES = [(layout, model) for layout in FOR_ALL for model in MODELS]
# Each tensor-parallel rank has a part of the gradient of the norms of queries and keys; tp4: more ranks than groups.
CASES += [("fsdp_tp2", "qwen3"), ("tp4", "qwen3")]


def batch_of(config: LanguageConfig) -> Batch:
    return collate(family("gpt", "tiny").samples(config, 4, torch.Generator().manual_seed(0)), pad_multiple=4)


def results(cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Of layouts and models: logits of the batch, and loss, gradient norm and tokens of two steps."""
    found = {}
    for layout, model in cases:
        (world_size, parallel), config = PARALLEL[layout], MODELS[model]
        run = replace(run_of("gpt", config), parallel=parallel)
        where = make_layout(run, world_size)
        groups.initialize(where, seed=1)
        engine = make_engine(run, where, build_all(run, where)[0])
        with engine.updater.evaluation():
            logits = Forward(engine.updater.modules, config.vocab_size or 0)(batch_of(config))
        found[layout, model] = logits, steps_of(engine, run, where, count=2)
        groups.shut_down()
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Any]:
    """The results of all cases; those of as many ranks in one start."""
    known = {}
    for size in (1, 2, 4):
        known |= run_ranks(results, size, [case for case in CASES if PARALLEL[case[0]][0] == size])[-1]
    return known


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Logits of transformers with the same weights."""
    found = {}
    for name, config in MODELS.items():
        folder: Path = tmp_path_factory.mktemp(name)
        with one_rank(config):
            _, parts = build("gpt", config, one_process(config))
            model = to_hugging_face("gpt", config, whole(parts), folder)
        kind = "qwen3" if name == "qwen3" else "qwen2"
        assert (model.config.model_type, model.config.tie_word_embeddings) == (kind, name == "qwen2_tied")
        with torch.no_grad():
            found[name] = model(input_ids=batch_of(config).tokens).logits
    return found


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_logits_are_transformers_and_steps_those_of_one_process(layout: str, model: str, found, theirs) -> None:
    logits, steps = found[layout, model]
    batch = batch_of(MODELS[model])
    visible = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    assert (logits - theirs[model])[visible].abs().max() <= 1e-4
    assert theirs[model][visible].std() > 0.1  # else that would say little
    assert_same_run(steps, found["single", model][1])


HUB = {  # config.json of Qwen/Qwen2.5-0.5B, as transformers 4 wrote it
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def described(folder: Path, **changes: Any) -> LanguageConfig:
    (folder / "config.json").write_text(json.dumps(HUB | changes))
    return from_config_json(folder)[1]


def test_config_json_of_the_hub_in_both_forms(tmp_path: Path) -> None:
    config = described(tmp_path)
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)  # as transformers 5 writes it
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    assert from_config_json(tmp_path)[1] == config
    written = decoder_config(config)
    beside = ("bos_token_id", "eos_token_id", "torch_dtype", "transformers_version", "use_mrope", "sliding_window")
    assert {key: written[key] for key in HUB if key not in beside} == {k: v for k, v in HUB.items() if k not in beside}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 12}, "use_sliding_window=True is not supported, only False"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            r"rope_scaling yarn .* is not supported: only default, linear, and Llama 3.1's",
        ),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported, only silu"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True is not supported, only False"),
        ({"model_type": "qwen2_moe"}, "model_type=qwen2_moe is not known here; there are .*qwen2, .*qwen3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_built_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        described(tmp_path, **changes)


def test_what_no_class_of_hugging_face_has_is_not_exported() -> None:
    with pytest.raises(ConfigError, match="model.qk_layernorm=true: Hugging Face's Qwen3 needs model.bias and"):
        decoder_config(replace(MODELS["qwen3"], qkv_bias=True))


@pytest.mark.parametrize("variant", ["llava_qwen2", "llava_qwen3"])
def test_a_llava_of_a_qwen_is_read_as_it_is_written(variant: str, tmp_path: Path) -> None:
    """The rest of it is test_families.py's."""
    config = VARIANTS[variant][1]
    (tmp_path / "config.json").write_text(json.dumps(family("llava", "mapping").hf_config(config)))
    name, found = from_config_json(tmp_path)
    assert (name, found.qkv_bias, found.qk_layernorm) == ("llava", config.qkv_bias, config.qk_layernorm)
    assert family("llava", "mapping").hf_config(found) == family("llava", "mapping").hf_config(config)
