"""A command line of Pai-Megatron-Patch as ours."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.pai_converters import CONVERTERS
from nemo_vlm.porting.pai_training import SIZES, TRAINING
from nemo_vlm.porting.shell import Command
from nemo_vlm.porting.table import Item, Note, Values, Workflow, in_order

WORKFLOWS = (*TRAINING, *CONVERTERS)
FAMILIES = tuple(SIZES)


def translate(
    words: Sequence[str], env: Mapping[str, str], family: str | None = None, tokenizer: str = ""
) -> tuple[Command, list[str]]:
    """The command of ours that does what theirs was to do, and what the user should know of it.

    Args:
        words: a workflow's name, or the path of their script, and its arguments.
        env: the environment that their script would have read.
        family: whose script it is, where its path does not say.
    Raises:
        ConfigError: no such script, more or fewer arguments, or a value that theirs refuses or passes over in silence.
    """
    name, arguments = named(words, family), words[1:]
    workflow = fitting([one for one in WORKFLOWS if one.name == name], arguments)
    values = Values(read(workflow, arguments, env), workflow.sizes, tokenizer)
    items: list[Item] = []
    for argument in (*workflow.arguments, *workflow.variables):
        items += argument.rule(values, argument.name)
    items += workflow.fixed
    command = Command(workflow.command(values), in_order(items), *environment(values))
    return command, [item.text for item in items if isinstance(item, Note)]


def environment(values: Values) -> tuple[dict[str, str], tuple[str, ...]]:
    """Variables for the command, and those that it must not see: there WORLD_SIZE counts nodes, to torch ranks."""
    if "ENV" not in values:
        return {}, ()
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if values["ENV"] == "dlc":
        variables |= {name: values[name] for name in ("MASTER_ADDR", "MASTER_PORT")} | {"NODE_RANK": values["RANK"]}
    return variables, tuple(name for name in ("WORLD_SIZE", "RANK") if values[name])


def named(words: Sequence[str], family: str | None) -> str:
    """The name of the workflow."""
    first = words[0] if words else ""
    script, known = PurePath(first).name, [workflow.name for workflow in WORKFLOWS]
    family = family or next((one for one in FAMILIES if one in PurePath(first).parts), None)
    if script == "run_mcore_qwen.sh" or re.fullmatch(r"run_(A22B_)?\d+xH20\.sh", script):
        if family is None:
            raise ConfigError(f"{first}: whose? give --family {' or '.join(FAMILIES)}, or its path in their repository")
        name = family if script == "run_mcore_qwen.sh" else f"{family}/run_8xH20.sh"
    else:
        name = script
    if name not in known:
        raise ConfigError(f"{first or 'no script'}: must be one of {', '.join(dict.fromkeys(known))}")
    return name


def fitting(versions: Sequence[Workflow], arguments: Sequence[str]) -> Workflow:
    """The version of a script that takes so many arguments."""
    count = len(arguments)
    for workflow in versions:
        if len(workflow.names) - workflow.optional <= count <= len(workflow.names):
            return workflow
    latest = versions[-1]
    right = " or ".join(str(len(workflow.names)) for workflow in versions)
    if count > len(latest.names):
        what = f"the last is {latest.names[-1]}, and {arguments[len(latest.names)]} is one too many"
    else:
        closest = next((one for one in versions if count < len(one.names)), latest)
        what = f"missing {', '.join(closest.names[count:])}"
    raise ConfigError(f"{latest.name}: takes {right} arguments, {count} were given; {what} (--help lists them)")


def read(workflow: Workflow, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """All values by their names, checked one by one."""
    padded = [*arguments, *[""] * (len(workflow.names) - len(arguments))]
    texts = dict(zip(workflow.names, padded, strict=True))
    own = {variable.name: variable for variable in workflow.variables}
    for name, value in env.items():
        if name.startswith("MP_") and name not in own and value:
            close = difflib.get_close_matches(name, own, 1)
            raise ConfigError(
                f"{name}={value}: {workflow.name} does not read it; "
                + (f"did you mean {close[0]}?" if close else "unset it")
            )
    texts |= {name: env.get(name, "") or variable.default for name, variable in own.items()}
    for argument in (*workflow.arguments, *workflow.variables):
        argument.check(argument.name, texts[argument.name])
    return texts
