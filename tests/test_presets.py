"""Full-size presets without weights: the hub's numbers, transformers' tensors, and ours under every layout.

Every stage of every layout is built on the meta device, with its first or its last tensor-parallel rank, in turn. That
the parts of all ranks tile each tensor is proven with one layer of each kind, and carried over to all others, whose
parts must be the same.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
import transformers
from test_conf import layout, run_of

from nemo_vlm.config import RunConfig
from nemo_vlm.formats.reader import InMemory
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups, weights
from nemo_vlm.mcore.ranks import first_replica
from nemo_vlm.mcore.weights import Bounds
from nemo_vlm.models.base import family
from nemo_vlm.models.build import build_chunks
from nemo_vlm.sources.huggingface import as_in_file, canonical
from nemo_vlm.sources.starting import TRAINING
from nemo_vlm.typed import plain

TENSOR, PIPELINE = (1, 2, 4, 8), (1, 2, 4)
Boxes = dict[str, list[Bounds]]  # by tensor, the parts of it that a rank holds


def llama(width: int, ffn: int, heads: int, layers: int, **other: Any) -> dict[str, Any]:
    """config.json of meta-llama/Llama-2-7b-hf, with what differs in others."""
    return {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    } | other


def qwen(width: int, ffn: int, heads: int, layers: int, **other: Any) -> dict[str, Any]:
    """config.json of Qwen/Qwen2.5-7B, with what differs in others."""
    alike = {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6}
    return llama(width, ffn, heads, layers, **alike | {"rope_theta": 1000000.0, "model_type": "qwen2"} | other)


def qwen3(width: int, ffn: int, heads: int, layers: int, **other: Any) -> dict[str, Any]:
    """config.json of Qwen/Qwen3-8B, with what differs in others."""
    alike = {"num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
    return qwen(width, ffn, heads, layers, **alike | {"model_type": "qwen3", "attention_bias": False} | other)


def qwen2_vl(width: int, ffn: int, heads: int, layers: int, **other: Any) -> dict[str, Any]:
    """config.json of Qwen/Qwen2-VL-7B-Instruct, with what differs in others."""
    alike = {"max_position_embeddings": 32768, "model_type": "qwen2_vl_text"}
    return qwen(width, ffn, heads, layers, **alike | other)


def qwen3_vl(width: int, ffn: int, heads: int, layers: int, **other: Any) -> dict[str, Any]:
    """config.json of Qwen/Qwen3-VL-8B-Instruct, with what differs in others."""
    alike = {"max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "rope_theta": 5000000.0}
    return qwen3(width, ffn, heads, layers, **alike | other)


def qwen3_vl_moe(width: int, ffn: int, heads: int, layers: int, expert: int) -> dict[str, Any]:
    """config.json of Qwen/Qwen3-VL-30B-A3B-Instruct; `expert` is the width inside one."""
    experts = {"num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert}
    alike = {"model_type": "qwen3_vl_moe_text", "num_key_value_heads": 4, "router_aux_loss_coef": 0.001}
    return qwen3_vl(width, ffn, heads, layers, **alike | experts)


QWEN_SMALL = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
QWEN_LARGE = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}
LLAMA3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
# As on the hub: meta-llama/Llama-2-*-hf, lmsys/vicuna-*-v1.5, meta-llama/Meta-Llama-3-*, llava-hf/llava-1.5-*-hf,
# xtuner/llava-llama-3-8b-v1_1-transformers, Qwen/Qwen2.5-*, Qwen/Qwen3-*, Qwen/Qwen2-VL-*-Instruct,
# Qwen/Qwen3-VL-*-Instruct.
HUB = {
    "llama2_7b": llama(4096, 11008, 32, 32),
    "llama2_13b": llama(5120, 13824, 40, 40),
    "llama2_70b": llama(8192, 28672, 64, 80, num_key_value_heads=8),
    "vicuna_7b": llama(4096, 11008, 32, 32),
    "vicuna_13b": llama(5120, 13824, 40, 40),
    "llama3_8b": llama(4096, 14336, 32, 32, **LLAMA3),
    "llama3_70b": llama(8192, 28672, 64, 80, **LLAMA3),
    "llava_7b": llama(4096, 11008, 32, 32, vocab_size=32064),
    "llava_13b": llama(5120, 13824, 40, 40, vocab_size=32064),
    "llava_llama3_8b": llama(4096, 14336, 32, 32, **LLAMA3 | {"vocab_size": 128320}),
    "qwen2_5_0_5b": qwen(896, 4864, 14, 24, **QWEN_SMALL | {"max_position_embeddings": 32768}),
    "qwen2_5_1_5b": qwen(1536, 8960, 12, 28, **QWEN_SMALL),
    "qwen2_5_3b": qwen(2048, 11008, 16, 36, **QWEN_SMALL | {"max_position_embeddings": 32768}),
    "qwen2_5_7b": qwen(3584, 18944, 28, 28),
    "qwen2_5_14b": qwen(5120, 13824, 40, 48, **QWEN_LARGE),
    "qwen2_5_32b": qwen(5120, 27648, 40, 64, **QWEN_LARGE),
    "qwen2_5_72b": qwen(8192, 29568, 64, 80, **QWEN_LARGE),
    "qwen3_0_6b": qwen3(1024, 3072, 16, 28, tie_word_embeddings=True),
    "qwen3_1_7b": qwen3(2048, 6144, 16, 28, tie_word_embeddings=True),
    "qwen3_4b": qwen3(2560, 9728, 32, 36, tie_word_embeddings=True),
    "qwen3_8b": qwen3(4096, 12288, 32, 36),
    "qwen3_14b": qwen3(5120, 17408, 40, 40),
    "qwen3_32b": qwen3(5120, 25600, 64, 64),
    "qwen2_vl_2b": qwen2_vl(1536, 8960, 12, 28, **QWEN_SMALL),
    "qwen2_vl_7b": qwen2_vl(3584, 18944, 28, 28),
    "qwen2_vl_72b": qwen2_vl(8192, 29568, 64, 80, num_key_value_heads=8),
    "qwen3_vl_2b": qwen3_vl(2048, 6144, 16, 28, tie_word_embeddings=True),
    "qwen3_vl_4b": qwen3_vl(2560, 9728, 32, 36, tie_word_embeddings=True),
    "qwen3_vl_8b": qwen3_vl(4096, 12288, 32, 36),
    "qwen3_vl_32b": qwen3_vl(5120, 25600, 64, 64),
    "qwen3_vl_30b_a3b": qwen3_vl_moe(2048, 6144, 32, 48, 768),
    "qwen3_vl_235b_a22b": qwen3_vl_moe(4096, 12288, 64, 94, 1536),
}
CLIP = {  # openai/clip-vit-large-patch14-336
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
VISION = {  # Qwen/Qwen2-VL-*-Instruct
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_act": "quick_gelu",
}
VISION3 = {  # Qwen/Qwen3-VL-*-Instruct from 8B on
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
VISION3_SMALL = VISION3 | {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
QWEN_VL_TOKENS = {
    "image_token_index": 151655,
    "video_token_index": 151656,
    "vision_start_token_index": 151652,
    "vision_end_token_index": 151653,
}
TOKENS = {  # on the hub
    "llava": {"image_token_index": 32000},
    "qwen2_vl": QWEN_VL_TOKENS,
    "qwen3_vl": QWEN_VL_TOKENS,
}
ALIKE = {"vicuna_7b": "llama2_7b", "vicuna_13b": "llama2_13b"}
PRESETS = [name for name in HUB if name not in ALIKE]
# Of the Qwens one that is tied, one that is not and one with norms of queries and keys are built under layouts.
LANGUAGE_MODELS = ("qwen2_5_0_5b", "qwen2_5_7b", "qwen3_4b")
BUILT = [name for name in PRESETS if "qwen" not in name or name in LANGUAGE_MODELS or name.startswith("qwen2_vl")]
# Tensor- and expert-parallel ranks, and pipelines, that the Qwen3-VLs are built under.
QWEN3_VL = {
    "qwen3_vl_2b": (2, 1, PIPELINE),
    "qwen3_vl_4b": (4, 1, (4,)),
    "qwen3_vl_8b": (8, 1, (2,)),
    "qwen3_vl_32b": (8, 1, (4,)),
    "qwen3_vl_30b_a3b": (4, 4, (4,)),
    "qwen3_vl_235b_a22b": (4, 16, (2,)),
}
LAYOUTS = [
    (name, tensor)
    for name in BUILT
    for tensor in ((8,) if name == "qwen2_vl_72b" else TENSOR)
    if HUB[name]["num_attention_heads"] % tensor == 0
]


@cache
def preset(name: str) -> RunConfig:
    """The run of a preset, with the tokens that a tokenizer would decide."""
    run = run_of(f"model={name}")
    if run.family not in TOKENS:
        return run
    return replace(run, model=replace(run.model, mm_cfg=replace(run.model.mm_cfg, **TOKENS[run.family])))


def their_config(run: RunConfig) -> tuple[type, Any]:
    """The class and the configuration that Hugging Face makes of our config.json."""
    settings = dict(family(run.family, "mapping").hf_config(run.model))
    cls = getattr(transformers, settings.pop("architectures")[0])
    return cls, transformers.AutoConfig.for_model(**settings)


@pytest.mark.parametrize("name", HUB)
def test_numbers_are_the_hubs(name: str) -> None:
    config = their_config(preset(name))[1].to_dict()
    text = config.get("text_config", config)
    rope = text["rope_parameters"]
    assert rope["rope_type"] == "default"
    found = config | text | {"rope_theta": rope["rope_theta"]}
    assert {key: found[key] for key in HUB[name]} == HUB[name]
    if "qwen2_vl" in name:
        assert {key: config["vision_config"][key] for key in VISION} == VISION
        assert rope["mrope_section"] == [16, 24, 24]
    elif "qwen3_vl" in name:
        vision = VISION3_SMALL if name.endswith(("_2b", "_4b")) else VISION3
        assert {key: config["vision_config"][key] for key in vision} == vision
        assert (rope["mrope_section"], rope["mrope_interleaved"]) == ([24, 20, 20], True)
    elif "vision_config" in config:
        assert {key: config["vision_config"][key] for key in CLIP} == CLIP
        assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")


@pytest.mark.parametrize(("name", "other"), ALIKE.items())
def test_presets_of_the_same_architecture(name: str, other: str) -> None:
    assert preset(name).model == preset(other).model


@pytest.mark.parametrize("name", PRESETS)
def test_tensors_are_transformers(name: str) -> None:
    """Names, in memory and on the hub, shapes, the number of parameters, and the way back from config.json."""
    run = preset(name)
    cls, config = their_config(run)
    with torch.device("meta"):
        model = cls(config)
    mapping = family(run.family, "mapping")
    theirs = canonical(InMemory(dict(model.named_parameters())), mapping.HF_VARIANTS)  # tied ones once
    back = mapping.from_hf(config.to_dict(), theirs.names(), name)
    rules = as_in_file(mapping.rules(back), theirs)  # experts as transformers 5 has them in memory
    assert {name: theirs.shape(name) for name in theirs.names()} == {
        name: shape for rule in rules for name, shape in rule.theirs.items()
    }
    on_hub = {name.replace("vision_tower.", "vision_tower.vision_model.") for name in theirs.names()}
    assert on_hub == {name for rule in mapping.rules(run.model) for name in rule.theirs}
    assert sum(math.prod(rule.shape) for rule in rules) == sum(p.numel() for p in model.parameters())
    assert architecture(plain(back)) == architecture(plain(run.model))


def architecture(tree: dict[str, Any]) -> dict[str, Any]:
    """What config.json can say: not how it is trained, nor how a file calls the tower."""
    kept = {key: value for key, value in tree.items() if key not in TRAINING | {"hf_prefix"}}
    return {key: architecture(value) if isinstance(value, dict) else value for key, value in kept.items()}


def one_layer(run: RunConfig) -> RunConfig:
    """A layer of each kind."""
    model, one = run.model, {}
    if run.family in TOKENS:
        taps = {"deepstack_visual_indexes": (0,)} if model.deepstack_layers else {}
        tower = replace(model.mm_cfg.vision_encoder, num_layers=1, **taps)
        one = {"mm_cfg": replace(model.mm_cfg, vision_encoder=tower)}
    return replace(run, model=replace(model, num_layers=1, **one))


def held(run: RunConfig, where: Layout, stage: int, tensor_rank: int) -> tuple[Boxes, dict[str, tuple[int, ...]]]:
    """The parts of tensors that a rank holds, and the tensors' shapes."""
    with groups.pretend(where, first_replica(where)[stage][tensor_rank]):
        (model,) = build_chunks(run, where)
        places = weights.regions(model, run.model.vocab_size).values()
    regions = [region for found in places for region in found if region.primary]  # tied embeddings once
    boxes: Boxes = {}
    for region in regions:
        boxes.setdefault(region.name, []).append(tuple((s.start, s.stop) for s in region.slices))
    return boxes, {region.name: region.shape for region in regions}


