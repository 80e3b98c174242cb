"""A file of torch.save, which is a zip of a pickle and of the memory of tensors, read in place."""

from __future__ import annotations

import struct
import zipfile
from typing import Any

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.store import Span, SpanFile
from nemo_vlm.formats.unpickle import Storage, unpickle

LOCAL_HEADER, SIGNATURE = 30, b"PK\x03\x04"
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number with which torch before 1.6 began


def load(file: Span) -> Any:
    """What torch.load would give: tensors are views of the file, and in place of objects there are `Record`s.

    Raises:
        ConfigError: it is no such file, is damaged, or its pickle names what no data needs.
    """
    members = directory(file)
    tables = [name for name in members if name.endswith("/data.pkl")]
    if len(tables) != 1:
        raise ConfigError(f"{file}: not a file of torch.save: it holds {len(tables)} members data.pkl")
    folder = tables[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and members[f"{folder}byteorder"].bytes() != b"little":
        raise ConfigError(f"{file}: was written on a big-endian machine, which is not supported")

    def storage(key: Any) -> Storage:
        kind, dtype, name, _, count = key
        span = members[f"{folder}data/{name}"]
        if kind != "storage" or count * dtype.itemsize > span.size:
            raise ValueError(f"{count} elements of {dtype} in the {span.size} bytes of data/{name}")
        return Storage(span.part(0, count * dtype.itemsize), dtype)

    return unpickle(members[tables[0]].bytes(), str(file), storage)


def directory(file: Span) -> dict[str, Span]:
    """The members of an uncompressed zip.

    Raises:
        ConfigError: it is none.
    """
    if file.bytes(0, min(file.size, len(OLD_FORMAT))) == OLD_FORMAT:
        raise ConfigError(
            f"{file}: was written by torch before 1.6 in its old format; rewrite it with a newer torch: "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        with zipfile.ZipFile(SpanFile(file)) as archive:
            return {info.filename: content(file, info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise ConfigError(f"{file}: cut short, damaged, or not a file of torch.save ({error})") from None


def content(file: Span, info: zipfile.ZipInfo) -> Span:
    """Where a member's bytes lie: behind its own header, whose length the zip's directory does not tell."""
    header = file.bytes(info.header_offset, LOCAL_HEADER)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or not header.startswith(SIGNATURE):
        raise ConfigError(f"{file}: its member {info.filename} is compressed or damaged")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return file.part(info.header_offset + LOCAL_HEADER + name_length + extra_length, info.file_size)
