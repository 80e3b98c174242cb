"""Packed batches and views of any size: every sample and view as if it were alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from distributed import run_ranks
from test_families import (
    TINY,
    assert_same_run,
    assert_same_weights,
    build,
    build_all,
    make_layout,
    one_rank,
    run_of,
    sharded,
    siglip,
    single,
    whole,
)
from test_families import (
    train as train_batches,
)

from nemo_vlm.batch import IGNORE_INDEX, Images, Sample, collate, empty_sample, pack
from nemo_vlm.config import LanguageConfig, RunConfig, StepConfig
from nemo_vlm.formats.reader import InMemory
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mapping import Theirs
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.models.base import FAMILIES, family
from nemo_vlm.models.images import patchify
from nemo_vlm.models.llava.config import Config as LlavaConfig
from nemo_vlm.models.llava.mapping import vision_rules
from nemo_vlm.models.projector import fuse_neighbours
from nemo_vlm.training.build import make_engine

SIZES = ((32, 32), (24, 40), (8, 8), (16, 33))  # of views, in pixels: the tower's own first, a rest last


def samples_of(name: str, config: LanguageConfig, count: int, seed: int = 0) -> list[Sample]:
    """Of LLaVA, with views of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    made = family(name, "tiny").samples(config, count, generator)
    if not isinstance(config, LlavaConfig):
        return made
    return [resized(sample, config, number, generator) for number, sample in enumerate(made)]


