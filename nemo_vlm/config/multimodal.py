"""`model.mm_cfg.*`, as far as all families that see have it; they add what distinguishes them."""

from __future__ import annotations

from dataclasses import dataclass, field

STARTS: dict[str, str | None] = {  # see models.base
    "mm_cfg.llm.from_pretrained": "language_model",
    "mm_cfg.vision_encoder.from_pretrained": "vision_model",
    "restore_from_path": None,
    "mm_cfg.pretrain_mm_mlp_adapter": "vision_projection",
}


@dataclass(frozen=True)
class LlmConfig:
    """`model.mm_cfg.llm.*`."""

    from_pretrained: str | None = None  # a checkpoint with a language model; see sources/
    freeze: bool = False
    lr_ratio: float = 1.0  # of model.optim.lr


@dataclass(frozen=True)
class TowerConfig:
    """`model.mm_cfg.vision_encoder.*`."""

    num_attention_heads: int = 16
    from_pretrained: str | None = None  # a checkpoint with a tower; see sources/
    freeze: bool = False
    vision_encoder_lr_ratio: float = 1.0  # of model.optim.lr


@dataclass(frozen=True)
class MediaConfig:
    """`model.mm_cfg.*`."""

    llm: LlmConfig = field(default_factory=LlmConfig)
    vision_encoder: TowerConfig = field(default_factory=TowerConfig)
    pretrain_mm_mlp_adapter: str | None = None  # a checkpoint with a projector, or a projector alone; see sources/
    freeze_mm_mlp_adapter: bool = False
    mm_mlp_adapter_lr_ratio: float = 1.0  # of model.optim.lr
    image_token: str = "<image>"  # placeholder in the text, one token for each feature
    image_token_index: int | None = None  # null: as the tokenizer says

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The tokens that stand for features; settled before a model is built."""
        assert self.image_token_index is not None, "placeholders are settled before a model is built"
        return (self.image_token_index,)

    @property
    def image_text(self) -> str:
        """An image's placeholder with what stands around it."""
        return self.image_token

    @property
    def video_placeholder(self) -> str:
        """What stands in a text where a video goes; an image's, where the model does not tell them apart."""
        return self.image_token

    @property
    def video_text(self) -> str:
        """The placeholder with what stands around it."""
        return self.image_text

    @property
    def media_break(self) -> str:
        """What the chat template puts between an image or a video that is given apart and the texts beside it."""
        return "\n"
