"""From the vision tower's width to the language model's."""

from __future__ import annotations

import re

from torch import nn

from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.mlp import LinearStack


def num_linear_layers(kind: str) -> int:
    """Linear layers in a projector of NeMo's `mm_mlp_adapter_type`: identity 0, linear 1, mlpNx_gelu N."""
    if kind == "identity":
        return 0
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if not match and kind != "linear":
        raise ConfigError(
            f"model.mm_cfg.mm_mlp_adapter_type={kind}: must be linear, identity or mlpNx_gelu, as mlp2x_gelu"
        )
    return int(match[1]) if match else 1


def build_projector(kind: str, in_size: int, out_size: int, build: BuildContext) -> nn.Module:
    count = num_linear_layers(kind)
    if count == 0:
        if in_size != out_size:
            raise ConfigError(f"model.mm_cfg.mm_mlp_adapter_type=identity: widths differ, {in_size} and {out_size}")
        return nn.Identity()
    return LinearStack([in_size] + [out_size] * count, build)
