"""A file of torch.save for each tensor- and pipeline-parallel rank: Megatron's legacy checkpoints, NeMo 1.x's archives.

    mp_rank_TT/  mp_rank_TT_PPP/  tp_rank_TT_pp_rank_PPP/      model_optim_rng.pt (Megatron), model_weights.ckpt (NeMo)

Read as whole tensors with global layer numbers: in the files, every stage counts its layers from 0. Which dimension is
sharded is known by name; a gated fc1 is sharded half by half, each rank holding [its gate; its up].
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import torch_file
from nemo_vlm.formats.reader import Shape, Slices, whole
from nemo_vlm.formats.store import Store

FILES = re.compile(
    r"(?:(?:mp_rank_(?P<mp_tensor>\d+)(?:_(?P<mp_stage>\d+))?|tp_rank_(?P<tensor>\d+)_pp_rank_(?P<stage>\d+))/)?"
    r"(?:model_optim_rng\.pt|model_weights\.ckpt)"
)
EXPERT_FILES = re.compile(r"mp_rank_\d+_\d+_\d+/")
LAYER = re.compile(r"(?P<front>(?:|.*\.)layers\.)(?P<number>\d+)(?P<rest>\..*)")
# Names of Megatron-Core, then NeMo's from before it.
GATED = re.compile(r".*\.(?:linear_fc1|dense_h_to_4h)\.(?:weight|bias)\d*")
BY_ROWS = re.compile(r"(?:|.*\.)(?:word_embeddings\.weight|(?:output_layer|word_embeddings_for_head)\.weight)")
BY_ROWS_TOO = re.compile(r".*\.(?:linear_qkv|linear_fc1|query_key_value|dense_h_to_4h)\.(?:weight|bias)\d*")
OF_A_TENSOR = re.compile(r".*\.(?:weight|bias)\d*")
BY_COLUMNS = re.compile(r".*\.(?:linear_proj|linear_fc2|dense|dense_4h_to_h)\.weight\d*")


def axis_of(name: str) -> int | None:
    """The dimension that tensor parallelism shards; None for what every rank holds."""
    if BY_ROWS.fullmatch(name) or BY_ROWS_TOO.fullmatch(name):
        return 0
    return 1 if BY_COLUMNS.fullmatch(name) else None


def is_gated(name: str, gated: tuple[str, ...]) -> bool:
    """An fc1 of gate and up, of a module whose names begin with one of these prefixes."""
    return name.startswith(gated) and GATED.fullmatch(name) is not None


@dataclass(frozen=True)
class Merged:
    """A whole tensor made of runs of ranks' tensors along one axis: (tensor, first, last), in order."""

    runs: list[tuple[Tensor, int, int]]
    axis: int

    @property
    def shape(self) -> Shape:
        shape = list(self.runs[0][0].shape)
        if shape:
            shape[self.axis] = sum(last - first for _, first, last in self.runs)
        return tuple(shape)

    def read(self, slices: Slices) -> Tensor:
        """A view where one run holds all of it."""
        if not self.shape:
            return self.runs[0][0]
        slices = slices or whole(self.shape)
        start, stop, _ = slices[self.axis].indices(self.shape[self.axis])
        found, at = [], 0
        for tensor, first, last in self.runs:
            begin, end = max(start, at), min(stop, at + last - first)
            if begin < end:
                run = slice(first + begin - at, first + end - at)
                found.append(tensor[slices[: self.axis] + (run,) + slices[self.axis + 1 :]])
            at += last - first
        if not found:
            return torch.empty(self.shape, dtype=self.runs[0][0].dtype)[slices]
        return found[0] if len(found) == 1 else torch.cat(found, self.axis)


