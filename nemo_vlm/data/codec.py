"""Texts to ids piece by piece, and back: what a tokenizer of any kind makes of a text that goes on from another.

Tokenizers of SentencePiece's kind put a space in front of a text. Pieces of one text must not get it again, or a
decoded answer would not be the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# Tokens that steer a chat, though a tokenizer may not call them special
CONTROL = re.compile(r"<\|[^|]+\|>|<extra_id_\d+>")


class Codec:
    """A tokenizer, by pieces of texts.

    Attributes:
        special: the tokens that steer, and never are a part of what somebody says, with their ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        # tokenizers.Tokenizer for a text that begins, and for one that goes on
        self._fast = None
        if tokenizer.is_fast:
            self._fast = tokenizer.backend_tokenizer, without_prefix(tokenizer.backend_tokenizer)

    def ids(self, text: str, first: bool) -> list[int]:
        """The ids of a text, which begins the sequence or goes on from another text."""
        if not text:
            return []
        if self._fast is None:
            return self.tokenizer.piece(text, first)  # SentencePieceTokenizer's
        begins, goes_on = self._fast
        return (begins if first else goes_on).encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        """What ids in the midst of a sequence say, with every space and special token of theirs."""
        anchor = self.ids(":", first=True)  # tokenizers take the space away that the first token begins with
        decoded = [self.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in (anchor, [*anchor, *ids])]
        return decoded[1].removeprefix(decoded[0])


def special_tokens(tokenizer: Any) -> dict[str, int]:
    added = tokenizer.added_tokens_decoder
    found = {token.content: number for number, token in added.items() if token.special}
    steering = {token: number for token, number in tokenizer.get_vocab().items() if CONTROL.fullmatch(token)}
    roles = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return found | steering | roles


def without_prefix(backend: Any) -> Any:
    """A tokenizers.Tokenizer that puts no space in front of a text: itself, if it never does."""
    from tokenizers import Tokenizer

    parts = [json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part]
    if all(part == unprefixed(part) for part in parts):
        return backend
    tree = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        tree[name] = unprefixed(tree[name])
    return Tokenizer.from_str(json.dumps(tree))


NO_PREFIX: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "Prepend": {"prepend": ""},
    "ByteLevel": {"add_prefix_space": False},
}


def unprefixed(part: Any) -> Any:
    """A normalizer or pre-tokenizer, as tokenizer.json describes it, that puts no space in front."""
    if isinstance(part, list):
        return [unprefixed(item) for item in part]
    if not isinstance(part, dict):
        return part
    changed = {key: unprefixed(value) for key, value in part.items()}
    return changed | NO_PREFIX[part["type"]] if part.get("type") in NO_PREFIX else changed
