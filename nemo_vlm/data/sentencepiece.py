"""A SentencePiece model in the guise of Hugging Face's tokenizers: NeMo's library=sentencepiece, and use_fast=false.

SentencePiece puts a space in front of every text that it is given. As in LlamaTokenizer of transformers 4, the text
behind a special token gets none, unless the tokenizer is `legacy`.
"""

from __future__ import annotations

import json
import logging
import re
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import LlamaTokenizer, SentencePieceBackend
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.tokenization_utils_tokenizers import TOKENIZER_FILE

log = logging.getLogger(__name__)

STOCK = "LlamaTokenizer"  # what transformers is to take the saved files for; data.tokenizer knows them by the backend
SPACE = "▁"
CONTROL, USER_DEFINED = 3, 4  # types of a piece
BPE = 2  # type of a model
MARK = re.compile(r"<\S+>")


class SentencePieceTokenizer(SentencePieceBackend):
    """Args:
    vocab_file: a SentencePiece model.
    legacy: a space is put in front of the text behind every special token too.
    """

    def __init__(self, vocab_file: str, legacy: bool = False, **kwargs: Any) -> None:
        content = Path(vocab_file).read_bytes()
        settings = special(content) | kwargs
        fixed = {"backend": "sentencepiece", "special_tokens_pattern": "bos" if settings["bos_token"] else "none"}
        super().__init__(vocab_file=vocab_file, legacy=legacy, **settings | fixed)
        self.content = content
        self.add_prefix_space, self.sp_model = with_spaces_kept(content)

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        once = self.add_prefix_space and not self.legacy
        tokens = super().tokenize(SPACE + text if once and text else text, *args, **kwargs)
        return tokens[1:] if once and tokens[:1] == [SPACE] and not self._added.isdisjoint(tokens[1:2]) else tokens

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        every = self.add_prefix_space and self.legacy
        return self.sp_model.encode(SPACE + text if every else text, out_type=str)

    def piece(self, text: str, first: bool) -> list[int]:
        """Ids of a text without special tokens, which begins, or goes on from another without a space in front."""
        return self.sp_model.encode(SPACE + text if first and self.add_prefix_space else text)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.joined(tokens).removeprefix(" " if self.add_prefix_space else "")

    def joined(self, tokens: list[str]) -> str:
        """The text of tokens, the space in front included."""
        runs = [(added, list(run)) for added, run in groupby(tokens, self._added.__contains__)]
        return "".join("".join(run) if added else self.sp_model.decode(run) for added, run in runs)

    @property
    def _added(self) -> set[str]:
        return {*self.added_tokens_encoder, *self.all_special_tokens}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """The model as it was; the file that it came from may be gone."""
        name = self.vocab_files_names["vocab_file"]
        path = Path(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        path.write_bytes(self.content)
        return (str(path),)

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory, TOKENIZER_CONFIG_FILE)
        stock = {"tokenizer_class": STOCK, "add_bos_token": self.bos_token is not None}
        path.write_text(json.dumps(json.loads(path.read_text()) | stock, indent=2, ensure_ascii=False))
        if not is_llamas(self.content):
            log.warning("this SentencePiece model is not of Llama's kind: stock transformers may make other tokens")
            return files
        # Beside another model's config.json, as LLaVA's, AutoTokenizer would make one without the space in front.
        fast = Path(save_directory, TOKENIZER_FILE)
        LlamaTokenizer.from_pretrained(save_directory).backend_tokenizer.save(str(fast))
        return (*files, str(fast))


def is_llamas(content: bytes) -> bool:
    """Whether a model merges, and changes nothing of a text, as LlamaTokenizer takes for granted."""
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    return model.trainer_spec.model_type == BPE and model.normalizer_spec.name == "identity"


def with_spaces_kept(content: bytes) -> tuple[bool, SentencePieceProcessor]:
    """Whether a model puts a space in front of a text; and the same model, which neither adds nor removes any."""
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    adds = model.normalizer_spec.add_dummy_prefix
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    return adds, SentencePieceProcessor(model_proto=model.SerializeToString())


def special(content: bytes) -> dict[str, Any]:
    """The roles that a model gives its tokens, and its other special tokens, as Hugging Face has them."""
    model, tree = SentencePieceProcessor(model_proto=content), sentencepiece_model_pb2.ModelProto.FromString(content)
    ids = {"unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    roles = {f"{role}_token": model.id_to_piece(number) if number >= 0 else None for role, number in ids.items()}
    others = [piece.piece for piece in tree.pieces if piece.type == CONTROL or is_mark(piece)]
    return {**roles, "extra_special_tokens": [token for token in others if token not in roles.values()]}


def is_mark(piece: Any) -> bool:
    """Whether a piece is user-defined as NeMo's <image> and <extra_id_1>, not as a word or a run of spaces."""
    return piece.type == USER_DEFINED and MARK.fullmatch(piece.piece) is not None
