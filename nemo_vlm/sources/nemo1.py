"""Archives of NeMo 1.x, as a tar or extracted: Llama-style language models and NeVA, with or without Megatron-Core.

    model_config.yaml                                       the branch `model` of the run's settings
    model_weights.ckpt                                      one rank
    mp_rank_TT/  tp_rank_TT_pp_rank_PPP/model_weights.ckpt  one file for each rank
    model_weights/.metadata, *.distcp, common.pt            distributed, of type torch_dist; zarr is refused
    HASH_tokenizer.model                                    named `nemo:HASH_tokenizer.model` in the settings

What was frozen is not in it: an archive of NeVA's pretraining holds its projector only, one of its tuning no tower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_vlm.archive import INSIDE, open_store, read_config
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.rank_files import RankFiles, is_gated
from nemo_vlm.formats.reader import Joined, Reader, Renamed, chosen
from nemo_vlm.formats.stacked import Unstacked, single_layers
from nemo_vlm.formats.store import Span, Store
from nemo_vlm.formats.torch_dist import METADATA, TorchDist
from nemo_vlm.mapping import Ours, check
from nemo_vlm.models.base import family
from nemo_vlm.sources.megatron import EMBEDDINGS, HEAD, LEFT_OUT, PADDING, check_objects, padding_of, trimmed
from nemo_vlm.sources.nemo1_settings import settings_of
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import read_model

WEIGHTS = "model_weights/"
ADAPTER, TOWER = "embedding.word_embeddings.adapter_layer.", "embedding.word_embeddings.vision_encoder."
# Names from before Megatron-Core, then its.
LEGACY = {
    "language_model.": "",
    "encoder.layers.": "decoder.layers.",
    "encoder.final_layernorm.": "decoder.final_layernorm.",
    ".self_attention.query_key_value.": ".self_attention.linear_qkv.",
    ".self_attention.dense.": ".self_attention.linear_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.linear_fc1.",
    ".mlp.dense_4h_to_h.": ".mlp.linear_fc2.",
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".post_attention_layernorm.": ".mlp.linear_fc1.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
PROJECTOR = re.compile(
    r"(?:mm_projector_adapter\.mm_projector|mm_linear_adapter\.linear)\.(?:(?P<index>\d+)\.)?(?P<kind>weight|bias)"
)


def open_nemo1(path: Path) -> Source:
    """A whole model, or the parts of one that were trained.

    Raises:
        ConfigError: the settings or the weights are of something that is not built here.
    """
    store = open_store(path)
    saved = read_config(store)
    weights = open_weights(store)
    if isinstance(weights, RankFiles):
        check_objects(weights)
    by_name = {ours_of(name): name for name in weights.names() if not LEFT_OUT.fullmatch(name)}
    tower = Renamed(weights, {new.removeprefix(TOWER): old for new, old in by_name.items() if new.startswith(TOWER)})
    rest = Renamed(weights, {new: old for new, old in by_name.items() if not new.startswith(TOWER)})
    files = artifacts(store, saved)
    tree = settings_of(saved, rest, tower, str(path))
    if "vocab_size" in tree and (size := tokenizer_size(files, saved)):
        tree["vocab_size"] = min(tree["vocab_size"], size)
    padding = max(padding_of(saved), PADDING)  # NeMo's converters keep what other sizes have padded
    return Source(path, tree, translated(tree, rest, tower, padding), files)


def open_weights(store: Store) -> RankFiles | Unstacked:
    """The tensors under their names in the files.

    Raises:
        ConfigError: they are damaged, or in zarr.
    """
    if f"{WEIGHTS}{METADATA}" in store.names():
        return single_layers(TorchDist(store, WEIGHTS))
    if any(name.startswith(WEIGHTS) and name.endswith("/.zarray") for name in store.names()):
        raise ConfigError(f"{store}: its weights are in zarr, which is not read; let NeMo save them as torch_dist")
    return RankFiles(store, "", lambda name: is_gated(ours_of(name), ("language_model.decoder.",)))


def ours_of(name: str) -> str:
    """Our name of a tensor; a tower's stays Hugging Face's, behind TOWER."""
    name = name.removeprefix("model.").removeprefix("module.")
    front = name.find(TOWER)
    if front >= 0:
        return name[front:]
    front = name.find(ADAPTER)
    if front >= 0:
        found = PROJECTOR.fullmatch(name[front + len(ADAPTER) :])
        return f"vision_projection.{int(found['index'] or 0) // 2}.{found['kind']}" if found else name
    for old, new in LEGACY.items():
        name = name.replace(old, new)
    return f"language_model.{name}"


def translated(tree: Mapping[str, Any], rest: Renamed, tower: Renamed, padding: int) -> Reader:
    """Our names, all of a module or nothing of it; the vocabulary without padding.

    Raises:
        ConfigError: a tensor is missing, left over, or of another shape.
    """
    name = tree["family"]
    model, mapping = read_model(tree, family(name, "config").Config)["model"], family(name, "mapping")
    held = {tensor.split(".")[0] for tensor in rest.names()}
    needed = {rule.ours: rule.shape for rule in mapping.rules(model) if rule.ours.split(".")[0] in held}
    vocabulary = {tensor: model.vocab_size for tensor in (EMBEDDINGS, HEAD) if tensor in needed}
    found = trimmed(rest, vocabulary, padding)
    check(found, needed)
    if not tower.names():
        return found
    vision = model.mm_cfg.vision_encoder
    kept = chosen(tower, [vision.hf_prefix]) if vision.hf_prefix else tower
    return Joined([found, Ours(mapping.vision_rules(vision, "vision_model.", vision.hf_prefix), kept)])


def artifacts(store: Store, saved: Mapping[str, Any]) -> dict[str, Span]:
    """The tokenizer's files inside the archive, under the names that they had before it."""
    found: dict[str, Span] = {}
    for value in (saved.get("tokenizer") or {}).values():
        if isinstance(value, str) and value.startswith(INSIDE):
            inside = value.removeprefix(INSIDE)
            name = re.sub(r"^[0-9a-f]{32}_", "", PurePosixPath(inside).name)
            if name in ("", ".", "..") or "/" in name:
                raise ConfigError(f"{store}: model_config.yaml: tokenizer: '{value}' is no name of a file")
            found[name] = store.span(inside)
    return found


def tokenizer_size(files: Mapping[str, Span], saved: Mapping[str, Any]) -> int | None:
    """Tokens of a SentencePiece model: what follows is padding; None where NeMo adds others to it, or has another."""
    settings = saved.get("tokenizer") or {}
    models = [span for name, span in files.items() if name.endswith(".model")]
    if len(models) != 1 or settings.get("sentencepiece_legacy") or settings.get("additional_special_tokens"):
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_proto=models[0].bytes()).get_piece_size())
    except RuntimeError as error:
        raise ConfigError(f"{models[0]}: not a SentencePiece model ({' '.join(str(error).split())})") from None
