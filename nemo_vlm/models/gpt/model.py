"""The language model alone, on Megatron's GPTModel."""

from __future__ import annotations

from torch import Tensor, nn

from nemo_vlm.batch import Batch
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.gpt import build_gpt, decode, embed
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.models.gpt.config import Config


class Model(nn.Module):
    """This pipeline stage of a Llama-style language model."""

    def __init__(self, config: Config, build: BuildContext, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.language_model = build_gpt(config, build, stage)

    def forward(self, batch: Batch, labels: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Losses [b, s] where labels are given, else logits; hidden states on all but the last stage."""
        embeddings = embed(self.language_model, batch.tokens) if self.stage.first else None
        return decode(self.language_model, embeddings, batch, labels, cache)
