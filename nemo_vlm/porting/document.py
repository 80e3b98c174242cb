"""The tables of what is known of other systems' lines, as --help lists them and as docs/from_*.md show them.

`python -c "from nemo_vlm.porting.document import tables; print(tables())"` prints what docs/from_pai.md must hold, and
mindspeed_tables() those of docs/from_mindspeed.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import PurePath

from nemo_vlm.porting import mindspeed_converters, pai_data
from nemo_vlm.porting.flags import Converter
from nemo_vlm.porting.mindspeed_flags import FLAGS, LAUNCHER, SHELL, VARIABLES
from nemo_vlm.porting.mindspeed_json import DATA, MODEL
from nemo_vlm.porting.pai_converters import CONVERTERS
from nemo_vlm.porting.pai_rules import NODES
from nemo_vlm.porting.pai_training import QWEN2_5, QWEN2_VL, QWEN2_VL_SP, QWEN3_VL, QWEN3_VL_TABLE, TRAINING
from nemo_vlm.porting.table import Argument, Workflow

TOGETHER = (
    (QWEN2_5,),
    (QWEN2_VL, QWEN2_VL_SP, QWEN3_VL_TABLE, QWEN3_VL),
    CONVERTERS[:2],
    CONVERTERS[2:3],
    CONVERTERS[3:],
)
FLAGGED = (*pai_data.CONVERTERS, *mindspeed_converters.SCRIPTS, *mindspeed_converters.MM_CONVERT)
FINETUNE = "examples/qwen2vl/finetune_qwen2vl_*.sh of MindSpeed-MM: read, with its JSON; see docs/from_mindspeed.md"


def listing() -> str:
    """Every workflow with its arguments and variables, as text."""
    numbered = ["\n".join(described(workflow)) for workflow in (*TRAINING, *CONVERTERS)]
    return "\n\n".join([*numbered, FINETUNE, *("\n".join(flagged(converter)) for converter in FLAGGED)])


def described(workflow: Workflow) -> Iterator[str]:
    yield f"{workflow.name}, {len(workflow.arguments)} arguments: {workflow.script}"
    for number, argument in rows(workflow):
        yield f"  {number:>2} {argument.name:<26} {argument.here.replace('`', '')}"


def flagged(converter: Converter) -> Iterator[str]:
    yield PurePath(converter.name).name
    for argument in converter.arguments:
        yield f"  {argument.name:<44} {argument.here.replace('`', '')}"


def rows(workflow: Workflow) -> Iterator[tuple[str, Argument]]:
    """The arguments with their places, and the variables beside the launcher's, which have none."""
    yield from ((str(number), argument) for number, argument in enumerate(workflow.arguments, 1))
    yield from (("", variable) for variable in workflow.variables if variable.name not in NODES)


def tables() -> str:
    """Pai-Megatron-Patch's workflows in Markdown, those with the same arguments side by side."""
    numbered = [table(workflows) for workflows in TOGETHER]
    unneeded = plain(pai_data.NOT_NEEDED, "not needed")
    return "\n\n".join([*numbered, *(converter_table(one) for one in pai_data.CONVERTERS), unneeded])


def mindspeed_tables() -> str:
    """MindSpeed-MM's script, its JSON files and its converters in Markdown."""
    parts = [
        "### `finetune_qwen2vl_*.sh`: the variables that are edited",
        plain(SHELL, "here"),
        "### Its flags",
        ways((*LAUNCHER, *FLAGS)),
        "### Its environment",
        plain({", ".join(names): here for here, names in grouped(VARIABLES)}, "here"),
        "### `data.json`",
        *branches(DATA),
        "### `model.json`",
        *branches(MODEL),
        *(converter_table(one) for one in (*mindspeed_converters.SCRIPTS, *mindspeed_converters.MM_CONVERT)),
    ]
    return "\n\n".join(parts)


def grouped(mapping: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    for value, names in groupby(mapping, mapping.__getitem__):
        yield value, list(names)


def branches(arguments: Sequence[Argument]) -> Iterator[str]:
    """Keys by the branch that they stand in, each under its own name."""
    found: dict[str, list[Argument]] = {}
    for argument in arguments:
        found.setdefault(argument.name.rpartition(".")[0], []).append(argument)
    for branch, keys in found.items():
        yield f"`{branch}`:\n\n{ways(keys)}" if branch else ways(keys)


def converter_table(converter: Converter) -> str:
    return f"### `{converter.name}`: `{converter.script}`\n\n{ways(converter.arguments)}"


def ways(arguments: Iterable[Argument]) -> str:
    """A row for each way in which arguments are taken."""
    found: dict[tuple[str, str], list[str]] = {}
    for argument in arguments:
        leaf = argument.name if argument.name.startswith("-") else argument.name.rpartition(".")[2]
        found.setdefault((argument.here, argument.unheeded), []).append(f"`{leaf}`")
    lines = [row(", ".join(names), *way) for way, names in found.items()]
    return "\n".join([row("there", "here", "passed over there"), "|---" * 3 + "|", *lines])


def plain(mapping: Mapping[str, str], title: str) -> str:
    lines = [row(", ".join(f"`{one}`" for one in name.split(", ")), text) for name, text in mapping.items()]
    return "\n".join([row("there", title), "|---" * 2 + "|", *lines])


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
