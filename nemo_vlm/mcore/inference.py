"""Logits on every rank, whatever the layout: forward passes through Megatron's schedule, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from nemo_vlm.batch import Batch
from nemo_vlm.mcore import cpu, groups
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.gpt import decode_cached, embed

Pass = Callable[[Any], Tensor]  # of one stage


class Forward:
    """A model that the ranks of one copy hold together, as functions that each of them calls with the same arguments.

    Args:
        modules: this rank's stages as the schedule runs them: StageModules, or an Engine's (updater.modules).
        vocab_size: without the padding.
    """

    def __init__(self, modules: list[nn.Module], vocab_size: int) -> None:
        self.modules, self.vocab_size = modules, vocab_size

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [b, s, vocab_size] float32, on every rank."""
        batch = batch.to(cpu.device())
        return self._run(lambda stage: stage(batch), batch.tokens.shape)

    def start(self, batch: Batch, capacity: int) -> tuple[Cache, Tensor]:
        """Read prompts: a cache that holds them, and the logits [b, vocab_size] float32 of what follows each.

        Args:
            capacity: the most tokens that a row will have, those to be generated included.
        """
        batch, cache = batch.to(cpu.device()), Cache(batch.lengths, capacity, cpu.device())
        logits = self._run(lambda stage: stage(batch, cache=cache), (len(batch.tokens), 1))
        cache.fill()
        return cache, logits[:, 0]

    def step(self, cache: Cache, tokens: Tensor, longer: Tensor) -> Tensor:
        """Put one token [b] behind each row; the logits [b, vocab_size] float32 of what follows.

        Args:
            longer: [b] bool: rows that keep it. The others stay as they were, and their logits mean nothing.
        """
        tokens = tokens[:, None].to(cpu.device())

        def run(stage: Any) -> Tensor:
            gpt = stage.model.language_model
            return decode_cached(gpt, embed(gpt, tokens) if gpt.pre_process else None, 1, cache)

        logits = self._run(run, (len(tokens), 1))
        cache.grow(longer)
        return logits[:, 0]

    @torch.no_grad()
    def _run(self, one_stage: Pass, shape: tuple[int, ...]) -> Tensor:
        """What the last stage has made, [*shape, vocab_size] float32, on all ranks."""

        def forward(none: Iterator[None], stage: nn.Module) -> tuple[Tensor, None]:
            return one_stage(stage), None

        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(()),
            model=self.modules,
            num_microbatches=1,
            seq_length=1,  # the pipeline's shapes are sent along (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=True,
        )
        logits = torch.empty(*shape, self.vocab_size, device=cpu.device())
        if outputs:
            whole = gather_from_tensor_model_parallel_region(outputs[0].float())
            logits.copy_(whole[..., : self.vocab_size])
        return groups.from_first_of_experts(groups.from_last_stage(logits))
