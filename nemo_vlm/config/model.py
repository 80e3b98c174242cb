"""`model.*`, what every family's architecture has in common, and its first weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemo_vlm.config.checks import demand, fill, show
from nemo_vlm.config.data import DataConfig
from nemo_vlm.config.multimodal import MediaConfig
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class StartConfig:
    """`model.*`, the first weights."""

    # Hugging Face's directory, a .nemo, one that is extracted, or a training checkpoint; the optimizer starts anew
    restore_from_path: str | None = None


@dataclass(frozen=True)
class PartConfig:
    """How one part of a model trains."""

    freeze: bool = False
    lr_ratio: float = 1.0  # of model.optim.lr


def tower_flops(layers: int, hidden: int, ffn_hidden: int, patches: float, squared_frames: float) -> float:
    """FLOPs of a vision transformer's forward pass; the FFN has two matrices, and attention has no mask."""
    layer = 4 * hidden**2 + 2 * hidden * ffn_hidden
    return layers * (2 * patches * layer + 4 * squared_frames * hidden)


@dataclass(frozen=True)
class LanguageConfig:
    """`model.*`, a decoder-only language model (Llama's architecture and its neighbours)."""

    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 11008
    num_attention_heads: int = 32
    num_query_groups: int | None = None  # null: one group a head (no grouped-query attention)
    kv_channels: int | None = None  # size of a head; null: hidden_size / num_attention_heads
    vocab_size: int | None = None  # null: as the tokenizer
    make_vocab_size_divisible_by: int = 128
    encoder_seq_length: int = 4096  # longest sample, in tokens
    max_position_embeddings: int | None = None  # what an export says of it; null: encoder_seq_length
    rotary_base: float = 10000.0
    seq_len_interpolation_factor: float | None = None  # rotary positions are divided by it
    rope_scaling_factor: float | None = None  # Llama 3.1's scaling of rotary frequencies
    mrope_section: tuple[int, ...] | None = None  # frequencies of each axis of M-RoPE, time, height, width; null: RoPE
    layernorm_epsilon: float = 1e-5
    bias: bool = False
    qkv_bias: bool = False  # of queries, keys and values, beside those of `bias`
    qk_layernorm: bool = False  # RMSNorm over each head of queries and keys
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    num_moe_experts: int | None = None  # experts in the place of each layer's FFN (mixture of experts); null: dense
    moe_ffn_hidden_size: int | None = None  # of each expert; null: ffn_hidden_size
    moe_router_topk: int = 2  # experts that each token is sent to; no token is dropped
    moe_aux_loss_coeff: float = 0.0  # of the loss that evens the experts' loads (Switch Transformer); 0: off

    def __post_init__(self) -> None:
        demand(self.init_method_std > 0, "model.init_method_std", self.init_method_std, "more than 0")
        fill(self, num_query_groups=self.num_attention_heads, max_position_embeddings=self.encoder_seq_length)
        if self.kv_channels is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads}: model.hidden_size={self.hidden_size} "
                "must divide by it, or model.kv_channels be given"
            )
        fill(self, kv_channels=self.hidden_size // max(self.num_attention_heads, 1))
        self._settle_experts()
        if self.position_axes == 1:
            right = "null: this family's positions have one axis"
            demand(self.mrope_section is None, "model.mrope_section", list(self.mrope_section or ()), right)

    def _settle_experts(self) -> None:
        if (experts := self.num_moe_experts) is None:
            keys = ("moe_ffn_hidden_size", "moe_router_topk", "moe_aux_loss_coeff")
            defaults = {key: getattr(LanguageConfig, key) for key in keys}
            if any(getattr(self, key) != default for key, default in defaults.items()):
                needed = " ".join(f"model.{key}={show(default)}" for key, default in defaults.items())
                raise ConfigError(f"model.num_moe_experts=null: give {needed} with it, or a number of experts")
            return
        demand(experts > 1, "model.num_moe_experts", experts, "2 or more, or null")
        fill(self, moe_ffn_hidden_size=self.ffn_hidden_size)
        right = f"from 2 to model.num_moe_experts={experts}; one alone would always weigh 1, which trains no router"
        demand(2 <= self.moe_router_topk <= experts, "model.moe_router_topk", self.moe_router_topk, right)
        demand(self.moe_aux_loss_coeff >= 0, "model.moe_aux_loss_coeff", self.moe_aux_loss_coeff, "0 or more")
        demand(not self.bias, "model.bias", "true", "false with model.num_moe_experts; qkv_bias may be true")

    @property
    def media(self) -> MediaConfig | None:
        """A family that sees images and videos returns its `mm_cfg`."""
        return None

    @property
    def parts(self) -> dict[str, PartConfig]:
        """How the model's top-level modules train, by name; those not named train as usual."""
        if (mm := self.media) is None:
            return {}
        return {
            "language_model": PartConfig(mm.llm.freeze, mm.llm.lr_ratio),
            "vision_model": PartConfig(mm.vision_encoder.freeze, mm.vision_encoder.vision_encoder_lr_ratio),
            "vision_projection": PartConfig(mm.freeze_mm_mlp_adapter, mm.mm_mlp_adapter_lr_ratio),
        }

    @property
    def position_axes(self) -> int:
        """Numbers that make a position: 3 in M-RoPE."""
        return 1

    @property
    def mrope_interleaved(self) -> bool:
        """Whether the axes of M-RoPE take turns over the frequencies, or each has a run of them."""
        return False

    @property
    def deepstack_layers(self) -> int:
        """How many of the first decoder layers get visual features of their own (DeepStack)."""
        return 0

    @property
    def divided_heads(self) -> dict[str, int]:
        """What a file for each tensor-parallel rank divides head by head, by the settings that number them."""
        decoder = {"num_query_groups": self.num_query_groups or self.num_attention_heads}
        if self.media is None:
            return decoder
        return decoder | {"mm_cfg.vision_encoder.num_attention_heads": self.media.vision_encoder.num_attention_heads}

    @property
    def reads_media(self) -> bool:
        """Whether it is shown images and videos."""
        return self.media is not None

    @property
    def in_text(self) -> MediaConfig:
        """What stands in a text for images and videos, of a model that reads text alone too."""
        return self.media or MediaConfig()

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The tokens that stand for features; settled before a model is built."""
        return () if self.media is None else self.media.placeholder_ids

    @property
    def image_facts(self) -> dict[str, int]:
        """What settings of the data may repeat of the model's images, by their keys: they must say the same."""
        return {}

    @property
    def conv_template(self) -> str:
        """How conversations are written where `model.data.conv_template` is null: as the family's chat template."""
        return "v1"

    @property
    def media_settings(self) -> dict[str, Any]:
        """The settings of the data about images and videos that it follows, by their keys, and what null means."""
        return {}

    def media_choices(self, data: DataConfig) -> dict[str, Any]:
        """Those settings as they are given, or else their defaults."""
        given = {key: getattr(data, key) for key in self.media_settings}
        return {key: default if given[key] is None else given[key] for key, default in self.media_settings.items()}

    @property
    def tiles_images(self) -> bool:
        """Whether images are seen in tiles too, which are cut from squares."""
        return False

    def typical_views(self, data: DataConfig) -> list[tuple[int, int, int]]:
        """Patches in time, height and width of what it sees of a common photograph, for estimates."""
        return []

    def visual_tokens(self, grids: Iterable[tuple[int, int, int]]) -> int:
        """What views of these patches in time, height and width are in the text; a family that sees counts them."""
        return 0

    def vision_flops(self, patches: float, squared_frames: float) -> float:
        """FLOPs of the vision tower's forward pass and of what makes tokens of its features.

        Args:
            squared_frames: the sum of the squared numbers of patches of images and frames.
        """
        return 0.0

    def projector_flops(self, patches: float) -> float:
        """Of that, what makes tokens of features."""
        return 0.0
