"""Losses, schedules, FLOPs and memory against counts by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nemo_vlm.batch import IGNORE_INDEX, Images, Kept, Sample, collate, pack
from nemo_vlm.config import OptimConfig, SchedConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.base import family
from nemo_vlm.planning.flops import step_flops
from nemo_vlm.training.loss import REDUCTIONS
from nemo_vlm.training.schedules import check, decayed, learning_rate

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 8.0, 16.0], [5.0, 5.0, 5.0]])
LABELS = torch.tensor([[7, IGNORE_INDEX, 7], [IGNORE_INDEX, 7, IGNORE_INDEX], [IGNORE_INDEX] * 3])


@pytest.mark.parametrize(
    ("name", "total", "weight"),
    [("token", 12.0, 3), ("sample", 2.0 + 8.0, 2), ("micro_batch", 4.0, 1)],
)
def test_reductions(name: str, total: float, weight: int) -> None:
    samples = [Sample(torch.ones_like(labels), labels) for labels in LABELS]
    for losses, batch in ((LOSSES, collate(samples)), (LOSSES.view(1, -1), pack(samples))):
        got = REDUCTIONS[name](losses, batch)
        assert (got[0].item(), got[1].item()) == (total, weight)


def test_cosine_is_nemos() -> None:
    optim = OptimConfig(lr=2.0, sched=SchedConfig(warmup_steps=4, min_lr=0.5))
    rates = [learning_rate(step, optim, 20) for step in range(23)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[12] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[20:] == pytest.approx([0.5, 0.5, 0.5])


def test_cosine_without_warmup_starts_at_the_top() -> None:
    assert learning_rate(0, OptimConfig(lr=2.0), 20) == 2.0


def test_warmup_annealing_and_constant() -> None:
    annealing = OptimConfig(lr=1.0, sched=SchedConfig(name="WarmupAnnealing", warmup_ratio=0.2))
    assert [learning_rate(step, annealing, 10) for step in (0, 2, 6, 10)] == pytest.approx([1 / 3, 1.0, 0.5, 0.0])
    constant = OptimConfig(lr=1.0, sched=SchedConfig(name="constant", warmup_steps=1))
    assert [learning_rate(step, constant, 10) for step in (0, 1, 9, 99)] == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_steps_go_before_the_ratio() -> None:
    assert learning_rate(1, OptimConfig(lr=1.0, sched=SchedConfig(warmup_steps=1, warmup_ratio=0.5)), 10) == 1.0


def test_a_constant_end_is_megatrons() -> None:
    """NeMo's CosineAnnealing with constant_steps: warm-up from 0, cosine to min_lr, then min_lr."""
    optim = OptimConfig(lr=2.0, sched=SchedConfig(warmup_steps=4, constant_steps=6, min_lr=0.5))
    rates = [learning_rate(step, optim, 20) for step in range(23)]
    assert rates[:5] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert rates[9] == pytest.approx(0.5 + 1.5 * 0.5)  # half of the 10 steps between
    assert rates[14:] == pytest.approx([0.5] * 9)


@pytest.mark.parametrize(
    ("sched", "rates"),
    [
        ({"name": "SquareAnnealing"}, (1.0, 0.25, 0.1)),
        ({"name": "SquareRootAnnealing"}, (0.8**0.5, 0.4**0.5, 0.1)),
        ({"name": "InverseSquareRootAnnealing"}, (1.0, (3 / 7) ** 0.5, (3 / 11) ** 0.5)),
        ({"name": "PolynomialDecayAnnealing", "power": 2.0}, (1.0, 0.1 + 0.9 * 0.25, 0.1)),
        ({"name": "WarmupAnnealing"}, (1.0, 0.55, 0.1)),
        ({"name": "WarmupPolicy"}, (1.0, 1.0, 1.0)),
    ],
    ids=lambda sched: sched["name"] if isinstance(sched, dict) else "",
)
def test_the_other_schedules_are_nemos(sched, rates) -> None:
    """By its formulas: right behind the warm-up of 2 steps, in the middle and at the end of 10."""
    optim = OptimConfig(lr=1.0, sched=SchedConfig(warmup_steps=2, min_lr=0.1, **sched))
    assert learning_rate(2, optim, 10) == 1.0
    assert [decayed(step, optim, 2, 10) for step in (2, 6, 10)] == pytest.approx(rates)
    assert learning_rate(11, optim, 10) == 0.1


def test_a_trial_shorter_than_its_warm_up_runs(caplog) -> None:
    optim = OptimConfig(lr=1.0, sched=SchedConfig(warmup_steps=65))
    check(optim, 3)
    assert "warmup_steps=65: the run ends after 3 steps" in caplog.text
    assert learning_rate(2, optim, 3) == pytest.approx(3 / 66)


