"""A projector alone in a file: liuhaotian's mm_projector.bin, or safetensors under his names, transformers' or ours."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Reader, Renamed, listed
from nemo_vlm.formats.safetensors import Safetensors
from nemo_vlm.formats.store import Folder
from nemo_vlm.models.adapter import DOWNSAMPLE
from nemo_vlm.sources.huggingface import open_pickled
from nemo_vlm.sources.source import Source

SUFFIXES = (".safetensors", ".bin")
NORM = "norm"  # in front of the linear layers of mlp_downsample
OURS = re.compile(rf"(?:model\.)?vision_projection\.(?P<index>\d+|{NORM})\.(?P<kind>weight|bias)")
HUGGING_FACE = re.compile(r"(?:model\.)?multi_modal_projector\.linear_(?P<index>\d+)\.(?P<kind>weight|bias)")
# Modules of a Sequential, every other of which is a GELU; `linear` has no number there.
LIUHAOTIAN = re.compile(r"(?:base_model\.)?(?:model\.)*mm_projector\.(?:(?P<index>\d+)\.)?(?P<kind>weight|bias)")


def is_projector(path: Path) -> bool:
    return path.is_file() and path.suffix in SUFFIXES


def open_projector(path: Path) -> Source:
    """The tensors of a projector in a file, which may hold others too.

    Raises:
        ConfigError: it holds no linear projector.
    """
    store = Folder(path.parent)
    reader: Reader = (
        Safetensors(store, [path.name]) if path.suffix == ".safetensors" else open_pickled(store, [path.name])
    )
    names = {ours: name for name in reader.names() if (ours := ours_of(name))}
    layers = {name.split(".")[1] for name in names}
    count, has_norm = len(layers - {NORM}), NORM in layers
    found = [*map(str, range(count)), *[NORM] * has_norm]
    expected = {f"vision_projection.{layer}.{kind}" for layer in found for kind in ("weight", "bias")}
    if not names or names.keys() != expected:
        raise ConfigError(f"{path}: holds no projector of linear layers, but {listed(sorted(reader.names()))}")
    kind = DOWNSAMPLE if has_norm else "linear" if count == 1 else f"mlp{count}x_gelu"
    return Source(path, {"family": "llava", "mm_cfg": {"mm_mlp_adapter_type": kind}}, Renamed(reader, names))


def ours_of(name: str) -> str | None:
    """Our name of a projector's tensor, linear layers counted from 0; None of any other's."""
    for pattern, place in ((OURS, lambda i: i), (HUGGING_FACE, lambda i: i - 1), (LIUHAOTIAN, lambda i: i // 2)):
        if found := pattern.fullmatch(name):
            index = found["index"] or "0"
            layer = NORM if index == NORM else place(int(index))
            return f"vision_projection.{layer}.{found['kind']}"
    return None
