"""Megatron's own directories, torch_dist or a file for each rank, as Megatron-LM and its derivatives write them.

DIR/latest_checkpointed_iteration.txt     "release" or a number
DIR/release/ or DIR/iter_0000020/         .metadata, *.distcp, common.pt; or mp_rank_TT[_PPP]/model_optim_rng.pt
DIR/config.json, DIR/tokenizer.json ...   Hugging Face's, which Megatron leaves alone and its converters put there
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.config import LanguageConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import torch_file
from nemo_vlm.formats.rank_files import RankFiles, is_gated
from nemo_vlm.formats.reader import Reader, Renamed, Shape, Slices, listed, whole
from nemo_vlm.formats.stacked import single_layers
from nemo_vlm.formats.store import Folder, Span
from nemo_vlm.formats.torch_dist import METADATA, TorchDist
from nemo_vlm.formats.unpickle import Record
from nemo_vlm.mapping import SEPARATE_NORMS, Variant, check
from nemo_vlm.models.base import FAMILIES, family
from nemo_vlm.sources.huggingface import companions, known_types, processing, read_hf_config
from nemo_vlm.sources.megatron_args import check_args, from_args
from nemo_vlm.sources.megatron_experts import with_joint_experts
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import plain

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
MISSPELT = "_lastest_checkpointed_iteration.txt"  # as MindSpeed-MM's first converter calls it
DECODER, TOWER = "language_model.decoder.", "vision_model.layers."
# What a checkpoint holds beside weights: optimizer, random numbers, Transformer Engine's scales, computed frequencies.
LEFT_OUT = re.compile(
    r"(?:chained_\d+\.)?optimizer\..*|rng_state(?:/.*)?|.*\._extra_state(?:/.*)?|.*rotary_pos_emb\.inv_freq"
)
# Where a checkpoint does not say what its vocabulary was padded to: 128 for each of 8 tensor-parallel ranks is the most
# that is usual, and less than a tokenizer of another model would differ by.
PADDING = 1024
EMBEDDINGS, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
FOR_HEAD = "word_embeddings_for_head"  # what older versions call a tied output layer


@dataclass(frozen=True)
class Trimmed:
    """A reader's tensors, some of which are read up to a row only."""

    reader: Reader
    rows: Mapping[str, int]

    def __str__(self) -> str:
        return str(self.reader)

    def names(self) -> set[str]:
        return self.reader.names()

    def shape(self, name: str) -> Shape:
        shape = self.reader.shape(name)
        return (min(shape[0], self.rows[name]), *shape[1:]) if name in self.rows else shape

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(name)

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        return self.reader.read(name, slices or whole(self.shape(name)))


def trimmed(reader: Reader, rows: Mapping[str, int], padding: int) -> Trimmed:
    """Without the vocabulary's padding.

    Args:
        rows: of tensors of the vocabulary.
        padding: what the vocabulary was padded to a multiple of, which padding cannot reach.
    Raises:
        ConfigError: there are more rows than that: they are no padding, but the vocabulary is another.
    """
    for name, count in rows.items():
        if name in reader.names() and reader.shape(name) and reader.shape(name)[0] - count >= padding:
            raise ConfigError(
                f"{reader}: the tensor '{name}' has {reader.shape(name)[0]} rows for a vocabulary of {count}; padding "
                f"adds less than {padding}: the vocabulary's size or its tokenizer is not this checkpoint's"
            )
    return Trimmed(reader, rows)


def is_megatron(path: Path) -> bool:
    return tracker(path).is_file() or holds_weights(path)


def tracker(path: Path) -> Path:
    """The file that names the last iteration."""
    return path / (MISSPELT if (path / MISSPELT).is_file() and not (path / TRACKER).is_file() else TRACKER)


def holds_weights(path: Path) -> bool:
    """Whether this is one iteration's directory."""
    return (path / METADATA).is_file() or any(path.glob("mp_rank_*/model_optim_rng.pt"))


def iteration_folder(path: Path, iteration: str | None = None) -> Path:
    """The directory of one iteration.

    Args:
        iteration: a number or "release"; None: the one that the tracker names.
    Raises:
        ConfigError: there is none.
    """
    if holds_weights(path) and iteration is None:
        return path
    if iteration is None:
        try:
            iteration = tracker(path).read_text().strip()
        except OSError as error:
            raise ConfigError(f"{tracker(path)}: cannot be read ({error.strerror})") from None
    if iteration != RELEASE and not iteration.isdecimal():
        raise ConfigError(f"{tracker(path)}: names the iteration '{iteration}', must be a number or release")
    folder = path / (RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}")
    if not holds_weights(folder):
        found = sorted(entry.name for entry in path.iterdir() if holds_weights(entry))
        raise ConfigError(f"{folder}: holds no checkpoint; there are {', '.join(found) or 'none'}")
    return folder


def open_megatron(path: Path, iteration: str | None = None, hf_config: Path | None = None) -> Source:
    """A checkpoint whose configuration is a config.json or Megatron's arguments.

    Args:
        iteration: as iteration_folder's.
        hf_config: a directory with Hugging Face's config.json, where none stands beside the checkpoint.
    Raises:
        ConfigError: the configuration is not known, or the weights are not its.
    """
    folder = iteration_folder(path, iteration)
    weights, args = open_weights(folder)
    mute = tuple(variant.name_of(DECODER) for variant in variants() if not variant.args_tell)
    if any(name.startswith(mute) for name in weights.names()):
        args = None
    places = [place for place in (hf_config, path, folder, folder.parent) if place is not None]
    beside = next((place for place in places if (place / "config.json").is_file()), None)
    if hf_config is not None and beside is not hf_config:
        raise ConfigError(f"--hf-config={hf_config}: there is no config.json")
    if beside is not None:
        name, config = from_config_json(beside)
        check_args(args or {}, config, f"{folder}", f"{beside / 'config.json'}")
    elif args is not None and not any(name.startswith(beginnings(TOWER)) for name in weights.names()):
        name, config = "gpt", from_args(args, str(folder))
    else:
        raise ConfigError(
            f"{folder}: does not say all of the model; copy Hugging Face's config.json to {path}, or convert it by "
            "scripts/convert_megatron.py with --hf-config, a directory that has it"
        )
    files = tokenizer_files([beside, *places])
    tree = {"family": name, **plain(config), "data": processing(name, config, files)}
    return Source(path, tree, translated(weights, name, config, padding_of(args or {})), files)


