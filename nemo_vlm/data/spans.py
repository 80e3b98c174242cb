"""Where the records of a file stand: a JSON list or JSONL cut into byte spans in one pass, without parsing a record.

Which brackets and commas count depends on which quotes open and close a text; numpy finds that out for many bytes at
once, as simdjson does: a bit for each byte, 64 of them in a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy

BLOCK = 2**19  # bytes that are looked at together: all that is made of them stays in a core's cache
QUOTE, BACKSLASH, NEWLINE, COMMA = b'"\\\n,'
DEPTH = numpy.zeros(256, numpy.int8)  # what a byte outside of texts adds to the depth
DEPTH[list(b"[{")] = 1
DEPTH[list(b"]}")] = -1
# Brackets are BRACKET where this mask has ones; so are "Y", "_", "y" and DEL, which JSON has in texts only
BRACKETS, BRACKET = 0b1101_1001, 0b0101_1001
WORD = numpy.dtype("<u8")
TOP = WORD.type(63)  # a word's last bit
MAX_BLANK = 2**16  # bytes in front of the list, or in one that is empty


def find(path: Path) -> numpy.ndarray:
    """[records, 2] int64: where each record of a .jsonl, or of the list in any other file, begins and ends.

    Raises:
        ValueError: the file as a whole is no list; the message says why.
    """
    with open(path, "rb") as file:
        of_each = lines(file) if path.suffix == ".jsonl" else elements(file)
        found = numpy.concatenate([numpy.empty((0, 2), numpy.int64), *of_each])
        return found[:0] if len(found) == 1 and is_blank(file, *found[0].tolist()) else found


def is_blank(file: BinaryIO, start: int, end: int) -> bool:
    """Whether a span is what stands between the brackets of an empty list."""
    file.seek(start)
    return end - start <= MAX_BLANK and not file.read(end - start).strip()


def lines(file: BinaryIO) -> Iterator[numpy.ndarray]:
    """The lines that hold more than their end."""
    start = at = 0
    while block := file.read(BLOCK):
        ends = at + numpy.flatnonzero(numpy.frombuffer(block, numpy.uint8) == NEWLINE)
        at += len(block)
        if len(ends):
            spans = between(start, ends)
            yield spans[spans[:, 1] - spans[:, 0] > 1]
            start = int(ends[-1]) + 1
    if at > start:
        yield numpy.array([[start, at]])


def between(start: int, cuts: numpy.ndarray) -> numpy.ndarray:
    """[n, 2]: from `start` to the first of n cuts, from behind it to the next, ..."""
    return numpy.stack([numpy.concatenate([[start], cuts[:-1] + 1]), cuts], axis=1)


def elements(file: BinaryIO) -> Iterator[numpy.ndarray]:
    """The elements of a list: what stands between its brackets and the commas at their depth.

    Raises:
        ValueError: it is none, does not end, or something follows.
    """
    start = at = start_of_list(file)
    marks = Marks()
    while block := whole_escapes(file):
        cuts = at + marks.cuts(block)
        at += len(block)
        if len(cuts):
            yield between(start, cuts)
            start = int(cuts[-1]) + 1
        if marks.depth == 0:
            return check_end(file, start)
    raise ValueError(f"it ends within {'a text' if marks.inside else 'its list'}, after {at} bytes")


def start_of_list(file: BinaryIO) -> int:
    """Put the file behind the bracket that opens the list; how many bytes that are."""
    head = file.read(MAX_BLANK)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"["):
        raise ValueError("it is no list")
    return file.seek(len(head) - len(text) + 1)


def whole_escapes(file: BinaryIO) -> bytes:
    """The next block; it does not end between a backslash and what that escapes."""
    block = file.read(BLOCK)
    while block.endswith(b"\\") and (more := file.read(1)):
        block += more
    return block


def check_end(file: BinaryIO, end: int) -> None:
    """Only blanks may follow."""
    file.seek(end)
    while block := file.read(BLOCK):
        if block.strip():
            raise ValueError(f"something follows its list, after {end} bytes")


class Marks:
    """The brackets and commas outside of texts, block by block, from behind the bracket that opens the list."""

    def __init__(self) -> None:
        self.inside, self.depth = False, 1  # of a text, of brackets, at the end of the last block

    def cuts(self, block: bytes) -> numpy.ndarray:
        """Offsets of the commas at depth 1, and of the bracket that closes the list, after which nothing is read."""
        data = numpy.frombuffer(block, numpy.uint8)
        inside = texts(unescaped_quotes(data), self.inside)
        self.inside = bool(inside[-1] >> TOP)
        marks = places(words(((data & BRACKETS) == BRACKET) | (data == COMMA)) & ~inside)
        kinds = data[marks]
        depths = self.depth + numpy.cumsum(DEPTH[kinds], dtype=numpy.int64)
        cut = ((kinds == COMMA) & (depths == 1)) | (depths == 0)
        if (closed := numpy.flatnonzero(depths == 0)).size:
            self.depth = 0
            return marks[: closed[0] + 1][cut[: closed[0] + 1]]
        self.depth = int(depths[-1]) if len(depths) else self.depth
        return marks[cut]


def words(flags: numpy.ndarray) -> numpy.ndarray:
    """Flags as bits, from the lowest on, the last word filled up with zeros."""
    found = numpy.zeros(-(-len(flags) // 64), WORD)
    found.view(numpy.uint8)[: -(-len(flags) // 8)] = numpy.packbits(flags, bitorder="little")
    return found


def places(bits: numpy.ndarray) -> numpy.ndarray:
    """Where words have ones."""
    return numpy.flatnonzero(numpy.unpackbits(bits.view(numpy.uint8), bitorder="little").view(bool))


def texts(quotes: numpy.ndarray, inside: bool) -> numpy.ndarray:
    """Of each byte, in words, whether it is in a text, the quote that opens it included.

    Args:
        inside: whether the first is, unless it is a quote.
    """
    bits = quotes
    for shift in (1, 2, 4, 8, 16, 32):  # each bit becomes the parity of those up to it
        bits = bits ^ bits << WORD.type(shift)
    odd = numpy.logical_xor.accumulate(numpy.append(inside, bits[:-1] >> TOP != 0))
    return numpy.where(odd, ~bits, bits)


def unescaped_quotes(data: numpy.ndarray) -> numpy.ndarray:
    """Of each byte, in words, whether it is a quote behind an even number of backslashes."""
    quotes, slashes = words(data == QUOTE), words(data == BACKSLASH)
    behind = slashes << WORD.type(1)
    behind[1:] |= slashes[:-1] >> TOP
    found = places(quotes & behind)
    length, left = numpy.zeros(len(found), numpy.int64), numpy.arange(len(found))
    while len(left):
        length[left] += 1
        before = found[left] - length[left] - 1
        left = left[(before >= 0) & (data[numpy.maximum(before, 0)] == BACKSLASH)]
    escaped = numpy.zeros(len(data), bool)
    escaped[found[length % 2 == 1]] = True
    return quotes & ~words(escaped)
