"""The shape of the house: layers, confinement, budgets. Budgets may be argued down, never raised in passing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nemo_vlm"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

# Lower layers first; a module imports from its own layer or below.
LAYERS = (
    (
        "errors",
        "command_line",
        "script",
        "files",
        "logs",
        "heartbeat",
        "config",
        "typed",
        "layout",
        "options",
        "batch",
        "formats",
        "archive",
        "mapping",
        "checkpoints",
    ),
    ("mcore",),
    ("models", "data"),
    ("parallel", "sources"),
    ("training", "inference", "planning", "conversion", "porting", "scoring"),
    ("experiment",),
    ("door",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

MAX_FUNCTION, MAX_FILE, MAX_FAMILY, MAX_YAML, MAX_EXAMPLE = 60, 400, 900, 40, 15
MAX_ARGUMENTS, MAX_MEDIAN_FUNCTION, MAX_COPIED, WINDOW = 7, 25, 0.03, 8


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Everything that a file imports at run time, anywhere in it."""
    return names_in(ast.walk(runtime(TREES[path])))


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def runtime(tree: ast.Module) -> ast.Module:
    """Without `if TYPE_CHECKING:`."""
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return ast.Module(body, [])


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{module(p)}.{n.name}", n)
        for p in FILES
        for n in ast.walk(TREES[p])
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def length(function: ast.FunctionDef) -> int:
    """Lines without the docstring."""
    first = function.body[0]
    has_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", FILES, ids=module)
def test_layers(path: Path) -> None:
    own = part(module(path))
    for name in imports(path):
        if name.startswith("nemo_vlm.") and own:
            assert LEVEL[part(name)] <= LEVEL[own], f"{module(path)} imports {name}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_confinement(path: Path) -> None:
    own, names = module(path), imports(path)
    roots = {name.split(".")[0] for name in names}
    if part(own) not in ("mcore", "data"):
        assert "megatron" not in roots, "megatron.core stays in mcore/"
    if part(own) == "data":
        assert not any(name.startswith("megatron.core") for name in names)
        assert not any(name.startswith("nemo_vlm.models") for name in names), "processors are handed to data/"
    if own != "nemo_vlm.door":
        assert not roots & {"hydra", "omegaconf"}, "Hydra stays at the door"
    if part(own) in ("models", "data", "mcore"):
        assert not roots & {"pytorch_lightning", "lightning"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.parent == PACKAGE / "models"], ids=module)
def test_families_stand_alone(path: Path) -> None:
    own = path.parent.name
    families = {p.parent.name for p in (PACKAGE / "models").glob("*/config.py")}
    for name in imports(path):
        pieces = name.split(".")
        if pieces[:2] == ["nemo_vlm", "models"] and len(pieces) > 2 and pieces[2] in families:
            assert pieces[2] == own, f"{module(path)} imports the family {pieces[2]}"


WITHOUT_MEGATRON = [
    p
    for p in FILES
    if p.parent in (PACKAGE / "formats", PACKAGE / "sources", PACKAGE / "conversion", PACKAGE / "scoring")
    or (p.parent.parent == PACKAGE / "models" and p.stem in ("config", "mapping", "processor", "tiny"))
]


@pytest.mark.parametrize("path", WITHOUT_MEGATRON, ids=module)
def test_conversion_runs_without_megatron(path: Path) -> None:
    """Importing these modules imports neither Megatron nor Lightning, however indirectly."""
    paths = {module(p): p for p in FILES}
    reached, pending = set(), {module(path)}
    while pending:
        name = pending.pop()
        reached.add(name)
        pending |= (at_import(paths[name]) & paths.keys()) - reached
    outside = {found.split(".")[0] for name in reached for found in at_import(paths[name])}
    assert not outside & {"megatron", "pytorch_lightning"}, sorted(reached)


def at_import(path: Path) -> set[str]:
    """What a file imports when it is imported itself."""
    top = [node for node in runtime(TREES[path]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return names_in(top)


def test_no_import_cycle() -> None:
    known = {module(path) for path in FILES}
    graph = {module(path): {name for name in imports(path) if name in known} for path in FILES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"import cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_functions_are_short() -> None:
    lengths = {name: length(function) for name, function in functions()}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION} == {}
    short = sum(n <= MAX_MEDIAN_FUNCTION for n in lengths.values())
    assert short / len(lengths) >= 0.9


def test_functions_take_few_arguments() -> None:
    counts = {
        name: len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs)
        - (f.args.args[:1] != [] and f.args.args[0].arg == "self")
        for name, f in functions()
    }
    assert {name: n for name, n in counts.items() if n > MAX_ARGUMENTS} == {}


def test_files_are_small() -> None:
    def lines(path: Path) -> int:
        return len(path.read_text().splitlines())

    assert {module(p): lines(p) for p in FILES if lines(p) > MAX_FILE} == {}
    assert {p.name: lines(p) for p in (ROOT / "conf").rglob("*.yaml") if lines(p) > MAX_YAML} == {}
    assert {p.name: lines(p) for p in (ROOT / "examples").glob("*.py") if lines(p) > MAX_EXAMPLE} == {}
    families = defaultdict(int)
    for path in FILES:
        if path.parent.parent == PACKAGE / "models":
            families[path.parent.name] += lines(path)
    assert {name: n for name, n in families.items() if n > MAX_FAMILY} == {}


def test_no_hidden_defaults() -> None:
    pattern = re.compile(r"\b\w*(cfg|config|args|params)\w*\.get\(\s*[\"'][^\"']+[\"']\s*,")
    assert [f"{module(p)}: {m.group()}" for p in FILES for m in pattern.finditer(p.read_text())] == []


def test_inheritance_is_shallow() -> None:
    bases = {
        n.name: [b.id for b in n.bases if isinstance(b, ast.Name)]
        for p in FILES
        for n in ast.walk(TREES[p])
        if isinstance(n, ast.ClassDef)
    }

    def depth(name: str, seen: tuple[str, ...] = ()) -> int:
        return (
            0
            if name not in bases or name in seen
            else 1 + max((depth(b, (*seen, name)) for b in bases[name]), default=0)
        )

    assert {name: depth(name) for name in bases if depth(name) > 2} == {}


def test_little_is_copied() -> None:
    windows: dict[tuple[str, ...], set[Path]] = defaultdict(set)
    code = {
        path: [
            line.strip()
            for line in path.read_text().splitlines()
            if len(line.strip()) > 3 and not line.strip().startswith("#")
        ]
        for path in FILES
    }
    for path, lines in code.items():
        for i in range(len(lines) - WINDOW + 1):
            windows[tuple(lines[i : i + WINDOW])].add(path)
    copied = sum(WINDOW for paths in windows.values() if len(paths) > 1 for _ in combinations(paths, 2))
    assert copied / sum(map(len, code.values())) < MAX_COPIED
