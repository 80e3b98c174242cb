"""Hugging Face's directories: config.json, safetensors or pytorch_model.bin, tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import torch_file
from nemo_vlm.formats.reader import InMemory, Reader, Renamed, chosen
from nemo_vlm.formats.safetensors import Safetensors
from nemo_vlm.formats.store import Folder, Span
from nemo_vlm.mapping import Ours, Rule, Swapped, rename
from nemo_vlm.models.base import FAMILIES, family
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import plain

# Buffers that older versions of transformers wrote, and newer ones compute.
COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
# What a tokenizer and a processor are made of; the rest of a directory is weights, config.json and documentation.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "generation_config.json",
)
PROCESSOR_FILES = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}

log = logging.getLogger(__name__)


def is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file()


def open_huggingface(path: Path) -> Source:
    """A whole model, or a vision tower.

    Raises:
        ConfigError: an architecture that no family has, or weights that are not its.
    """
    store, called = Folder(path), str(path / "config.json")
    hf = read_hf_config(path)
    kind = hf["model_type"]
    for name in FAMILIES:
        mapping = family(name, "mapping")
        if kind in mapping.HF_TYPES:
            theirs = canonical(open_weights(store), mapping.HF_VARIANTS)
            with told_of(called):
                config = mapping.from_hf(hf, theirs.names(), called)
            if config.share_embeddings_and_output_weights:
                theirs = without_copied_head(theirs)
            ours, files = Ours(as_in_file(mapping.rules(config), theirs), theirs), companions(store)
            tree = {"family": name, **plain(config), "data": processing(name, config, files)}
            return Source(path, tree, ours, files)
        if kind in mapping.VISION_TYPES:
            return open_tower(path, name, hf)
    raise ConfigError(f"{called}: model_type={kind} is not known here; there are {', '.join(sorted(known_types()))}")


def open_tower(path: Path, name: str, hf: Mapping[str, Any]) -> Source:
    """The vision tower of a CLIP or SigLIP, whose text model is left alone."""
    mapping, weights = family(name, "mapping"), canonical(open_weights(Folder(path)), {})
    with told_of(str(path / "config.json")):
        fields = mapping.vision_from_hf(hf, weights.names(), str(path / "config.json"))
        prefix = fields.pop("hf_prefix")  # of this file, not of a LLaVA to be
        rules = mapping.vision_rules(family(name, "config").VisionConfig(**fields), "vision_model.", prefix)
    tree = {"family": name, "mm_cfg": {"vision_encoder": fields}}
    return Source(path, tree, Ours(rules, chosen(weights, [prefix])))


@contextmanager
def told_of(file: str) -> Iterator[None]:
    """Values that no model can have are the file's fault, in whatever way they fail."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error) if file in str(error) else f"{file}: {error}") from None
    except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:
        raise ConfigError(f"{file}: describes no model ({error!r})") from None


def known_types() -> set[str]:
    mappings = [family(name, "mapping") for name in FAMILIES]
    return {kind for mapping in mappings for kind in (*mapping.HF_TYPES, *mapping.VISION_TYPES)}


