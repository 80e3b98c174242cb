"""The opcodes of a pickle, looked over before it is loaded: nothing in it may be larger than the pickle itself.

A few bytes can ask Python's unpickler for gigabytes: it makes room for a memo's highest index, and for a length.
"""

from __future__ import annotations

import re

# Without argument; with a fixed number of bytes; with lines of text.
ALONE = rb"[()012NQR\]abdelostu}\x81\x85-\x89\x8f-\x94]"
FIXED = rb"[Kh\x80q].|M..|[Jj]....|G.{8}|\x95.{8}"
LINES = rb"[FILPSVg][^\n]*\n|[ci][^\n]*\n[^\n]*\n"
# Opcodes followed by a length of so many bytes, and by so many bytes.
COUNTED = {
    **dict.fromkeys(b"U\x8cC\x8a", 1),  # SHORT_BINSTRING, SHORT_BINUNICODE, SHORT_BINBYTES, LONG1
    **dict.fromkeys(b"TXB\x8b", 4),  # BINSTRING, BINUNICODE, BINBYTES, LONG4
    **dict.fromkeys(b"\x8d\x8e\x96", 8),  # BINUNICODE8, BINBYTES8, BYTEARRAY8
}
STOP, PUT, LONG_BINPUT = b"."[0], b"p"[0], b"r"[0]


def index_below(size: int) -> bytes:
    """A pattern of four bytes, little-endian, that are at most about `size`; exact in the highest byte of it."""
    count = max((size.bit_length() + 7) // 8, 1)
    if count > 4:
        return b"...."
    highest = size >> 8 * (count - 1)
    return b"." * (count - 1) + b"[\\x00-\\x%02x]" % highest + b"\\x00" * (4 - count)


def check(content: bytes) -> None:
    """That a pickle is whole, and that it counts and points to nothing beyond its own length.

    Raises:
        ValueError: it does not.
    """
    run = re.compile(rb"(?:%b|%b|%b|r%b)*+" % (ALONE, FIXED, LINES, index_below(len(content))), re.DOTALL)
    at = 0
    while at <= len(content):
        found = run.match(content, at)
        assert found is not None
        at = found.end()
        code = content[at] if at < len(content) else None
        if code == STOP:
            return
        if code in COUNTED:
            width = COUNTED[code]
            at += 1 + width + int.from_bytes(content[at + 1 : at + 1 + width], "little")
        elif code == PUT:
            line = content[at + 1 : max(content.find(b"\n", at), at + 1)]
            if int(line) > len(content):
                raise ValueError(f"an index of its memo is {int(line)}, in {len(content)} bytes")
            at += 2 + len(line)
        elif code == LONG_BINPUT:
            index = int.from_bytes(content[at + 1 : at + 5], "little")
            raise ValueError(f"an index of its memo is {index}, in {len(content)} bytes")
        else:
            raise ValueError("it is cut short" if code is None else f"its opcode {code:#04x} at {at} is not read")
    raise ValueError("it is cut short")
