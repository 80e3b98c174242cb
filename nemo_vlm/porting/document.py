"""The tables of Pai-Megatron-Patch's arguments, as --help lists them and as docs/from_pai.md shows them.

`python -c "from nemo_vlm.porting.document import tables; print(tables())"` prints what the page must hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nemo_vlm.porting.pai_converters import CONVERTERS
from nemo_vlm.porting.pai_rules import NODES
from nemo_vlm.porting.pai_training import QWEN2_5, QWEN2_VL, QWEN2_VL_SP, QWEN3_VL, TRAINING
from nemo_vlm.porting.table import Argument, Workflow

TOGETHER = ((QWEN2_5,), (QWEN2_VL, QWEN2_VL_SP, QWEN3_VL), CONVERTERS[:2], CONVERTERS[2:3], CONVERTERS[3:])


def listing() -> str:
    """Every workflow with its arguments and variables, as text."""
    return "\n\n".join("\n".join(described(workflow)) for workflow in (*TRAINING, *CONVERTERS))


def described(workflow: Workflow) -> Iterator[str]:
    yield f"{workflow.name}, {len(workflow.arguments)} arguments: {workflow.script}"
    for number, argument in rows(workflow):
        yield f"  {number:>2} {argument.name:<26} {argument.here.replace('`', '')}"


def rows(workflow: Workflow) -> Iterator[tuple[str, Argument]]:
    """The arguments with their places, and the variables beside the launcher's, which have none."""
    yield from ((str(number), argument) for number, argument in enumerate(workflow.arguments, 1))
    yield from (("", variable) for variable in workflow.variables if variable.name not in NODES)


def tables() -> str:
    """All workflows in Markdown, those with the same arguments side by side."""
    return "\n\n".join(table(workflows) for workflows in TOGETHER)


def table(workflows: Sequence[Workflow]) -> str:
    """A column for each script, with the argument's place in it; a row for each way in which an argument is taken."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for column, workflow in enumerate(workflows):
        for number, argument in rows(workflow):
            way = (argument.name, argument.here, argument.unheeded)
            places.setdefault(way, [""] * len(workflows))[column] = number or "env"
    names = [argument.name for _, argument in rows(max(workflows, key=lambda one: len(one.arguments)))]
    titles = [f"`{workflow.name}`, {len(workflow.arguments)}" for workflow in workflows]
    return "\n".join(
        [
            f"### {', '.join(dict.fromkeys(f'`{workflow.script}`' for workflow in workflows))}",
            "",
            row(*titles, "there", "here", "passed over there"),
            "|---" * (len(workflows) + 3) + "|",
            *(
                row(*places[way], f"`{way[0]}`", *way[1:])
                for way in sorted(places, key=lambda one: names.index(one[0]))
            ),
        ]
    )


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