def read_hf_config(path: Path) -> dict[str, Any]:
    """config.json with the defaults of its class filled in; no code of the directory is run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    file = path / "config.json"
    try:
        kind = json.loads(file.read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a configuration of a model ({error!r})") from None
    if not isinstance(kind, str) or kind not in known_types():
        return {"model_type": kind}  # refused by its reader, who knows what there is
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict()
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"{file}: cannot be read ({' '.join(str(error).split())[:300]})") from None


def open_weights(store: Folder) -> Reader:
    """The tensors of a directory under the names in its files.

    Raises:
        ConfigError: there are none, or a file is missing or damaged.
    """
    for index, single, reader in (
        ("model.safetensors.index.json", "model.safetensors", Safetensors),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", open_pickled),
    ):
        if (store.path / index).is_file():
            return reader(store, indexed(store, index))
        if (store.path / single).is_file():
            return reader(store, [single])
    raise ConfigError(f"{store}: holds neither model.safetensors nor pytorch_model.bin, nor an index of several")


def indexed(store: Folder, index: str) -> set[str]:
    """The files that an index names.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return {str(file) for file in json.loads(store.span(index).bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{store.path / index}: damaged ({error!r})") from None


def open_pickled(store: Folder, files: Iterable[str]) -> InMemory:
    """Files of torch.save, read in place by an unpickler that executes nothing."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(files):
        found = torch_file.load(store.span(file))
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ConfigError(f"{store.path / file}: holds something else than tensors by name")
        if twice := found.keys() & tensors.keys():
            raise ConfigError(f"{store}: the tensor '{min(twice)}' stands in {file} and in another file")
        tensors |= found
    return InMemory(tensors, str(store))


def canonical(weights: Reader, variants: Mapping[str, str]) -> Renamed:
    """Without what is computed, and under the names that rules have.

    Raises:
        ConfigError: a tensor stands there under two names.
    """
    originals: dict[str, str] = {}
    for name in weights.names():
        if name.endswith(COMPUTED):
            continue
        old, new = next(((old, new) for old, new in variants.items() if name.startswith(old)), ("", ""))
        known = new + name.removeprefix(old)
        if known in originals:
            raise ConfigError(f"{weights}: {name} and {originals[known]} are the same tensor")
        originals[known] = name
    return Renamed(weights, originals)


def without_copied_head(theirs: Renamed) -> Renamed:
    """Some checkpoints with tied embeddings hold them twice.

    Raises:
        ConfigError: the two are not equal.
    """
    heads = [name for name in theirs.names() if name.endswith("lm_head.weight")]
    embeddings = [name for name in theirs.names() if name.endswith("embed_tokens.weight")]
    for head, embedding in product(heads, embeddings):
        if not torch.equal(theirs.read(head), theirs.read(embedding)):
            raise ConfigError(f"{theirs}: tie_word_embeddings is true, but {head} is not {embedding}")
    kept = {name: original for name, original in theirs.originals.items() if name not in heads}
    return Renamed(theirs.reader, kept)


def as_in_file(rules: list[Rule], theirs: Reader) -> list[Rule]:
    """The rules for a file whose experts have their axes as on the hub, or as transformers 5 keeps and saves them.

    The latter is ours. Shapes tell, unless a tensor is square; of the two of a layer at most one is.

    Raises:
        ConfigError: some are laid out in the one way, and some in the other.
    """
    turned = {rule.their_name: rule for rule in rules if isinstance(rule, Swapped)}
    shapes = {name: theirs.shape(name) for name in sorted(turned.keys() & theirs.names())}
    not_hubs = [name for name, shape in shapes.items() if shape != turned[name].theirs[name]]
    not_fives = [name for name, shape in shapes.items() if shape != turned[name].shape]
    if not_hubs and not not_fives:
        return [rename(rule.ours, rule.their_name, rule.shape) if isinstance(rule, Swapped) else rule for rule in rules]
    if not_hubs and not_fives and not set(not_hubs) & set(not_fives):
        raise ConfigError(
            f"{theirs}: the tensor '{not_fives[0]}' is laid out as on the hub, '{not_hubs[0]}' as transformers 5 saves "
            "it; all experts must be one or the other"
        )
    return rules


def processing(name: str, config: Any, files: Mapping[str, Span]) -> dict[str, Any]:
    """The branch `model.data` as far as the directory's processor says it; what ours does otherwise is logged."""
    read = {}
    for file in PROCESSOR_FILES & files.keys():
        try:
            read[file] = dict(json.loads(files[file].bytes()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{files[file]}: damaged ({error!r})") from None
    data, different = family(name, "processor").data_from_hf(read, config)
    for difference in different:
        log.warning("%s: %s", files[max(read)], difference)
    return data


def companions(store: Folder) -> dict[str, Span]:
    """Tokenizer and processor files."""
    files = [*store.path.glob("*"), *store.path.glob("additional_chat_templates/*")]
    names = sorted(file.relative_to(store.path).as_posix() for file in files if file.is_file())
    return {name: store.span(name) for name in names if any(fnmatch(name, pattern) for pattern in COMPANIONS)}
