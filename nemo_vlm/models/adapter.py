"""NeMo's names of projectors, `mm_mlp_adapter_type`."""

from __future__ import annotations

import re

from nemo_vlm.errors import ConfigError

DOWNSAMPLE = "mlp_downsample"


def num_linear_layers(kind: str) -> int:
    """Linear layers in a projector of NeMo's `mm_mlp_adapter_type`: identity 0, linear 1, mlpNx_gelu N.

    mlp_downsample has 2, behind four neighbours fused into one and a norm.
    """
    if kind == DOWNSAMPLE:
        return 2
    if kind == "identity":
        return 0
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if not match and kind != "linear":
        kinds = f"linear, identity, {DOWNSAMPLE} or mlpNx_gelu, as mlp2x_gelu"
        raise ConfigError(f"model.mm_cfg.mm_mlp_adapter_type={kind}: must be {kinds}")
    return int(match[1]) if match else 1