def resized(sample: Sample, config: LlavaConfig, number: int, generator: torch.Generator) -> Sample:
    """The sample's images in other sizes, with as many placeholders as these have patches."""
    placeholder = config.mm_cfg.image_token_index
    if not len(sample.images):
        return sample
    views = [torch.randn(3, *SIZES[(number + i) % 4], generator=generator) for i in range(len(sample.images))]
    images = patchify(views, config.mm_cfg.vision_encoder.patch_dim)
    text = sample.tokens != placeholder
    at = int((~text).nonzero()[0])
    count = len(images.pixel_values)
    kept = torch.where(text, sample.labels, IGNORE_INDEX)[text]
    return Sample(
        torch.cat([sample.tokens[:at], torch.full((count,), placeholder), sample.tokens[text][at:]]),
        torch.cat([kept[:at], torch.full((count,), IGNORE_INDEX), kept[at:]]),
        images,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pack_is_its_samples_one_by_one(name: str) -> None:
    config = TINY[name]
    samples = [*samples_of(name, config, 5), empty_sample()]
    with one_rank(config):
        model, _ = build(name, config, one_process(config))
        found = []
        for batches in ([pack(samples, 8)], [collate([sample]) for sample in samples], [collate(samples)]):
            model.zero_grad()
            for batch in batches:
                (model(batch, batch.labels) * (batch.labels != IGNORE_INDEX)).sum().backward()
            total = sum(float((model(b, b.labels) * (b.labels != IGNORE_INDEX)).sum()) for b in batches)
            found.append((total, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for total, gradients in found[1:]:
        assert found[0][0] == pytest.approx(total, rel=1e-5)
        for gradient, expected in zip(found[0][1], gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def train(run: RunConfig, layout: Layout, packed: bool):
    """Steps on packs, or on batches of the same samples."""
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    pad, results = layout.tensor if layout.sequence_parallel else 1, []
    for number in range(3):
        samples = samples_of(run.family, run.model, run.step.global_batch_size, seed=number)
        first, count = groups.data_parallel_rank() * layout.samples_per_rank, layout.samples_per_rank
        mine = samples[first : first + count]
        borders = [0, 1, count] if packed else range(0, count + 1, layout.micro_batch_size)
        shares = [mine[start:end] for start, end in zip(borders[:-1], borders[1:], strict=True)]
        result = engine.step([(pack if packed else collate)(share, pad) for share in shares], lr=1e-2)
        results.append((result.loss, result.grad_norm, result.counts[0]))
    final = whole(engine.parts())
    groups.shut_down()
    return results, final


PACKED = [
    *(("llava", layout) for layout in ("tp2_sp", "pp2", "pp2_vpp2", "fsdp", "ddp", "tp2_sp_cp2")),
    *(("qwen2_vl", layout) for layout in ("pp2_vpp2", "tp2_sp_cp2")),
    *(("qwen3_vl", layout) for layout in ("pp2_vpp2", "tp2_sp_cp2", "ep2")),
]


@cache
def in_batches(name: str):
    """By one process."""
    run = run_of(name, TINY[name])
    return run_ranks(train, 1, run, make_layout(run, 1), False)[0]


@pytest.mark.parametrize(("name", "layout"), PACKED)
def test_packs_train_as_batches_in_one_process(name: str, layout: str) -> None:
    expected, weights = in_batches(name)
    run, where = sharded(run_of(name, TINY[name]), layout)
    results, final = run_ranks(train, where.world_size, run, where, True)[0]
    assert_same_run(results, expected)
    assert_same_weights(final, weights)


def test_the_mean_over_samples_knows_packs() -> None:
    run = run_of("llava", TINY["llava"], step=StepConfig(2, 8, loss_reduction="sample"))
    (expected, _), (got, _) = (run_ranks(train, 1, run, make_layout(run, 1), packed)[0] for packed in (False, True))
    assert_same_run(got, expected)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_views_of_any_size_equal_hugging_face(name: str) -> None:
    """transformers' interpolate_pos_encoding, view by view, against all of them in one packed pass."""
    config = TINY["llava"] if name == "clip" else siglip(TINY["llava"])
    vision = replace(config.mm_cfg.vision_encoder, image_size=32, use_head=False)
    config = replace(config, mm_cfg=replace(config.mm_cfg, vision_encoder=vision))
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(3, *size, generator=generator) for size in SIZES]
    with one_rank(config):
        model, parts = build("llava", config, one_process(config))
        ours = {key: value for key, value in whole(parts).items() if key.startswith("vision_model.")}
        found = model.vision_model(patchify(views, vision.patch_dim)).detach()
    theirs = Theirs(vision_rules(vision, "vision_model.", ""), InMemory(ours))
    tower = tower_of(name, vision)
    tower.load_state_dict({key: theirs.read(key) for key in theirs.names()})
    expected = []
    for view in views:
        states = tower(view[None], interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        expected.append(states[vision.vision_select_layer][0, vision.class_token_length :])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_frames_of_any_size_equal_one_by_one(name: str) -> None:
    """Images and a video in one packed pass, as a batch where all are of one size, and frame by frame."""
    config = TINY[name]
    vision, generator = config.mm_cfg.vision_encoder, torch.Generator().manual_seed(0)
    with one_rank(config):
        model, _ = build(name, config, one_process(config))
        for grids in ([(1, 4, 6), (3, 2, 4), (1, 2, 2)], [(2, 4, 2), (1, 4, 2)]):
            pixels = torch.randn(sum(map(math.prod, grids)), vision.patch_values, generator=generator)
            frames = [(1, height, width) for time, height, width in grids for _ in range(time)]
            parts = pixels.split([math.prod(frame) for frame in frames])
            expected = [
                model.encode(Images(part, torch.tensor([frame]))) for part, frame in zip(parts, frames, strict=True)
            ]
            found = model.encode(Images(pixels, torch.tensor(grids)))
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
            assert (found[0] - found[1]).abs().max() > 1e-3


def tower_of(name: str, vision) -> torch.nn.Module:
    prefix = {"clip": "CLIP", "siglip": "Siglip"}[name]
    config = getattr(transformers, f"{prefix}VisionConfig")(
        image_size=vision.image_size,
        patch_size=vision.patch_dim,
        num_hidden_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        hidden_act=vision.activation,
        **({"vision_use_head": False} if name == "siglip" else {}),
    )
    return getattr(transformers, f"{prefix}VisionModel")._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 4), (4, 3), (3, 3), (1, 1)])
def test_neighbours_are_fused_as_in_vila(rows: int, columns: int) -> None:
    """Against a count by hand: block (i, j) holds patches (2i, 2j), (2i, 2j + 1), (2i + 1, 2j), (2i + 1, 2j + 1)."""
    features = torch.arange(rows * columns * 2.0).view(-1, 2) + 1
    (fused,) = fuse_neighbours(features, [(1, rows, columns)]).split(-(-rows // 2) * -(-columns // 2))
    number = 0
    for j in range(-(-columns // 2)):  # column by column
        for i in range(-(-rows // 2)):
            places = [(2 * i + di, 2 * j + dj) for di in (0, 1) for dj in (0, 1)]
            inside = [features[r * columns + c] if r < rows and c < columns else torch.zeros(2) for r, c in places]
            assert torch.equal(fused[number], torch.cat(inside))
            number += 1


@pytest.mark.parametrize(("name", "block"), [("llava", (1, 1, 1)), ("qwen2_vl", (1, 2, 2)), ("qwen3_vl", (1, 2, 2))])
def test_no_image_runs_the_tower_on_a_single_patch_or_block(name: str, block: tuple[int, int, int]) -> None:
    config = TINY[name]
    with one_rank(config):
        model, _ = build(name, config, one_process(config))
        seen: list[Images] = []
        model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        batch = collate([empty_sample()])
        model(batch, batch.labels)
        model(batch, cache=Cache(batch.lengths, 8, torch.device("cpu")))  # where no other rank has to be met
    assert [images.grids for images in seen] == [[block]]


def test_downsampling_trains_split_as_whole() -> None:
    config = TINY["llava"]
    config = replace(config, mm_cfg=replace(config.mm_cfg, mm_mlp_adapter_type="mlp_downsample"))
    run, where = sharded(run_of("llava", config), "tp2_sp", micro_batch_size=4)
    assert_same_run(run_ranks(train_batches, 2, run, where)[0][0], single(run_of("llava", config))[0])
