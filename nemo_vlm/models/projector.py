"""From the vision tower's width to the language model's."""

from __future__ import annotations

from torch import nn

from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.mlp import LinearStack
from nemo_vlm.models.adapter import num_linear_layers


def build_projector(kind: str, in_size: int, out_size: int, build: BuildContext) -> nn.Module:
    count = num_linear_layers(kind)
    if count == 0:
        if in_size != out_size:
            raise ConfigError(f"model.mm_cfg.mm_mlp_adapter_type=identity: widths differ, {in_size} and {out_size}")
        return nn.Identity()
    return LinearStack([in_size] + [out_size] * count, build)
