"""Run the benchmarks one after another and write docs/benchmarks.md.

    python scripts/benchmarks/all.py [--only NAME ...]

Each runs in a process of its own, which another's failure does not stop; its figures stand in build/bench/. The
document tells all that stand there: with --only those named are measured again, the others are told as they were. The
exit code is 1 where one could not run; a goal that is missed is listed. What needs a GPU is scripts/benchmarks/gpu.sh.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_vlm.files import written_whole

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parents[1]
RESULTS, DOCUMENT = ROOT / "build/bench", ROOT / "docs/benchmarks.md"
NOT_HERE = ("all", "gpu")
PATIENCE = 600  # seconds after which a benchmark is given up
HEAD = """# Benchmarks: written by `make bench`, not by hand

Ours and the peer's ran on one machine, by turns, under the settings that stand above each table; the ratio is ours to
the peer's, of medians, and in brackets stands how far it went in single rounds. `make bench` repeats all of it, `python
scripts/benchmarks/all.py --only NAME` a part.
"""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = benchmarks()
    flags.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    chosen = flags.parse_args().only
    RESULTS.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), []
    for number, name in enumerate(chosen, 1):
        print(f"\n[{number}/{len(chosen)}] {name}", flush=True)
        if reason := run(name):
            print(f"{name}: {reason}", flush=True)
            failed.append(name)
    found = {name: json.loads(result.read_text()) for name in names if (result := result_of(name)).exists()}
    write(found)
    print(f"\n{time.monotonic() - started:.0f} s; {DOCUMENT.relative_to(ROOT)} is written")
    print("\n".join(["missed:", *missed(found)]) if any(missed(found)) else "no goal is missed")
    if failed:
        sys.exit(f"could not run: {', '.join(failed)}")


def benchmarks() -> list[str]:
    """The scripts here that can be started, by name."""
    scripts = sorted(SCRIPTS.glob("*.py"))
    return [p.stem for p in scripts if p.stem not in NOT_HERE and '__name__ == "__main__"' in p.read_text()]


def result_of(name: str) -> Path:
    return RESULTS / f"{name}.json"


def command_of(name: str) -> str:
    return f"python scripts/benchmarks/{name}.py"


def run(name: str) -> str | None:
    """Measure; what kept it from it, or None. Its figures then also say how long it took, and when that was."""
    result, started = result_of(name), time.monotonic()
    result.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, SCRIPTS / f"{name}.py", "--json", result], cwd=ROOT)
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return f"not done after {PATIENCE} s"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code or not result.exists():
        result.unlink(missing_ok=True)
        return f"exit code {code}, no figures"
    told = {"seconds": round(time.monotonic() - started), "date": time.strftime("%Y-%m-%d")}
    figures = json.loads(result.read_text()) | told
    with written_whole(result) as file:
        file.write(json.dumps(figures, indent=1) + "\n")
    return None


def missed(found: Mapping[str, Any]) -> list[str]:
    """The rows whose goal was not reached, a line each."""
    rows = [(name, row) for name, figures in found.items() for row in figures["rows"] if not row["ok"]]
    return [f"- {name}: {row['name']}: {value(judged(row))}, goal {row['goal']}" for name, row in rows]


def judged(row: Mapping[str, Any]) -> float:
    return row["ours"] if row["ratio"] is None else row["ratio"]


def write(found: Mapping[str, Any]) -> None:
    """The document; of benchmarks without figures it tells that they are none."""
    lines = missed(found)
    parts = [HEAD, *machines(found), "## Goals that are missed\n\n" + ("\n".join(lines) or "None.") + "\n"]
    for name in benchmarks():
        parts.append("\n".join(section(name, found[name]) if name in found else [f"## {name}\n\nIt could not run.\n"]))
    with written_whole(DOCUMENT) as file:
        file.write("\n".join(parts))


def machines(found: Mapping[str, Any]) -> list[str]:
    """Where they ran: one line, or one for each machine."""
    named: dict[str, list[str]] = {}
    for name, figures in found.items():
        named.setdefault(figures["machine"], []).append(name)
    alone = len(named) == 1
    return [f"{machine}{'' if alone else ': ' + ', '.join(names)}\n" for machine, names in named.items()]


def section(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    """A benchmark's lines: what it compares, how, its settings and its table."""
    about = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text())) or ""
    what, *rest = about.split("\n\n")
    yield f"## {name}\n\n{what}\n"
    yield from (f"{part}\n" for part in rest if not part.lstrip().startswith("python "))
    yield f"`{command_of(name)}`, {figures['seconds']} s on {figures['date']}\n"
    if settings := figures["settings"]:
        yield "\n".join(f"- {key}: {setting}" for key, setting in settings.items()) + "\n"
    yield from table(figures["rows"])


def table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield "| | ours | peer | unit | ratio | goal | |"
    yield "|---|---:|---:|---|---:|---|---|"
    for row in rows:
        spread = " ({:.2f} to {:.2f})".format(*row["spread"]) if "spread" in row else ""
        verdict = "" if not row["goal"] else "reached" if row["ok"] else "**missed**"
        cells = [row["name"], value(row["ours"]), value(row["peer"]), row["unit"], value(row["ratio"]) + spread]
        yield f"| {' | '.join([*cells, row['goal'], verdict])} |"
    yield ""


def value(figure: float | None) -> str:
    """In four digits, and no powers of ten."""
    if figure is None:
        return ""
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"


if __name__ == "__main__":
    main()
