"""An answer on the terminal while it is made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from nemo_vlm.inference.generate import BROKEN, Answer, Row, text_before

BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's token of one; more of them may yet make another character of it


@dataclass
class Stream:
    """Writes one answer, as `generate` lets it be heard: together exactly its text, and the end of the line.

    What further tokens may change is held back: half a character, and what an end string may begin with.
    """

    tokenizer: Any
    strings: Sequence[str]
    file: IO[str]
    written: int = field(default=0, init=False)  # characters

    def hear(self, rows: Sequence[Row]) -> None:
        """Take the one row that there is."""
        (row,) = rows
        text = (
            self.settled(row.tokens)
            if row.running
            else Answer(torch.tensor(row.tokens), row.end_string).text(self.tokenizer) + "\n"
        )
        if len(text) > self.written:
            self.file.write(text[self.written :])
            self.file.flush()
            self.written = len(text)

    def settled(self, tokens: Sequence[int]) -> str:
        """What of the answer's text stays as it is, whatever comes."""
        count = len(tokens)
        while count and self.is_open(tokens[count - 1]):
            count -= 1
        whole = torch.tensor(tokens[:count], dtype=torch.int64)
        text = self.tokenizer.decode(whole).rstrip(BROKEN)
        settled = text_before(whole, len(text) - beginning(text, self.strings), self.tokenizer)
        return settled.rstrip(BROKEN)  # a special token may have stood behind half a character

    def is_open(self, token: int) -> bool:
        """Whether what stands behind a token may make something else of it, or it is not seen anyway."""
        name = str(self.tokenizer.convert_ids_to_tokens(token))  # None is one of the padding of a vocabulary
        return BYTE.fullmatch(name) is not None or name in self.tokenizer.all_special_tokens


def beginning(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of the text may be the first ones of one of the strings, at most."""
    lengths = [length for string in strings for length in range(1, len(string)) if text.endswith(string[:length])]
    return max(lengths, default=0)
