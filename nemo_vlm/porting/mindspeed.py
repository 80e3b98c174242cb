"""A run of MindSpeed-MM's Qwen2-VL as ours: its script, which is read and not run, with the JSON that it names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.flags import looked_up, taken
from nemo_vlm.porting.mindspeed_flags import FLAGS, LAUNCHER, VARIABLES
from nemo_vlm.porting.mindspeed_json import DATA, MODEL
from nemo_vlm.porting.mindspeed_rules import BASIC, PREPROCESS, PROJECTOR, TEXT, VISION
from nemo_vlm.porting.shell import Command
from nemo_vlm.porting.shell_script import Script
from nemo_vlm.porting.table import Item, Note, Values, in_order

JSON_FLAG = "--mm-model"  # by which a script of theirs is known
NEEDED = ("--micro-batch-size", "--global-batch-size", "--train-iters", "--lr", "--save", "--mm-data", JSON_FLAG)
NEEDED_KEYS = (  # or the next of its row
    (f"{PREPROCESS}.model_name_or_path",),
    (f"{PREPROCESS}.image_max_pixels", f"{PREPROCESS}.image_resolution"),
    (f"{PREPROCESS}.video_max_pixels", f"{PREPROCESS}.video_resolution"),
    (f"{PREPROCESS}.video_maxlen",),  # 64 or 128 there, by the version; as its like below
    (f"{BASIC}.dataset",),
    ("model_id",),
    *((f"{TEXT}.{name}",) for name in ("hidden_size", "num_layers", "untie_embeddings_and_output_weights")),
    *((f"{VISION}.{name}",) for name in ("hidden_size", "num_layers", "spatial_merge_size", "freeze")),
    (f"{PROJECTOR}.freeze",),
)
FLAG = re.compile(r"(?<=^--)[^=]+")  # of torchrun, which takes --nproc-per-node as well as --nproc_per_node
NODES = {"--node_rank": "NODE_RANK", "--master_addr": "MASTER_ADDR", "--master_port": "MASTER_PORT"}


def script_in(name: str) -> str | None:
    """The text of one of their training scripts, which is known by what is in it; None: the file is none.

    Raises:
        ConfigError: it has their name, and is not there.
    """
    path = Path(name)
    if path.suffix == ".sh" and path.is_file():
        found = path.read_text(encoding="utf-8", errors="replace")
        return found if JSON_FLAG in found else None
    if path.name.startswith("finetune_qwen2vl"):
        raise ConfigError(f"{name}: there is no such file; must be the script as it was edited")
    return None


def translate(name: str, content: str, given: Mapping[str, str], tokenizer: str = "") -> tuple[Command, list[str]]:
    """The command of ours that does what the script was to do, and what the user should know of it.

    Args:
        name: the script's path.
        content: its text.
        given: values of variables, in place of those that the script sets.
        tokenizer: its directory, in place of data.json's.
    Raises:
        ConfigError: a flag, key or value that has nothing here, or that the original passes over in silence.
    """
    script = Script(name, content, given)
    entry = next((place for place, word in enumerate(script.words) if word.endswith(".py")), len(script.words))
    texts = taken(LAUNCHER, [FLAG.sub(underscored, word) for word in script.words[:entry]])
    texts |= taken(FLAGS, script.words[entry + 1 :])
    demand(texts, [(flag,) for flag in NEEDED], name)
    texts |= {"script": name, "entry": Path("".join(script.words[entry : entry + 1])).name}
    folder = started_in(name, texts[JSON_FLAG])
    if folder is None:
        raise ConfigError(f"{JSON_FLAG} {texts[JSON_FLAG]}: is neither below this folder nor below one above {name}")
    for arguments, flag in ((DATA, "--mm-data"), (MODEL, JSON_FLAG)):
        texts |= looked_up(arguments, texts[flag], flattened(os.path.join(folder, texts[flag])))
    demand(texts, NEEDED_KEYS, f"{texts['--mm-data']}, {texts[JSON_FLAG]}")
    if tokenizer:
        texts[f"{PREPROCESS}.model_name_or_path"] = os.path.abspath(tokenizer)
    values = Values(texts, {}, folder=folder)
    items = [*ruled(values), *profiler(folder, texts["--mm-tool"])]
    exported = {name: script.expand(f"${name}") for name in script.exported}
    command = Command("examples/qwen2_vl_finetune.py", in_order(items), exported | nodes(texts))
    notes = [item.text for item in items if isinstance(item, Note)]
    strange = [one for one in exported if one not in VARIABLES]
    return command, notes + [f"{one}={exported[one]}: is not known here; set in front of the line" for one in strange]


def underscored(found: re.Match[str]) -> str:
    return found[0].replace("-", "_")


def demand(texts: Mapping[str, str], needed: Iterable[Sequence[str]], where: str) -> None:
    """Raises ConfigError where one of several is missing, of which another would do."""
    for names in needed:
        if not any(texts[name] for name in names):
            raise ConfigError(f"{where}: {' or '.join(names)} is missing")


def ruled(values: Values) -> Iterator[Item]:
    """What becomes of all that was given, checked one by one."""
    known = (*MODEL, *DATA, *LAUNCHER, *FLAGS)
    for argument in known:
        argument.check(argument.name, values[argument.name])
    for argument in known:
        if values[argument.name]:
            yield from argument.rule(values, argument.name)


def started_in(script: str, name: str) -> str | None:
    """The folder from which a script's paths go out, in which there is something: this one, or one above it."""
    folders = (Path.cwd(), *Path(script).resolve().parents)
    return next((str(folder) for folder in folders if (folder / name).exists()), None)


def flattened(file: str) -> dict[str, str]:
    """A JSON file's values as texts, by their keys with points between."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"), parse_float=str, parse_int=str)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must be an object with keys")
    return dict(leaves(content, ""))


def leaves(branch: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for name, value in branch.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", text_of(value)


def text_of(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def profiler(folder: str, name: str) -> Iterator[Item]:
    """What tools.json asks for: it profiles, and nothing else."""
    if not name or not Path(folder, name).is_file():
        return
    for key, value in flattened(os.path.join(folder, name)).items():
        if key.endswith("enable") and value == "true":
            yield Note(f"{key}=true in {name}: there is no profiler here; metrics.csv has each step's time and FLOP/s")


def nodes(texts: Mapping[str, str]) -> dict[str, str]:
    """Who a node of several is."""
    return {} if texts["--nnodes"] == "1" else {variable: texts[flag] for flag, variable in NODES.items()}