def pipelines(ranks: int, lengths: tuple[int, ...] = PIPELINE) -> list[list[tuple[int, int]]]:
    """Pipelines of these lengths; every stage with the last or the first rank of a copy, a single one with both."""
    ends = (ranks - 1, 0)
    turns = [[(stage, ends[stage % 2]) for stage in range(length)] for length in lengths]
    return turns if ranks == 1 or 1 not in lengths else [[(0, 0)], *turns]


def kind(name: str) -> str:
    """A tensor's name without its layer's number, or its merger's."""
    return re.sub(r"(layers|deepstack)\.\d+\.", r"\1.0.", name)


def disjoint(one: Bounds, other: Bounds) -> bool:
    return any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(one, other, strict=True))


def volume(box: Bounds) -> int:
    return math.prod(stop - start for start, stop in box)


def tiles(boxes: list[Bounds], shape: tuple[int, ...]) -> bool:
    """Whether the boxes, of which ranks may hold the same, are a tensor cut into pieces."""
    pieces = set(boxes)
    inside = all(0 <= start <= stop <= size for box in pieces for (start, stop), size in zip(box, shape, strict=True))
    apart = all(disjoint(one, other) for one, other in combinations(pieces, 2))
    return inside and apart and sum(map(volume, pieces)) == math.prod(shape)


