"""A language model's architecture as Megatron-LM's arguments, written and read."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from nemo_vlm.config import LanguageConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.gpt.config import Config

log = logging.getLogger(__name__)

EPSILON, UNTIED, POSITIONS = "norm_epsilon", "untie_embeddings_and_output_weights", "position_embedding_type"
SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "init_method_std",
)
# What all language models here have; an argument that says otherwise is refused.
FIXED = {
    "swiglu": True,
    "normalization": "RMSNorm",
    POSITIONS: "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_latent_attention": False,
    "window_size": None,
}
# What all with experts have, beside a moe_layer_freq that names every layer.
FIXED_MOE = {
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
}
FREQUENCY = "moe_layer_freq"
# Sizes and numbers that a config.json beside the arguments says, too.
COMPARED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("rotary_base", EPSILON, "add_bias_linear", UNTIED),
    *("qk_layernorm", "mrope_section"),
    *("num_experts", "moe_ffn_hidden_size", "moe_router_topk"),
)


def to_args(config: LanguageConfig) -> dict[str, Any]:
    """What Megatron-LM takes from a checkpoint with --use-checkpoint-args."""
    scaled = {} if config.rope_scaling_factor is None else {"rope_scaling_factor": config.rope_scaling_factor}
    sections = None if config.mrope_section is None else list(config.mrope_section)
    return {
        **{name: getattr(config, name) for name in SAME},
        **FIXED,
        POSITIONS: "rope" if sections is None else "mrope",
        "mrope_section": sections,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "vocab_size": config.vocab_size,
        EPSILON: config.layernorm_epsilon,
        "add_bias_linear": config.bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        UNTIED: not config.share_embeddings_and_output_weights,
        "seq_length": config.encoder_seq_length,
        "rotary_base": config.rotary_base,
        "rotary_seq_len_interpolation_factor": config.seq_len_interpolation_factor,
        "use_rope_scaling": bool(scaled),
        **scaled,
        "num_experts": config.num_moe_experts,
        **({} if config.num_moe_experts is None else moe_args(config)),
    }


def moe_args(config: LanguageConfig) -> dict[str, Any]:
    return {
        **FIXED_MOE,
        FREQUENCY: 1,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.moe_router_topk,
        "moe_aux_loss_coeff": config.moe_aux_loss_coeff,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_grouped_gemm": True,
    }


def from_args(args: Mapping[str, Any], called: str) -> Config:
    """The architecture that Megatron's arguments describe.

    Args:
        called: the checkpoint, for messages.
    Raises:
        ConfigError: they do not say all, or something that is not built here.
    """
    check_fixed(args, called)
    if args.get("vocab_size") is None:
        raise ConfigError(
            f"{called}: its arguments do not say how large the vocabulary is without padding; give --hf-config"
        )
    try:
        return Config(
            **{name: args[name] for name in SAME},
            num_query_groups=args["num_query_groups"] if args["group_query_attention"] else None,
            vocab_size=args["vocab_size"],
            encoder_seq_length=args["seq_length"],
            layernorm_epsilon=args[EPSILON],
            bias=args["add_bias_linear"],
            qkv_bias=args["add_bias_linear"] or args["add_qkv_bias"],
            qk_layernorm=bool(args.get("qk_layernorm")),
            share_embeddings_and_output_weights=not args[UNTIED],
            rotary_base=float(args["rotary_base"]),
            seq_len_interpolation_factor=args["rotary_seq_len_interpolation_factor"],
            rope_scaling_factor=args["rope_scaling_factor"] if args.get("use_rope_scaling") else None,
            **({} if args.get("num_experts") is None else moe_fields(args)),
        )
    except KeyError as error:
        raise ConfigError(f"{called}: its arguments lack {error}; give --hf-config") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{called}: its arguments are damaged ({' '.join(str(error).split())})") from None


def moe_fields(args: Mapping[str, Any]) -> dict[str, Any]:
    same_name = {name: args[name] for name in ("moe_ffn_hidden_size", "moe_router_topk", "moe_aux_loss_coeff")}
    return {"num_moe_experts": args["num_experts"], **same_name}


def check_fixed(args: Mapping[str, Any], called: str) -> None:
    """Raises ConfigError where an argument asks for what is not built here."""
    fixed: dict[str, Any] = dict(FIXED)
    if args.get("num_experts") is not None:
        listed = args.get(FREQUENCY)
        fixed |= {**FIXED_MOE, FREQUENCY: listed if isinstance(listed, list) and set(map(repr, listed)) == {"1"} else 1}
    wrong = [name for name, right in fixed.items() if name in args and not same(args[name], right)]
    if wrong:
        given = ", ".join(f"{name}={args[name]}" for name in wrong)
        right = ", ".join(f"{name}={fixed[name]}" for name in wrong)
        raise ConfigError(f"{called}: its arguments {given} are not supported, only {right}")


def check_args(args: Mapping[str, Any], config: LanguageConfig, called: str, config_json: str) -> None:
    """That arguments and a config.json tell of one language model: only one of them can be what was trained.

    Raises:
        ConfigError: they contradict each other, with what both say; or as check_fixed.
    """
    described, mrope = to_args(config), config.mrope_section is not None
    # "rope" where the model's own code makes it M-RoPE, as Pai's does
    check_fixed({name: value for name, value in args.items() if not (mrope and name == POSITIONS)}, called)
    for name in COMPARED:
        if name == UNTIED and args.get(name) and not described[name]:
            continue  # Pai's converter unties what is split over a pipeline; the weights show if they are a copy
        grouped = name != "num_query_groups" or args.get("group_query_attention")  # else Megatron leaves 1 there
        if args.get(name) is None or not grouped or same(args[name], described[name]):
            continue
        said = f"{called}: its arguments say {name}={args[name]}, but {config_json} means {described[name]}"
        if name != EPSILON:
            raise ConfigError(f"{said}; one of them is of another model")
        log.warning("%s, which is taken", said)  # Pai trains its 72B with another than the hub's


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal, floating point up to how it is written."""
    if isinstance(one, float) and isinstance(other, int | float) or isinstance(one, int) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return type(one) is type(other) and bool(one == other)
