"""MindSpeed-MM's converters of Qwen2-VL as ours: mm-convert's flags, and scripts whose constants are edited in them."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting import mindspeed_rules as rules
from nemo_vlm.porting.flags import Converter, converted, given, looked_up, taken
from nemo_vlm.porting.mindspeed import started_in, text_of
from nemo_vlm.porting.mindspeed_rules import is_list, numbers, path
from nemo_vlm.porting.shell import Command
from nemo_vlm.porting.table import Argument, Item, Note, Values, text, whole

EXAMPLES = "examples/qwen2vl"
TENSOR, LAYERS = "--tensor-model-parallel-size", "--pipeline-layers"


def place(name: str, flag: str) -> Argument:
    return given(name, f"`{flag}`", text, rules.place(flag))


def told(*names: str) -> tuple[Argument, ...]:
    return tuple(given(name, "nothing: config.json and the files tell", text) for name in names)


def layers(values: Values, name: str) -> Iterator[Item]:
    """A plan, which files of a virtual pipeline would need several of."""
    if values[name].count("[") > 2:
        raise ConfigError(f"{name}={values[name]}: files are written without virtual stages; must be one list")
    yield LAYERS, ",".join(map(str, numbers(values[name])))


def first_layers(values: Values, name: str) -> Iterator[Item]:
    yield "--num-layer-list", ",".join(map(str, numbers(values[name])))


def tower(values: Values, name: str) -> Iterator[Item]:
    if any(numbers(values[name])[1:]):
        raise ConfigError(f"{name}={values[name]}: the vision tower is written whole, into the first stage's files")
    yield from ()


def tensor(values: Values, name: str) -> Iterator[Item]:
    yield TENSOR, values.number(name)


def described(values: Values, name: str) -> Iterator[Item]:
    yield "--hf-config", path(values, values[name])


def needs_config(values: Values, name: str) -> Iterator[Item]:
    """The source of a new split, of which nobody says what model it is."""
    yield "--input", path(values, values[name])
    if not Path(path(values, values[name]).value, "config.json").is_file():
        yield Note(f"{name}: needs Hugging Face's config.json in it, or --hf-config with a directory that has it")


def plan(llm: str, vit: str, size: str) -> tuple[Argument, ...]:
    """Of files that are written."""
    return (
        given(llm, f"`{LAYERS}`", is_list, layers, "of a virtual pipeline: error"),
        given(vit, "nothing: the tower is written into the first stage's files", is_list, tower, "another plan: error"),
        given(size, f"`{TENSOR}`", whole(1), tensor),
    )


FIRST = given("pipeline_layer_index", "`--num-layer-list`; None: nothing", is_list, first_layers)
SCRIPTS = (
    Converter(
        "qwen2vl_convert_to_mm_ckpt.py",
        (
            place("hg_ckpt_dir", "--input"),
            place("hf_ckpt_dir", "--input"),
            place("mm_save_dir", "--output"),
            FIRST,
            *plan("llm_pipeline_num_layers", "vit_pipeline_num_layers", "tp_size"),
            *told("pp_size", "model_size", "num_layers", "llm_num_query_groups", "vit_hidden_size"),
            *told("vit_attention_heads_num", "vit_num_layers", "vit_pipeline_layer_index"),
            given("llm_path", "nothing: `--input` has the language model, too; ModelLink is not needed", text),
        ),
        "mindspeed",
    ),
    Converter(
        "qwen2vl_convert_to_hf.py",
        (
            place("mm_save_dir", "--input"),
            place("hf_save_dir", "--output"),
            given("model_path", "`--hf-config`", text, described),
            *told("model_size", "pp_size", "tp_size", "llm_pipeline_layer_index", "vit_pipeline_layer_index"),
            *told("llm_pipeline_num_layers", "vit_pipeline_num_layers"),
        ),
    ),
    Converter(
        "qwen2vl_convert_pp_to_pp.py",
        (
            given("mm_save_dir", "`--input`", text, needs_config),
            place("new_save_dir", "--output"),
            *plan("revised_llm_pipeline_num_layers", "revised_vit_pipeline_num_layers", "original_tp_size"),
            *told("vit_num_layers", "llm_num_layers", "original_pp_size", "original_vit_pipeline_num_layers"),
            *told("original_llm_pipeline_num_layers", "revised_pp_size"),
        ),
        "mindspeed2",
    ),
    Converter(
        "llava_instruct_2_mllm_demo_format.py",
        (
            place("llava_json_path", "--input"),
            place("mllm_format_json_path", "--output"),
            given("img_path", "`--image-folder`", text, rules.place("--image-folder")),
        ),
        script="scripts/prepare_mllm.py",
    ),
)
PARALLEL = "--cfg.parallel_config"
MM_CONVERT = (
    Converter(
        "mm-convert Qwen2VLConverter hf_to_mm",
        (
            place("--cfg.hf_config.hf_dir", "--input"),
            place("--cfg.mm_dir", "--output"),
            *plan(f"{PARALLEL}.llm_pp_layers", f"{PARALLEL}.vit_pp_layers", f"{PARALLEL}.tp_size"),
            *told("--cfg.trust_remote_code"),
        ),
        "mindspeed2",
    ),
    Converter(
        "mm-convert Qwen2VLConverter mm_to_hf",
        (
            place("--cfg.mm_dir", "--input"),
            place("--cfg.save_hf_dir", "--output"),
            given("--cfg.hf_config.hf_dir", "`--hf-config`", text, described),
            *told(f"{PARALLEL}.llm_pp_layers", f"{PARALLEL}.vit_pp_layers", f"{PARALLEL}.tp_size"),
            *told("--cfg.trust_remote_code"),
        ),
    ),
    Converter(
        "mm-convert Qwen2VLConverter resplit",
        (
            given("--cfg.source_dir", "`--input`", text, needs_config),
            place("--cfg.target_dir", "--output"),
            *plan(*(f"--cfg.target_parallel_config.{name}" for name in ("llm_pp_layers", "vit_pp_layers", "tp_size"))),
            *told(*(f"--cfg.source_parallel_config.{name}" for name in ("llm_pp_layers", "vit_pp_layers", "tp_size"))),
        ),
        "mindspeed2",
    ),
)


def named(words: Sequence[str]) -> Converter | None:
    """The converter that a line starts.

    Raises:
        ConfigError: mm-convert of another model, or for something else.
    """
    if words[:1] == ["mm-convert"]:
        found = [one for one in MM_CONVERT if one.name.split() == list(words[:3])]
        if not found:
            right = ", ".join(one.name for one in MM_CONVERT)
            raise ConfigError(f"{' '.join(words[:3])}: must be one of {right}")
        return found[0]
    return next((one for one in SCRIPTS if Path("".join(words[:1])).name == one.name), None)


def translate(converter: Converter, words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command of ours.

    Raises:
        ConfigError: a flag or a value that has nothing here, or a script that does not say what it converts.
    """
    if words[0] == "mm-convert":
        texts, folder = taken(converter.arguments, words[3:]), ""
    else:
        texts, folder = constants(converter, words[0]), started_in(words[0], EXAMPLES) or os.getcwd()
    settings, notes = converted(converter, words[0], Values(texts, {}, folder=folder))
    if converter.names:  # what came after plans of first layers has other names
        new = any(flag == LAYERS for flag, _ in settings)
        settings += (("--format", "mp_rank"), ("--names", "mindspeed2" if new else converter.names))
    return Command(converter.script, settings), notes


def constants(converter: Converter, file: str) -> dict[str, str]:
    """What a script of theirs says in constants; it is read, not run."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8", errors="replace"))
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"{file}: cannot be read as Python: {error}") from error
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            literal = literal_in(node.value)
            if literal is not None:
                found[node.targets[0].id] = literal
    known = {argument.name for argument in converter.arguments}
    return looked_up(converter.arguments, file, {name: value for name, value in found.items() if name in known})


def literal_in(node: ast.expr) -> str | None:
    """A constant's value as text; of os.path.join(FOLDER, ...) its folder."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.path.join":
        node = node.args[0]
    try:
        return text_of(ast.literal_eval(node))
    except ValueError:
        return None