@pytest.mark.parametrize(
    "sched",
    [{"warmup_steps": -1}, {"warmup_ratio": 1.5}, {"warmup_steps": 5, "constant_steps": 6}]
    + [{"min_lr": 2.0}, {"min_lr": -1.0}],
)
def test_impossible_schedules(sched) -> None:
    with pytest.raises(ConfigError):
        check(OptimConfig(lr=1.0, sched=SchedConfig(**sched)), 10)


def test_flops_of_llama_7b_are_six_per_parameter_and_token() -> None:
    llama = replace(family("gpt", "config").Config(), vocab_size=32000)
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert step_flops(llama, 1000, 0) == pytest.approx(6 * parameters * 1000)
    one_sample = step_flops(llama, 2048, 2048**2) - step_flops(llama, 2048, 0)
    assert one_sample == pytest.approx(3 * 32 * 2 * (2 * 4096 * 2048**2) / 2)  # QK^T and AV, half of each masked


def test_flops_of_a_tower_are_counted_by_patches_and_frames() -> None:
    """LLaVA 1.5's, which runs 23 of its 24 layers: two images of 24 x 24 patches, and one of 12 x 48."""
    llava = family("llava", "config").Config()
    patches, squared = 3 * 576, 3 * 576**2
    layers = 23 * (2 * patches * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * squared * 1024)
    assert llava.vision_flops(patches, squared) == layers + 2 * patches * (1024 * 4096 + 4096**2)
    assert step_flops(llava, 0, 0, patches, squared) == 3 * llava.vision_flops(patches, squared)
    assert step_flops(llava, 0, 0, kept_patches=576) == 3 * llava.projector_flops(576)
    assert llava.visual_tokens([(1, 24, 24), (1, 12, 48), (2, 3, 4)]) == 2 * 576 + 24


def test_flops_of_qwen2_vl_count_each_frame_for_itself() -> None:
    """The 7B's: an image of 36 x 36 patches, and a video of 4 frame pairs of 10 x 18; 4 patches are a token."""
    qwen = replace(family("qwen2_vl", "config").Config(), hidden_size=3584)
    patches, squared = 1296 + 4 * 180, 1296**2 + 4 * 180**2
    layers = 32 * (2 * patches * (4 * 1280**2 + 2 * 1280 * 5120) + 4 * squared * 1280)
    merger = 2 * (patches // 4) * (5120**2 + 5120 * 3584)
    expected = layers + 2 * patches * 1176 * 1280 + merger
    assert qwen.vision_flops(patches, squared) == expected
    assert qwen.visual_tokens([(1, 36, 36), (4, 10, 18)]) == 324 + 180


def test_flops_of_qwen3_vl_are_those_of_the_experts_that_are_asked() -> None:
    """The 30B-A3B's: 8 experts of 768, the router, and four mergers over the tower; positions are looked up."""
    config = family("qwen3_vl", "config").Config
    shape = dict(num_layers=48, hidden_size=2048, ffn_hidden_size=6144, vocab_size=151936)
    heads = dict(num_attention_heads=32, num_query_groups=4, kv_channels=128)
    qwen = config(**shape, **heads, num_moe_experts=128, moe_ffn_hidden_size=768, moe_router_topk=8)
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048
    active = 48 * (attention + 8 * 3 * 2048 * 768 + 128 * 2048) + 151936 * 2048
    assert step_flops(qwen, 1000, 0) == pytest.approx(6 * active * 1000)
    patches, squared = 1296 + 4 * 180, 1296**2 + 4 * 180**2
    layers = 27 * (2 * patches * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * squared * 1152)
    mergers = 4 * 2 * (patches // 4) * (4608**2 + 4608 * 2048)
    assert qwen.vision_flops(patches, squared) == layers + 2 * patches * 1536 * 1152 + mergers


def test_patches_and_frames_are_counted() -> None:
    """An image of 2 x 3 patches, and a video of 4 frames of 4 x 5."""
    images = Images(torch.zeros(6 + 80, 3), torch.tensor([[1, 2, 3], [4, 4, 5]]))
    batch = collate([Sample(torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64), images)])
    assert batch.counts().tolist() == [7, 7, 49, 6 + 80, 36 + 4 * 400, 0, 0]
    known = replace(images, kept=(Kept("a", 1, False), Kept("b", 1, True)))
    assert replace(batch, images=known).counts().tolist() == [7, 7, 49, 6, 36, 80, 0]