def open_weights(folder: Path) -> tuple[TorchDist | RankFiles, dict[str, Any] | None]:
    """The tensors under their names in the files, and Megatron's arguments, if they were kept."""
    store = Folder(folder)
    if METADATA not in store.names():
        gated = beginnings(DECODER)  # the language models, whose fc1 is a gate and an up projection
        ranks = RankFiles(store, "", lambda name: is_gated(name, gated))
        return ranks, args_of(ranks.content)
    common = torch_file.load(store.span("common.pt")) if "common.pt" in store.names() else {}
    return TorchDist(store), args_of(common)


def args_of(content: Any) -> dict[str, Any] | None:
    args = content.get("args") if isinstance(content, dict) else None
    return args.fields() if isinstance(args, Record) else None


def padding_of(args: Mapping[str, Any]) -> int:
    """What Megatron pads the vocabulary to a multiple of, by its arguments."""
    sizes = [args.get(name) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size")]
    return math.prod(sizes) if all(type(size) is int and size > 0 for size in sizes) else PADDING


def from_config_json(folder: Path) -> tuple[str, LanguageConfig]:
    """The family and architecture that a config.json describes."""
    hf, called = read_hf_config(folder), str(folder / "config.json")
    for name in FAMILIES:
        mapping = family(name, "mapping")
        if hf["model_type"] in mapping.HF_TYPES:
            return name, mapping.from_hf(hf, set(), called)
    raise ConfigError(
        f"{called}: model_type={hf['model_type']} is not known here; there are {', '.join(sorted(known_types()))}"
    )


def variants() -> Iterator[Variant]:
    """Of all families."""
    for name in FAMILIES:
        yield from family(name, "mapping").MEGATRON_VARIANTS.values()


def beginnings(ours: str) -> tuple[str, ...]:
    """What this beginning of our names is in the derivatives of Megatron."""
    return tuple(sorted({ours, *(variant.name_of(ours) for variant in variants())}))


def check_objects(weights: TorchDist | RankFiles) -> None:
    """Raises ConfigError where something stands beside the tensors that is neither known nor one."""
    if unknown := sorted(entry for entry in weights.objects if not LEFT_OUT.fullmatch(entry)):
        raise ConfigError(f"{weights}: holds things that are no tensors and not known: {listed(unknown)}")


def translated(weights: TorchDist | RankFiles, name: str, config: LanguageConfig, padding: int) -> Reader:
    """A model's tensors under our names, without the vocabulary's padding.

    Args:
        padding: as trimmed's.
    Raises:
        ConfigError: a tensor is missing, left over, or of another shape.
    """
    mapping = family(name, "mapping")
    reader = with_joint_experts(weights) if isinstance(weights, RankFiles) else single_layers(weights)
    needed = {rule.ours: rule.shape for rule in mapping.rules(config)}
    check_objects(weights)
    kept = {original for original in reader.names() if not LEFT_OUT.fullmatch(original)}
    originals = named(kept, needed, mapping.MEGATRON_VARIANTS.values())
    if config.share_embeddings_and_output_weights:
        heads = {variant.name_of(HEAD) for variant in mapping.MEGATRON_VARIANTS.values()}
        drop_copies(reader, originals, heads | {head.replace("output_layer", FOR_HEAD) for head in heads})
    vocabulary = {name: config.vocab_size or 0 for name in (EMBEDDINGS, HEAD) if name in needed}
    found = trimmed(Renamed(reader, originals), vocabulary, padding)
    check(found, needed)
    return found


def named(originals: Collection[str], needed: Collection[str], known: Iterable[Variant]) -> dict[str, str]:
    """The names in the files by ours, or by themselves, as the derivative of Megatron has them that they fit best."""
    best: dict[str, str] = {}
    for variant in (Variant({}), *known):
        ours = {fused(variant.name_of(name)): name for name in needed}
        found = {ours.get(fused(original), original): original for original in sorted(originals)}
        best = max(best, found, key=lambda names: len(names.keys() & needed))
    return best


def fused(name: str) -> str:
    """Norms as Transformer Engine calls them, in the linear layer behind."""
    for inside, alone in SEPARATE_NORMS.items():
        name = name.replace(alone, inside)
    return name


def drop_copies(reader: Reader, originals: dict[str, str], copies: Iterable[str]) -> None:
    """The last stage repeats tied embeddings.

    Raises:
        ConfigError: it has others.
    """
    for copy in copies:
        if copy not in originals or EMBEDDINGS not in originals:
            continue
        if not torch.equal(reader.read(originals.pop(copy)), reader.read(originals[EMBEDDINGS])):
            raise ConfigError(f"{reader}: the model ties its embeddings, but '{copy}' differs from them")


def tokenizer_files(places: Iterable[Path | None]) -> dict[str, Span]:
    """Tokenizer and processor files of the first place that has any."""
    for place in places:
        if place is not None and (files := companions(Folder(place))):
            return files
    return {}
