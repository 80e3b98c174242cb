"""`model.*`, what every family's architecture has in common, and its first weights."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vlm.config.checks import demand, fill
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
    layernorm_epsilon: float = 1e-5
    bias: bool = False
    qkv_bias: bool = False  # of queries, keys and values, beside those of `bias`
    qk_layernorm: bool = False  # RMSNorm over each head of queries and keys
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        demand(self.init_method_std > 0, "model.init_method_std", self.init_method_std, "more than 0")
        fill(self, num_query_groups=self.num_attention_heads, max_position_embeddings=self.encoder_seq_length)
        if self.kv_channels is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads}: model.hidden_size={self.hidden_size} "
                "must divide by it, or model.kv_channels be given"
            )
        fill(self, kv_channels=self.hidden_size // max(self.num_attention_heads, 1))

    @property
    def parts(self) -> dict[str, PartConfig]:
        """How the model's top-level modules train, by name; those not named train as usual."""
        return {}

    @property
    def reads_media(self) -> bool:
        """Whether it is shown images and videos."""
        return False

    @property
    def image_placeholder(self) -> str:
        """What stands in a text where an image goes."""
        return "<image>"

    @property
    def image_text(self) -> str:
        """The placeholder with what stands around it."""
        return self.image_placeholder

    @property
    def image_facts(self) -> dict[str, int]:
        """What settings of the data may repeat of the model's images, by their keys: they must say the same."""
        return {}

    @property
    def tiles_images(self) -> bool:
        """Whether images are seen in tiles too, which are cut from squares."""
        return False

    @property
    def image_flops(self) -> float:
        """FLOPs of one image's forward pass; a family with a vision tower counts it."""
        return 0.0
