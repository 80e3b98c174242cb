"""What the environment says about the network, checked before any rank waits for it."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from nemo_vlm.errors import ConfigError


def check_interfaces(env: Mapping[str, str]) -> None:
    """Network interfaces that gloo and NCCL are told to use must exist.

    gloo takes names; NCCL takes prefixes, exact names behind "=", and exclusions behind "^".

    Raises:
        ConfigError: one does not.
    """
    present = [name for _, name in socket.if_nameindex()]
    for key, by_prefix in (("GLOO_SOCKET_IFNAME", False), ("NCCL_SOCKET_IFNAME", True)):
        wanted = env.get(key) or ""
        if wanted.startswith("^"):
            continue
        by_prefix = by_prefix and not wanted.startswith("=")
        for name in filter(None, wanted.lstrip("=").split(",")):
            if name not in present and not (by_prefix and any(known.startswith(name) for known in present)):
                raise ConfigError(f"{key}={wanted}: this machine has no interface {name}; it has {', '.join(present)}")
