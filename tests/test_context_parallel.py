"""Context parallelism: the split by hand, attention and training against one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_batch_on_this_cp_rank
from test_families import TINY, assert_same_run, make_layout, run_of, train

from nemo_vlm.config import ParallelConfig, RunConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, check, resolve
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.attention import CoreAttention
from nemo_vlm.mcore.context import ContextParallelAttention, Split, split
from nemo_vlm.mcore.packed import packed_sequences

CPU = torch.device("cpu")
HEADS, GROUPS, SIZE = 4, 2, 8
TWICE = ParallelConfig(context_parallel_size=2)


def splits(lengths: list[int], ranks: int, divisor: int = 1) -> list[Split]:
    return [split(lengths, ranks, rank, 2 * ranks * divisor, CPU) for rank in range(ranks)]


def test_the_split_by_hand() -> None:
    """A sample of 5 is padded to 8 positions in 4 chunks, one of 3 to 4: rank 0 has the outer chunks of each."""
    first, second = splits([5, 3], 2)
    assert first.lengths == second.lengths == [8, 4]
    assert first.held.tolist() == [0, 1, 4, 4] + [5, 7]
    assert second.held.tolist() == [2, 3, 4, 4] + [6, 7]
    assert first.places.tolist() == [0, 1, 6, 7, 8] + [4, 10, 11]


@pytest.mark.parametrize("divisor", [1, 4])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_position_comes_back(ranks: int, divisor: int) -> None:
    lengths = [1, 12, 7, 30, 2]
    found = splits(lengths, ranks, divisor)
    held = torch.cat([each.held for each in found])
    assert all(len(each.held) == len(held) // ranks and len(each.held) % divisor == 0 for each in found)
    assert all(length % (2 * ranks) == 0 for length in found[0].lengths) and sum(found[0].lengths) == len(held)
    assert torch.equal(held[found[0].places], torch.arange(sum(lengths)))


def attention_of(lengths: list[int] | None, whole: list[torch.Tensor], weight: torch.Tensor):
    """Output and gradients of this rank's part of rows [s, b, heads, d], or of one packed row; put together again.

    Args:
        whole: query, key and value.
        weight: [s, b, heads * d] of the output in the loss.
    """
    module = ContextParallelAttention(None, 1, AttnMaskType.causal, ProcessGroupCollection.use_mpu_process_groups())
    mine = split(lengths or [len(whole[0])], module.ranks, module.rank, 2 * module.ranks, CPU)
    whole = [part.clone().requires_grad_() for part in whole]
    query, key, value = (mine.part(part, 0) for part in whole)
    if lengths is None:
        part = module(query, key, value, None)
    else:
        part = module(query[:, 0], key[:, 0], value[:, 0], None, packed_sequences(mine.lengths, CPU))[:, None]
    out = mine.whole(part.transpose(0, 1)).transpose(0, 1)
    (out * weight).sum().backward()
    for each in whole:
        torch.distributed.all_reduce(each.grad)
    return [out.detach(), *(each.grad for each in whole)]


def attend_everywhere(cases: list[tuple]):
    """What attention makes of each case; this rank's tokens of a row as Megatron splits it, and as we do."""
    groups.initialize(Layout(1, 3, 1, 1, False, (1,), 1, 1, context=3), seed=1)
    found = [attention_of(*case) for case in cases]
    theirs = get_batch_on_this_cp_rank({"tokens": torch.arange(36)[None]})["tokens"]
    ours = split([36], 3, parallel_state.get_context_parallel_rank(), 6, CPU).held[None]
    groups.shut_down()
    return found, theirs, ours


def test_attention_equals_one_process() -> None:
    """On three ranks, padded and packed, odd lengths and one token alone: what comes out, and every gradient."""
    random, cases, expected = torch.Generator().manual_seed(0), [], []
    plain = CoreAttention(None, 1, AttnMaskType.causal)
    for batch_size, lengths in ((2, None), (1, [7, 1, 22, 12])):
        shapes = [(42, batch_size, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
        whole = [torch.randn(shape, generator=random) for shape in shapes]
        weight = torch.randn(42, batch_size, HEADS * SIZE, generator=random)
        cases.append((lengths, whole, weight))
        alone = [part.clone().requires_grad_() for part in whole]
        if lengths is None:
            out = plain(*alone, None)
        else:
            out = plain(*(part[:, 0] for part in alone), None, packed_sequences(lengths, CPU))[:, None]
        (out * weight).sum().backward()
        expected.append([out.detach(), *(part.grad for part in alone)])
    for found, theirs, ours in run_ranks(attend_everywhere, 3, cases):
        assert torch.equal(theirs, ours)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def train_all(cases: list[tuple[RunConfig, Layout]]):
    return [train(*case)[0] for case in cases]


def test_more_layouts_train_as_one_process() -> None:
    """Beside those of the families' contract: more ranks, a pipeline, FSDP, another optimizer, another reduction."""
    of_gpt, of_llava, of_qwen = (run_of(name, TINY[name]) for name in ("gpt", "llava", "qwen2_vl"))
    by_sample = replace(of_llava, step=replace(of_llava.step, loss_reduction="sample"))
    distributed = replace(of_gpt, optim=replace(of_gpt.optim, name="distributed_fused_adam"))
    cases = [
        (distributed, ParallelConfig(context_parallel_size=4)),
        (of_qwen, replace(TWICE, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
        (by_sample, replace(TWICE, fsdp=True)),
    ]
    laid_out = []
    for run, parallel in cases:
        run = replace(run, parallel=parallel, step=replace(run.step, micro_batch_size=1))
        laid_out.append((run, make_layout(run, 4)))
    expected = run_ranks(train_all, 1, [(run, make_layout(run, 1)) for run in (of_gpt, of_qwen, by_sample)])[0]
    for found in run_ranks(train_all, 4, laid_out):  # every rank reports the same
        for got, wanted in zip(found, expected, strict=True):
            assert_same_run(got, wanted)


def test_sizes_that_do_not_divide() -> None:
    run = run_of("gpt", TINY["gpt"], replace(TWICE, pipeline_model_parallel_size=2))
    with pytest.raises(ConfigError, match="3 ranks do not divide by the 4 of .* x context_parallel_size=2"):
        make_layout(run, 3)
    with pytest.raises(ConfigError, match="model.context_parallel_size=0: must be 1 or more"):
        check(replace(run, parallel=ParallelConfig(context_parallel_size=0)))
    assert make_layout(run, 8).data == 2 and resolve(run, 0, {}).world_size == 4
