"""The scripts of Pai-Megatron-Patch that convert checkpoints; all become scripts/convert_megatron.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.pai_rules import NODES, other_stages
from nemo_vlm.porting.pai_training import SIZES
from nemo_vlm.porting.table import Argument, Item, Note, Rule, Size, Values, Workflow, one_of, to, truth, whole
from nemo_vlm.porting.table import text as given
from nemo_vlm.porting.table import unless_empty as maybe

NEW, OLD = "toolkits/distributed_checkpoints_convertor/scripts", "toolkits/model_checkpoints_convertor/qwen"


def exports(values: Values) -> bool:
    """Whether the way is from Megatron to Hugging Face."""
    return values.true("MG2HF")


def format_of(kind: str) -> Rule:
    def rule(values: Values, name: str) -> Iterator[Item]:
        if not exports(values):
            yield "--format", kind
            yield Note("nothing needs this to train: model.restore_from_path takes the Hugging Face directory itself")

    return rule


def described(values: Values, name: str) -> Iterator[Item]:
    """HF_DIR, whose config.json the scripts take for granted on the way back."""
    if exports(values) and not values[name]:
        raise ConfigError(f"MG2HF=true: {name} is missing, the directory whose config.json describes the model")
    if exports(values):
        yield from to("--hf-config")(values, name)
    elif values[name]:
        yield Note(f"{name}={values[name]}: of no effect with MG2HF=false")


def dtype(values: Values, name: str) -> Iterator[Item]:
    yield "--precision", values[name]
    if values[name] == "fp32":
        yield Note("PR=fp32: there, bf16 is written in spite of it; here fp32 is")


def device(values: Values, name: str) -> Iterator[Item]:
    if values.true(name):
        yield Note(f"{name}=true: tensors go from file to file one at a time, and no GPU is needed")


def transformer_engine(values: Values, name: str) -> Iterator[Item]:
    if not exports(values) and not values.true(name):
        raise ConfigError(f"{name}=false: files are written under the names that true gives; must be true")
    yield from ()


def split(key: str) -> Rule:
    """The rule of a parallel size, which files for each rank have; on the way back the files tell it."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        if not exports(values):
            yield key, values.number(name)

    return rule


def stages(values: Values, name: str) -> Iterator[Item]:
    if values[name] and not exports(values):
        rest = [other_stages(values, name)] * (values.number("PP") - 1)
        yield "--pipeline-layers", ",".join(map(str, [values.number(name), *rest]))


def no_parts(values: Values, name: str) -> Iterator[Item]:
    if values[name] and not exports(values):
        raise ConfigError(f"{name}={values[name]}: files are written without virtual stages; unset it")
    yield from ()


def said(values: Values, name: str) -> Iterator[Item]:
    if values[name]:
        yield Note(f"{name}={values[name]}: of no effect, a converter here is one process")


def sizes(of: Mapping[str, Size]) -> Argument:
    return Argument("MODEL_SIZE", "nothing: config.json tells", one_of(*of), unheeded="others: error")


HF = "`--hf-config`, with MG2HF=true"
DTYPES = one_of("fp32", "bf16", "fp16")
PRECISION = Argument("PR", "`--precision`", DTYPES, to("--precision"), "others: error")
TENSOR = Argument("TP", "`--tensor-model-parallel-size`", whole(1), split("--tensor-model-parallel-size"))
PIPELINE = Argument("PP", "`--pipeline-model-parallel-size`", whole(1), split("--pipeline-model-parallel-size"))
SOURCE = Argument("SOURCE_CKPT_PATH", "`--input`", given, to("--input"))
TARGET = Argument("TARGET_CKPT_PATH", "`--output`", given, to("--output"))
MG2HF = Argument("MG2HF", "`--format mp_rank`; true: without it", truth, format_of("mp_rank"))
BACK = Argument("HF_CKPT_PATH", HF, maybe(given), described)
LAUNCHER = tuple(Argument(name, "nothing: a converter is one process", maybe(given)) for name in NODES)


def command(values: Values) -> str:
    return "scripts/convert_megatron.py"


def distributed(family: str, of: Mapping[str, Size]) -> Workflow:
    return Workflow(
        f"{family}/run_8xH20.sh",
        f"{NEW}/{family}/run_8xH20.sh",
        (
            sizes(of),
            Argument("LOAD_DIR", "`--input`", given, to("--input")),
            Argument("SAVE_DIR", "`--output`", given, to("--output")),
            Argument("MG2HF", "`--format torch_dist`; true: without it", truth, format_of("torch_dist")),
            Argument("USE_CUDA", "nothing: no GPU is needed", truth, device, "others: error"),
            Argument("PR", "`--precision`", DTYPES, dtype, "fp32, which wrote bf16: done, with a note; others: error"),
            Argument("HF_DIR", HF, maybe(given), described),
        ),
        (Argument("MODEL_PARALLEL_ARGS", "nothing: a converter is one process", maybe(given), said), *LAUNCHER),
        of,
        command,
        optional=1,
    )


CONVERTERS = (
    *(distributed(family, of) for family, of in SIZES.items() if family != "qwen2_vl"),
    Workflow(
        "hf2mcore_qwen2.5_convertor.sh",
        f"{OLD}/hf2mcore_qwen2.5_convertor.sh",
        (
            sizes(SIZES["qwen2_5"]),
            SOURCE,
            TARGET,
            TENSOR,
            PIPELINE,
            PRECISION,
            Argument("USE_TE", "nothing", truth, transformer_engine, "false with MG2HF=false: error"),
            MG2HF,
            BACK,
        ),
        (),
        SIZES["qwen2_5"],
        command,
        optional=1,
    ),
    Workflow(
        "hf2mcore_qwen2_vl_convertor.sh",
        f"{OLD}/hf2mcore_qwen2_vl_convertor.sh",
        (sizes(SIZES["qwen2_vl"]), SOURCE, TARGET, TENSOR, PIPELINE, MG2HF, PRECISION, BACK),
        (
            Argument("MP_PP0_LAYERS", "`--pipeline-layers`", maybe(whole(0)), stages),
            Argument("MP_VP", "nothing", maybe(whole(1)), no_parts, "no files with virtual stages here: error"),
            Argument("MP_SAVE_SAFE_TENSORS", "nothing: always safetensors", maybe(truth)),
        ),
        SIZES["qwen2_vl"],
        command,
        optional=1,
    ),
)
