"""What a checkpoint is, told without loading it: configuration, tensors, sizes, tokenizer, files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from nemo_vlm.archive import open_store
from nemo_vlm.conversion.tokenizer_files import read_tokenizer
from nemo_vlm.models.base import family
from nemo_vlm.sources.source import Source

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
SHOWN = ("family", "data", "tokenizer")  # of the settings, beside the architecture


@dataclass(frozen=True)
class Section:
    """A heading, and a table or a text below it. The first column is text, the others are set flush right."""

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    text: str = ""


def describe(source: Source) -> dict[str, Any]:
    """All there is to say, as plain containers, fit for JSON; no tensor is read."""
    reader, store = source.reader, open_store(source.path)
    names = sorted(reader.names(), key=natural)
    by_part: Counter[str] = Counter()
    by_dtype: Counter[str] = Counter()
    tensors = {}
    for name in names:
        shape, dtype = reader.shape(name), reader.dtype(name)
        called = str(dtype).removeprefix("torch.")
        tensors[name] = {"shape": list(shape), "dtype": called}
        by_part[name.partition(".")[0]] += math.prod(shape)
        by_dtype[called] += math.prod(shape) * dtype.itemsize
    return {
        "path": str(source.path),
        "family": source.family,
        "configuration": source.tree,
        "parameters": {"total": sum(by_part.values()), "by_part": dict(by_part)},
        "bytes": {"total": sum(by_dtype.values()), "by_dtype": dict(by_dtype)},
        "tensors": tensors,
        "tokenizer": describe_tokenizer(source),
        "files": {name: store.span(name).size for name in sorted(store.names())},
    }


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]


def describe_tokenizer(source: Source) -> dict[str, Any] | None:
    facts = read_tokenizer(source.files)
    if facts is None:
        return None
    return {"class": facts.kind, "size": facts.size, "special_tokens": facts.special, "roles": facts.roles}


def sections(found: dict[str, Any], every_tensor: bool) -> list[Section]:
    """What describe has found, for people.

    Args:
        every_tensor: no layers are folded into one line.
    """
    total = found["parameters"]["total"]
    parts = [(name, f"{count:,}") for name, count in found["parameters"]["by_part"].items()]
    dtypes = [(name, f"{count:,}") for name, count in found["bytes"]["by_dtype"].items()]
    listed = [(name, shown(info), info["dtype"], "1") for name, info in found["tensors"].items()]
    tensors = listed if every_tensor else folded(found["tensors"])
    files = [(name, f"{size:,}") for name, size in found["files"].items()]
    return [
        Section(found["path"], text=configuration(found)),
        Section("Tensors", ("name", "shape", "dtype", "count"), tuple(tensors)),
        Section("Parameters", ("part", "count"), (*parts, ("total", f"{total:,}"))),
        Section("Weights", ("dtype", "bytes"), (*dtypes, ("total", f"{found['bytes']['total']:,}"))),
        tokenizer_section(found["tokenizer"]),
        Section("Files", ("name", "bytes"), tuple(files)),
    ]


def configuration(found: dict[str, Any]) -> str:
    """The architecture and the data's settings as YAML; how a run was laid out and optimized is left to --json."""
    known = {field.name for field in fields(family(found["family"], "config").Config)}.union(SHOWN)
    tree = {key: value for key, value in found["configuration"].items() if key in known}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=False).rstrip()


def shown(info: dict[str, Any]) -> str:
    return str(info["shape"])


def folded(tensors: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """One line for a tensor that several layers have, with their range; in the order of the first."""
    groups: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for name, info in tensors.items():
        layer = LAYER.search(name)
        pattern = LAYER.sub("{}", name, count=1) if layer else name
        groups[pattern, shown(info), info["dtype"]].append(int(layer.group()) if layer else -1)
    return [
        (pattern.replace("{}", ranges(layers)), shape, dtype, str(len(layers)))
        for (pattern, shape, dtype), layers in groups.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def tokenizer_section(found: dict[str, Any] | None) -> Section:
    if found is None:
        return Section("Tokenizer", text="none")
    roles: defaultdict[str, list[str]] = defaultdict(list)
    for role, token in found["roles"].items():
        roles[token].append(role)
    rows = [(token, str(number), " ".join(roles[token])) for token, number in found["special_tokens"].items()]
    return Section(
        f"Tokenizer: {found['class']}, {found['size']:,} tokens", ("special token", "id", "role"), tuple(rows)
    )


def plain_text(parts: list[Section]) -> str:
    """Columns of text, for files and pipes."""
    lines = []
    for part in parts:
        lines += [part.title, *(f"  {line}" for line in part.text.splitlines())]
        widths = [max(map(len, column)) for column in zip(*part.rows, strict=True)]
        for row in part.rows:
            line = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  " + "  ".join(line).rstrip())
        lines.append("")
    return "\n".join(lines)


def print_tables(parts: list[Section]) -> None:
    console = Console(highlight=False, markup=False)
    for part in parts:
        console.print(part.title, style="bold")
        if part.text:
            console.print(part.text)
        if part.rows:
            table = Table(box=box.SIMPLE, pad_edge=False)
            for number, column in enumerate(part.columns):
                table.add_column(column, justify="right" if number else "left", overflow="fold")
            for row in part.rows:
                table.add_row(*row)
            console.print(table)


def show(source: Source, every_tensor: bool, as_json: bool) -> None:
    """Say it on stdout: tables on a terminal, else plain text, or JSON."""
    found = describe(source)
    if as_json:
        put(json.dumps(found, indent=1))
    elif sys.stdout.isatty():
        print_tables(sections(found, every_tensor))
    else:
        put(plain_text(sections(found, every_tensor)))


def put(text: str) -> None:
    """Write text; a reader that has seen enough, as head, is no error."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text.rstrip() + "\n")
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter fails when it ends
