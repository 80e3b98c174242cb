"""M-RoPE: vectors recorded from transformers 4.57.1, a walk by its rule, transformers 5 where it agrees, Megatron's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from test_families import TINY, build, one_rank
from transformers import Qwen2VLConfig, Qwen3VLTextConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs_of
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from nemo_vlm.batch import IGNORE_INDEX, Batch, Images, Sample, collate, empty_sample, pack
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import one_process
from nemo_vlm.mcore.rotary import MultimodalRotary, rotate, turns
from nemo_vlm.models.positions import mrope_positions

TEXT, IMAGE, VIDEO, START, END = 1, 10, 11, 12, 13
MERGE = 2
Grid = tuple[int, int, int]


def sample_of(*parts: int | Grid, apart: bool = False) -> Sample:
    """Text of so many tokens, images and videos (more than one in time); before each frame of one, two more tokens."""
    tokens: list[int] = []
    grids: list[Grid] = []
    for part in parts:
        if isinstance(part, int):
            tokens += [TEXT] * part
            continue
        grids.append(part)
        time, size = part[0], math.prod(part) // MERGE**2
        if apart and time > 1:
            tokens += [TEXT, TEXT, START, *[VIDEO] * (size // time), END] * time
        else:
            tokens += [START, *[VIDEO if time > 1 else IMAGE] * size, END]
    images = Images(torch.zeros(1, 1), torch.tensor(grids)) if grids else Images()
    return Sample(torch.tensor(tokens), torch.full((len(tokens),), IGNORE_INDEX), images)


def walk(tokens: list[int], grids: list[Grid]) -> list[tuple[int, int, int]]:
    """Token by token: what stands behind a view begins at the largest position so far, plus 1."""
    positions: list[tuple[int, int, int]] = []
    views, at = iter(grids), 0
    while at < len(tokens):
        start = max(map(max, positions), default=-1) + 1
        if tokens[at] not in (IMAGE, VIDEO):
            positions.append((start, start, start))
            at += 1
            continue
        time, height, width = next(views)
        block = [
            (start + t, start + h, start + w)
            for t in range(time)
            for h in range(height // MERGE)
            for w in range(width // MERGE)
        ]
        positions += block
        at += len(block)
    return positions


def positions_of(batch: Batch, apart: bool = False) -> torch.Tensor:
    return mrope_positions(batch, (IMAGE, VIDEO), MERGE, apart)


PARTS = {
    "text": (5,),
    "image": (2, (1, 4, 6), 3),
    "images": ((1, 2, 2), 1, (1, 8, 4), (1, 2, 10), 4),
    "long video": (3, (9, 4, 6), 5),  # longer than its 2 rows and 3 columns
    "video first": ((2, 4, 4), 1, (1, 6, 2), 2),
    "views at the end": (1, (1, 4, 4), (5, 2, 2)),
}
SAMPLES = {name: sample_of(*parts) for name, parts in PARTS.items()} | {"one token": empty_sample()}
APART = {name: sample_of(*parts, apart=True) for name, parts in PARTS.items()} | {"one token": empty_sample()}
# What get_rope_index of 4.57.1 gave for these samples: Qwen2VLModel's, and Qwen3VLModel's for frames that stand apart
RECORDED = {
    apart: json.loads((Path(__file__).parent / f"mrope_{kind}transformers_4_57_1.json").read_text())
    for apart, kind in ((False, ""), (True, "qwen3_vl_"))
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("make", [collate, pack])
def test_positions_equal_a_walk_by_the_rule(make, apart: bool) -> None:
    samples = list((APART if apart else SAMPLES).values())
    batch = make(samples, 8)
    rows, starts = (range(len(samples)), [0] * len(samples)) if make is collate else ([0] * len(samples), None)
    starts = starts or [0, *batch.lengths.cumsum(0).tolist()[:-1]]
    found = positions_of(batch, apart)
    assert found.shape == (3, *batch.tokens.shape)
    for sample, row, start in zip(samples, rows, starts, strict=True):
        grids = sample.images.grids
        frames = [(1, height, width) for time, height, width in grids for _ in range(time)]
        expected = walk(sample.tokens.tolist(), frames if apart else grids)
        assert list(map(tuple, found[:, row, start : start + len(sample.tokens)].T.tolist())) == expected


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_positions_are_those_of_transformers_4_57(name: str, apart: bool) -> None:
    """A long video is among them."""
    sample = (APART if apart else SAMPLES)[name]
    assert positions_of(collate([sample]), apart)[:, 0].tolist() == RECORDED[apart][name]


def test_positions_equal_transformers_where_no_video_is_long() -> None:
    samples = [SAMPLES[name] for name in ("image", "images", "video first")]
    empty = {"text_config": {"num_hidden_layers": 0}, "vision_config": {"depth": 0, "spatial_merge_size": MERGE}}
    with torch.device("meta"):
        model = Qwen2VLModel(Qwen2VLConfig(**empty))
    for sample in samples:
        grids, tokens = sample.images.image_grid_thw, sample.tokens[None]
        is_video = grids[:, 0] > 1
        theirs, _ = model.get_rope_index(
            tokens,
            (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int(),
            image_grid_thw=grids[~is_video],
            video_grid_thw=grids[is_video],
        )
        assert torch.equal(positions_of(collate([sample])), theirs)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen2_vl", {"mrope_section": (2, 3, 4)}, r"model.mrope_section=\[2, 3, 4\]: must be three numbers, .* 8"),
        ("qwen2_vl", {"mrope_section": (5, 3)}, r"model.mrope_section=\[5, 3\]: must be three numbers"),
        ("qwen2_vl", {"mrope_section": None, "kv_channels": 20}, "model.kv_channels=20: must be a multiple of 16, or"),
        ("qwen3_vl", {"mrope_section": (4, 8, 4)}, r"\[4, 8, 4\]: height and width take turns .* more than a third"),
        ("qwen3_vl", {"mrope_section": None, "kv_channels": 48}, "model.kv_channels=48: must be a multiple of 32, or"),
        ("qwen2_vl", {"rope_scaling_factor": 8.0}, "model.rope_scaling_factor=8.0: must be null"),
        ("gpt", {"mrope_section": (2, 3, 3)}, r"model.mrope_section=\[2, 3, 3\]: must be null"),
    ],
)
def test_sections_that_make_no_head(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY[name], **settings)


def test_sections_follow_from_the_head() -> None:
    assert replace(TINY["qwen2_vl"], mrope_section=None, kv_channels=128).mrope_section == (16, 24, 24)
    assert replace(TINY["qwen3_vl"], mrope_section=None, kv_channels=128).mrope_section == (24, 20, 20)


def test_angles_equal_megatrons() -> None:
    positions = positions_of(collate(list(SAMPLES.values())))
    config = TINY["qwen2_vl"]
    with one_rank(config):
        theirs = MultimodalRotaryEmbedding(128, 1.0, rotary_base=1000000)
        expected = theirs(positions, [16, 24, 24], parallel_state.get_context_parallel_group())
        found = MultimodalRotary(1e6)(positions, [16, 24, 24])
    torch.testing.assert_close(found, turns(expected[..., :64]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sections", [(24, 20, 20), (26, 20, 18), (24, 19, 21)])
def test_interleaved_angles_equal_hugging_faces(sections: tuple[int, int, int]) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=128, rope_parameters=rope))
    positions = positions_of(collate(list(APART.values())), apart=True)
    cosine, sine = theirs(torch.zeros(1), positions)
    found = MultimodalRotary(5e6, interleaved=True)(positions, sections)[:, :, 0].transpose(0, 1)
    sine = torch.cat([-sine[..., :64], sine[..., 64:]], -1)
    torch.testing.assert_close(found, torch.cat([cosine, sine], -1), rtol=0, atol=1e-5)


def test_text_has_the_angles_of_ordinary_rope() -> None:
    with one_rank(TINY["gpt"]):
        model, _ = build("gpt", TINY["gpt"], one_process(TINY["gpt"]))
        expected = model.language_model.rotary_pos_emb((50, None))
    positions = torch.arange(50).expand(3, 1, 50)
    found = MultimodalRotary(TINY["gpt"].rotary_base)(positions, [2, 3, 3])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_heads_and_gradients_turn_as_megatrons() -> None:
    generator = torch.Generator().manual_seed(0)
    heads, gradient = torch.randn(2, 17, 3, 5, 16, generator=generator)
    half = 9 * torch.randn(17, 1, 1, 8, generator=generator)
    heads.requires_grad_()
    found, expected = rotate(heads, turns(half)), _apply_rotary_pos_emb_bshd(heads, torch.cat([half, half], -1))
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(each, heads, gradient)[0] for each in (found, expected)))


def test_half_precision_rotates_as_hugging_face() -> None:
    """Bit by bit: the decoder in bf16, the tower in fp32."""
    config, seen = TINY["qwen2_vl"], []
    with one_rank(config), torch.no_grad():
        model, _ = build("qwen2_vl", config, one_process(config))
        for layers, half in ((model.language_model.decoder.layers, 8), (model.vision_model.layers, 6)):
            attention, generator = layers[0].self_attention.bfloat16(), torch.Generator().manual_seed(0)
            attention.core_attention.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
            hidden = torch.randn(9, 1, attention.config.hidden_size, generator=generator).bfloat16()
            angles = 30 * torch.rand(9, half, generator=generator)
            attention(hidden, None, rotary_pos_emb=turns(angles)[:, None, None])
            assert attention.turns is None
            query, key = (part[:, 0] for part in SelfAttention.get_query_key_value_tensors(attention, hidden)[:2])
            cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
            if half == 8:
                turned = theirs_of.apply_rotary_pos_emb(query, key, cosine.bfloat16(), sine.bfloat16(), -2)
            else:
                turned = theirs_of.apply_rotary_pos_emb_vision(query, key, cosine, sine)
            assert all(torch.equal(ours[:, 0], theirs) for ours, theirs in zip(seen.pop(), turned, strict=True))
