"""What a tokenizer's files say about it, read as data: its tokens, which of them are special, and their ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.store import Span

FAST, PIECES, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
VOCAB, ADDED, SPECIAL = "vocab.json", "added_tokens.json", "special_tokens_map.json"
DECODER = "added_tokens_decoder"  # in tokenizer_config.json: the tokens that it adds, by id
ORDINARY = (1, 6)  # SentencePiece's types of a piece that text is made of: normal, byte


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer.

    Attributes:
        kind: its class, as its configuration calls it.
        ids: of every token.
        special: the special tokens, those that stand whole in a text, in the order of their ids.
        roles: what some of them are for: bos_token, eos_token, ...
    """

    kind: str
    ids: dict[str, int]
    special: dict[str, int]
    roles: dict[str, str]

    @property
    def size(self) -> int:
        """Rows of an embedding that it needs."""
        return max(self.ids.values(), default=-1) + 1


def read_tokenizer(files: Mapping[str, Span]) -> TokenizerFacts | None:
    """The tokenizer among some files; None where there is none.

    Raises:
        ConfigError: a file of it is damaged.
    """
    config, roles = read_json(files, CONFIG), {**read_roles(files, SPECIAL), **read_roles(files, CONFIG)}
    beside = read_json(files, ADDED) | decoder_ids(config)
    if FAST in files:
        kind, ids, special = read_fast(files[FAST])
    elif PIECES in files:
        kind, ids, special = read_pieces(files[PIECES])
    elif VOCAB in files:
        kind, ids, special = "BPE", read_json(files, VOCAB), {}
    else:
        return None
    ids = beside | ids
    special = beside | special | {token: ids[token] for token in roles.values() if token in ids}
    ordered = dict(sorted(special.items(), key=lambda item: item[1]))
    return TokenizerFacts(str(config["tokenizer_class"]) if "tokenizer_class" in config else kind, ids, ordered, roles)


def read_json(files: Mapping[str, Span], name: str) -> dict[str, Any]:
    """A file that holds a mapping; empty where there is none."""
    if name not in files:
        return {}
    try:
        return dict(json.loads(files[name].bytes()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{files[name]}: damaged ({error})") from None


def read_roles(files: Mapping[str, Span], name: str) -> dict[str, str]:
    """bos_token and the like of a file that names them; a token is text, or a mapping with its content."""
    found = {}
    for key, value in read_json(files, name).items():
        token = value["content"] if isinstance(value, dict) and "content" in value else value
        if key.endswith("_token") and isinstance(token, str):
            found[key] = token
    return found


def decoder_ids(config: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that tokenizer_config.json adds, by id."""
    added = config.get(DECODER) or {}
    return {token["content"]: int(number) for number, token in added.items() if token["special"]}


def read_fast(file: Span) -> tuple[str, dict[str, int], dict[str, int]]:
    """The model, the ids and the special tokens of a tokenizer.json."""
    try:
        tree = json.loads(file.bytes())
        vocab, added = tree["model"]["vocab"], tree["added_tokens"]
        if isinstance(vocab, list):  # Unigram: tokens with their scores
            vocab = {token: number for number, (token, _) in enumerate(vocab)}
        ids = dict(vocab) | {token["content"]: token["id"] for token in added}
        special = {token["content"]: token["id"] for token in added if token["special"]}
        return str(tree["model"]["type"]) if "type" in tree["model"] else "tokenizers", ids, special
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged ({error!r})") from None


def read_pieces(file: Span) -> tuple[str, dict[str, int], dict[str, int]]:
    """The same of a SentencePiece model."""
    pieces = parse(file).pieces
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    special = {piece.piece: number for number, piece in enumerate(pieces) if piece.type not in ORDINARY}
    return "SentencePiece", ids, special


def parse(file: Span) -> Any:
    """A SentencePiece model as its protocol buffer.

    Raises:
        ConfigError: it is none.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.bytes())
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise ConfigError(f"{file}: not a SentencePiece model")
    return model
