"""Logits on every rank, whatever the layout: a forward pass through Megatron's schedule, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from nemo_vlm.batch import Batch
from nemo_vlm.mcore import cpu, groups


class Forward:
    """A model that the ranks of one replica hold together, as a function that each of them calls with the same batch.

    Args:
        modules: this rank's stages as the schedule runs them: StageModules, or an Engine's (updater.modules).
        vocab_size: without the padding.
    """

    def __init__(self, modules: list[nn.Module], vocab_size: int) -> None:
        self.modules, self.vocab_size = modules, vocab_size

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [b, s, vocab_size] float32, on every rank."""
        return self._run(batch, batch.tokens.shape, lambda logits: logits)

    def last(self, batch: Batch) -> Tensor:
        """Logits [b, vocab_size] float32 behind the last token of each sample, on every rank."""
        rows, ends = torch.arange(len(batch.lengths)), batch.lengths - 1
        return self._run(batch, batch.lengths.shape, lambda logits: logits[rows, ends.cpu()])

    @torch.no_grad()
    def _run(self, batch: Batch, shape: torch.Size, choose: Callable[[Tensor], Tensor]) -> Tensor:
        batch = batch.to(cpu.device())
        outputs = get_forward_backward_func()(
            forward_step_func=lambda batches, model: (model(next(batches)), None),
            data_iterator=iter([batch]),
            model=self.modules,
            num_microbatches=1,
            seq_length=1,  # the pipeline's shapes are sent along (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=True,
        )
        logits = torch.empty(*shape, self.vocab_size, device=cpu.device())
        if outputs:
            whole = gather_from_tensor_model_parallel_region(choose(outputs[0]).float())
            logits.copy_(whole[..., : self.vocab_size])
        return groups.from_last_stage(logits)