class RankFiles:
    """The tensors of all ranks' files in a folder, under the files' own names with global layer numbers.

    Args:
        gated: whether the tensor of a (global) name is a gated fc1's.
    Attributes:
        content: what else the first rank's file holds.
        objects: names beside the tensors that are none.
    Raises:
        ConfigError: a rank's file is missing or damaged, or does not fit the others.
    """

    def __init__(self, store: Store, folder: str, gated: Callable[[str], bool]) -> None:
        self.store, self.folder, self.gated = store, folder, gated
        self.objects: set[str] = set()
        self.tensors: dict[str, Merged] = {}
        files = rank_files(store, folder)
        first_layer: dict[str, int] = defaultdict(int)
        ranks = {place: self.chunks(file) for place, file in files.items()}
        self.content: Mapping[str, Any] = torch_file.load(store.span(files[0, 0]))
        count = len(ranks[0, 0])
        for place, chunks in ranks.items():
            if len(chunks) != count:
                raise ConfigError(f"{self}: {files[place]} holds {len(chunks)} virtual stages, {files[0, 0]} {count}")
        for chunk in range(count):
            for stage in stage_ranks(files):
                pieces = {files[tensor, stage]: ranks[tensor, stage][chunk] for tensor in tensor_ranks(files)}
                self.add(pieces, first_layer)

    def __str__(self) -> str:
        return f"{self.store}: {self.folder}" if self.folder else str(self.store)

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> Shape:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].runs[0][0].dtype

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        return self.tensors[name].read(slices)

    def chunks(self, file: str) -> list[dict[str, Any]]:
        """The state of a rank's model, or of each of its virtual stages."""
        content = torch_file.load(self.store.span(file))
        if not isinstance(content, dict):
            raise ConfigError(f"{self.store}: {file} holds no model")
        if "model0" in content:
            found = [content[key] for key in takewhile(content.__contains__, map("model{}".format, count()))]
        else:
            found = [content["model"] if isinstance(content.get("model"), dict) else content]
        if not all(isinstance(chunk, dict) for chunk in found):
            raise ConfigError(f"{self.store}: {file} holds no model")
        return [dict(flattened(chunk)) for chunk in found]

    def add(self, ranks: Mapping[str, dict[str, Any]], first_layer: dict[str, int]) -> None:
        """One stage's tensors, of every tensor-parallel rank.

        Args:
            ranks: what each rank's file holds.
            first_layer: how many layers the stages before have, by the beginning of their names; counted on.
        """
        self.check_same_names(ranks)
        pieces = list(ranks.values())
        numbers: dict[str, set[int]] = defaultdict(set)
        for local in pieces[0]:
            name = local
            if found := LAYER.fullmatch(local):
                front, number = found["front"], int(found["number"])
                numbers[front].add(number)
                name = f"{front}{first_layer[front] + number}{found['rest']}"
            if any(isinstance(piece[local], Tensor) for piece in pieces):
                self.put(name, [piece[local] for piece in pieces])
            elif OF_A_TENSOR.fullmatch(local) and pieces[0][local] is not None:
                kind = type(pieces[0][local]).__name__
                raise ConfigError(f"{self.store}: {next(iter(ranks))}: '{local}' is no tensor, but a {kind}")
            else:
                self.objects.add(name)
        for front, layers in numbers.items():
            if layers != set(range(len(layers))):
                raise ConfigError(f"{self}: the layers of a stage are {front}{sorted(layers)}, not counted from 0")
            first_layer[front] += len(layers)

    def check_same_names(self, ranks: Mapping[str, dict[str, Any]]) -> None:
        """Raises ConfigError where a tensor-parallel rank holds what another does not."""
        first, names = next((file, content.keys()) for file, content in ranks.items())
        for file, content in ranks.items():
            if different := sorted(names ^ content.keys()):
                has, lacks = (first, file) if different[0] in names else (file, first)
                raise ConfigError(f"{self}: {has} holds '{different[0]}', which {lacks} lacks")

    def put(self, name: str, pieces: list[Any]) -> None:
        """Join what the tensor-parallel ranks hold of a tensor."""
        if not all(isinstance(p, Tensor) and (p.shape, p.dtype) == (pieces[0].shape, pieces[0].dtype) for p in pieces):
            raise ConfigError(f"{self}: the ranks do not agree on the tensor '{name}'")
        merged = merge(name, pieces, self.gated(name))
        before = self.tensors.setdefault(name, merged)
        if before is not merged and not torch.equal(self.read(name), merged.read(whole(merged.shape))):
            raise ConfigError(f"{self}: two stages hold the tensor '{name}' with different values")


def merge(name: str, pieces: list[Tensor], gated: bool) -> Merged:
    axis = axis_of(name)
    if axis is None or len(pieces) == 1:
        size = pieces[0].shape[0] if pieces[0].dim() else 1
        return Merged([(pieces[0], 0, size)], 0)
    size = pieces[0].shape[axis]
    bounds = [(0, size // 2), (size // 2, size)] if gated else [(0, size)]
    return Merged([(piece, *bound) for bound in bounds for piece in pieces], axis)


def flattened(tree: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Any]]:
    """Old checkpoints nest their modules."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{front}{name}.")
        else:
            yield f"{front}{name}", value


def rank_files(store: Store, folder: str) -> dict[tuple[int, int], str]:
    """The files of a folder by tensor- and pipeline-parallel rank.

    Raises:
        ConfigError: there are none, or not all.
    """
    found: dict[tuple[int, int], str] = {}
    for file in sorted(store.names()):
        if not file.startswith(folder):
            continue
        if EXPERT_FILES.match(file.removeprefix(folder)):
            raise ConfigError(f"{store}: {file}: files of expert-parallel ranks are not read; save as torch_dist")
        if match := FILES.fullmatch(file.removeprefix(folder)):
            ranks = (match["mp_tensor"] or match["tensor"] or 0, match["mp_stage"] or match["stage"] or 0)
            place = int(ranks[0]), int(ranks[1])
            if place in found:
                raise ConfigError(f"{store}: {found[place]} and {file} are files of the same rank; remove the old ones")
            found[place] = file
    if not found:
        raise ConfigError(f"{store}: {folder or 'it'} holds no files of ranks")
    for tensor in tensor_ranks(found):
        for stage in stage_ranks(found):
            if (tensor, stage) not in found:
                raise ConfigError(
                    f"{store}: {folder}: the file of tensor-parallel rank {tensor}, pipeline-parallel rank {stage} is "
                    f"missing; there are {', '.join(sorted(found.values()))}"
                )
    return found


def tensor_ranks(ranks: Iterable[tuple[int, int]]) -> range:
    return range(max(tensor for tensor, _ in ranks) + 1)


def stage_ranks(ranks: Iterable[tuple[int, int]]) -> range:
    return range(max(stage for _, stage in ranks) + 1)
