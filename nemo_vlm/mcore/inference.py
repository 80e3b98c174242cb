"""Logits on every rank, whatever the layout: forward passes without an optimizer."""

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
from nemo_vlm.mcore.decoding import decode_cached
from nemo_vlm.mcore.gpt import embed

Pass = Callable[[Any], Tensor]  # of one stage


class Forward:
    """A model that the ranks of one copy hold together, as functions that each of them calls with the same arguments.

    Args:
        modules: this rank's stages as the schedule runs them: a StageModule. To be
            called they may be an Engine's (updater.modules) as well.
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

    @torch.no_grad()
    def step(self, cache: Cache, tokens: Tensor, longer: Tensor) -> Tensor:
        """Put one token [b] behind each row; the logits [b, vocab_size] float32 of what follows.

        Megatron's schedule, which could run many batches, would cost more than the layers of a small model.

        Args:
            longer: [b] bool: rows that keep it. The others stay as they were, and their logits mean nothing.
        """
        (stage,) = self.modules
        gpt: Any = stage.model.language_model  # type: ignore[union-attr]
        with cpu.without_redirection():
            embeddings = None
            if gpt.pre_process:
                embeddings = embed(gpt, tokens[:, None].to(cpu.device()))
            else:
                shape = (1, len(tokens), gpt.config.hidden_size)
                gpt.set_input_tensor(groups.from_previous_stage(shape, gpt.config.params_dtype))
            output = decode_cached(gpt, embeddings, 1, cache)
            if not gpt.post_process:
                groups.to_next_stage(output)
            logits = self._on_all(output if gpt.post_process else None, (len(tokens), 1))
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
        return self._on_all(outputs[0] if outputs else None, shape)

    def _on_all(self, output: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """The last stage's logits [*shape, vocab / tp], which the others lack, as [*shape, vocab_size] float32."""
        if output is None:
            logits = torch.empty(*shape, self.vocab_size, device=cpu.device())
        else:
            whole = gather_from_tensor_model_parallel_region(output.float())
            logits = whole[..., : self.vocab_size].contiguous()
        return groups.from_first_of_experts(groups.from_last_stage(logits))
