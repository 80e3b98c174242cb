"""The language models' demo data: what Python's standard library says of itself, as text, token ids and a tokenizer.

Docstrings are taken from the sources of the Python that runs, with what they describe as a heading; and so are the
topics of help(). Both are under the Python Software Foundation's licence.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from nemo_vlm.data.tokenizer import train_chat_tokenizer
from nemo_vlm.files import made_once

FILES = ("docstrings",)
TEXTS, TOKENIZER = "text.jsonl", "tokenizer"
NUM_TOKENS = 2048
STDLIB = Path(sysconfig.get_paths()["stdlib"])
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "turtledemo", "pydoc_data"}
Described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """A text of the standard library.

    Attributes:
        name: of what it describes, shutil.copy.
        heading: the name, with the arguments of a function.
    """

    name: str
    heading: str
    docstring: str

    @property
    def text(self) -> str:
        return f"{self.heading}\n\n{self.docstring}\n"


def extract(root: Path = STDLIB) -> Iterator[Docstring]:
    """All docstrings of the sources in a folder, module by module in the order of their names; then the topics."""
    found = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    for path in [path for path in found if not LEFT_OUT.intersection(path.parts)]:
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in their texts
            yield from docstrings(ast.parse((root / path).read_bytes()), module)
    yield from topics()


def docstrings(node: Described, name: str) -> Iterator[Docstring]:
    """Of a module, class or function, and of what is defined in it."""
    if text := ast.get_docstring(node):
        yield Docstring(name, name + signature(node), printable(text))
    for child in node.body:
        if isinstance(child, Described):
            yield from docstrings(child, f"{name}.{child.name}")


def signature(node: Described) -> str:
    return f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""


def topics() -> Iterator[Docstring]:
    """What help() tells of the language, paragraph by paragraph of its reference."""
    from pydoc_data.topics import topics as texts

    for name, text in sorted(texts.items()):
        yield Docstring(name, name, printable(inspect.cleandoc(text)))


def printable(text: str) -> str:
    """Without what UTF-8 cannot hold."""
    return text.encode("utf-8", "ignore").decode()


def write(folder: Path, sources: Path = STDLIB) -> None:
    """Write text.jsonl, docstrings_text_document.bin and .idx, and tokenizer/, unless the folder is there already."""
    made_once(folder, partial(_write, sources=sources))


def _write(folder: Path, sources: Path) -> None:
    from nemo_vlm.data.preparation import tokenize  # which imports Megatron
    from nemo_vlm.data.tokenization import Tokenization

    found = list(extract(sources))
    random.Random(0).shuffle(found)  # so that any share of them has something of all
    with open(folder / TEXTS, "w", encoding="utf-8") as file:
        for one in found:
            file.write(json.dumps(asdict(one) | {"text": one.text}, ensure_ascii=False) + "\n")
    tokenizer = train_chat_tokenizer((one.text for one in found), NUM_TOKENS)
    tokenizer.save_pretrained(folder / TOKENIZER)
    tokenize([folder / TEXTS], folder / FILES[0], Tokenization(tokenizer, append_eod=True), workers=1)