def place(run: RunConfig, tensor: int, expert: int, pipeline: int) -> Layout:
    """As few ranks as hold a copy; an expert is on one of them, where there are expert-parallel ranks."""
    where = layout(run, tensor, pipeline)
    ranks = max(tensor, expert) * pipeline
    return replace(where, expert=expert, expert_tensor=1 if expert > 1 else tensor, ranks_per_node=ranks)


@pytest.mark.parametrize(("name", "tensor"), LAYOUTS)
def test_every_layout_has_the_same_tensors(name: str, tensor: int) -> None:
    check_layouts(preset(name), tensor, 1, PIPELINE)


@pytest.mark.parametrize("name", QWEN3_VL)
def test_layouts_of_qwen3_vl_have_the_same_tensors(name: str) -> None:
    check_layouts(preset(name), *QWEN3_VL[name])


def check_layouts(run: RunConfig, tensor: int, expert: int, lengths: tuple[int, ...]) -> None:
    """Pipelines of these lengths under so many tensor- and expert-parallel ranks."""
    shapes = {rule.ours: rule.shape for rule in family(run.family, "mapping").rules(run.model)}
    small, copy = one_layer(run), max(tensor, expert)
    ranks = [held(small, place(small, tensor, expert, 1), 0, rank)[0] for rank in range(copy)]
    for tensor_name in ranks[0]:
        assert tiles([box for rank in ranks for box in rank[tensor_name]], shapes[tensor_name]), tensor_name
    for places in pipelines(copy, lengths):
        where = place(run, tensor, expert, len(places))
        names = []
        for stage, rank in places:
            boxes, found = held(run, where, stage, rank)
            assert found == {tensor_name: shapes[tensor_name] for tensor_name in boxes}
            assert all(sorted(parts) == sorted(ranks[rank][kind(tensor_name)]) for tensor_name, parts in boxes.items())
            names += boxes
        assert sorted(names) == sorted(shapes)  # each on one stage
