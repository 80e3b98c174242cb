"""The rules that Qwen2.5's script alone needs: it pretrains or tunes, from mmap files or JSON."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting import pai_rules as rules
from nemo_vlm.porting.pai_rules import SCHED, batch_tokens, iterations, pad_length, steps_of, warmup_iterations
from nemo_vlm.porting.shell import Text
from nemo_vlm.porting.table import Item, Note, Values, rate


def tunes(values: Values) -> bool:
    return values.true("SFT")


def raw(values: Values) -> bool:
    """Whether the data are JSON."""
    return values["MP_DATASET_TYPE"] == "raw"


def script(values: Values) -> str:
    return "examples/gpt_finetune.py" if tunes(values) else "examples/gpt_pretrain.py"


def task(values: Values, name: str) -> Iterator[Item]:
    """SFT: what the data are, and how the loss is averaged (template/helper.py: each sequence counts alike in SFT)."""
    if raw(values) and not tunes(values):
        raise ConfigError("MP_DATASET_TYPE=raw: JSON is for tuning there, and pretraining stops; must be idxmap")
    yield "data", "mmap" if not tunes(values) else "sft_json" if raw(values) else "sft_idxmap"
    yield "model.loss_reduction", "sample" if tunes(values) else "token"


def optimizer(values: Values, name: str) -> Iterator[Item]:
    """DO; beside the offload of activations nothing is overlapped."""
    rule = rules.optimizer if values["AC"] == "offload" else rules.overlapping_optimizer
    yield from rule(values, name)


def sequence(values: Values, name: str) -> Iterator[Item]:
    """SP; the script overlaps tensor parallelism's communication whether there is SP or not."""
    if values.number("TP") > 1 and not values.true(name):
        raise ConfigError(
            f"{name}=false: with TP={values['TP']} the script sets --tp-comm-overlap, which needs sequence "
            "parallelism, and Megatron stops there; must be true"
        )
    yield from rules.sequence(values, name, uneven(values))


def uneven(values: Values) -> str:
    """Why the batches of a run are not all as long here, which the buffers of an overlap must be; empty: they are."""
    packs = tunes(values) and not raw(values)
    if values.number("CP") > 1 and (packs or values["MP_SFT_PACKING"] == "true"):
        return f"CP={values['CP']}: packed samples are padded one by one to be split"
    return ""


def sequence_length(values: Values, name: str) -> Iterator[Item]:
    if not raw(values):
        yield "model.encoder_seq_length", values.number(name)


def padded_length(values: Values, name: str) -> Iterator[Item]:
    if raw(values):
        yield from pad_length("truncate")(values, name)
        return
    if values.number(name) != values.number("SEQ_LEN"):
        raise ConfigError(
            f"{name}={values[name]}: idxmap's samples are all SEQ_LEN long, and nothing is padded; "
            f"must be {values['SEQ_LEN']}"
        )
    if tunes(values):
        yield "model.data.pad_to", values.number(name)


def training_data(values: Values, name: str) -> Iterator[Item]:
    """One file, or Megatron's blend."""
    if raw(values) or len(values[name].split()) == 1:
        yield "model.data.data_path", Text(values[name])
    else:
        yield "model.data.data_path", [part for weight, prefix in blend(values, name) for part in (weight, prefix)]


def blend(values: Values, name: str) -> list[tuple[str, Text]]:
    """Weights and prefixes of Megatron's `0.7 a 0.3 b`."""
    words = values[name].split()
    if len(words) % 2:
        raise ConfigError(f"{name}={values[name]}: must be a prefix, or a weight before each, as '0.7 a 0.3 b'")
    for weight in words[::2]:
        rate(name, weight)
    return list(zip(words[::2], map(Text, words[1::2]), strict=True))


def validation_data(values: Values, name: str) -> Iterator[Item]:
    """There, idxmap data are always split, and a validation path is not looked at."""
    if raw(values):
        yield "model.data.validation_path", Text(values[name])
    elif values[name] == values["DATASET_PATH"]:
        yield "model.data.splits_string", Text("99,1,0")
    else:
        yield from validation_files(values, name)
        yield Note(
            f"{name}={values[name]}: there, idxmap data leave it out and 1 % of DATASET_PATH validates; here it "
            "validates, and all of DATASET_PATH trains"
        )


def validation_files(values: Values, name: str) -> Iterator[Item]:
    """Of a blend the prefixes alone: what validates is read once, whole."""
    if len(values[name].split()) == 1:
        yield "model.data.validation_path", Text(values[name])
        return
    yield "model.data.validation_path", [prefix for _, prefix in blend(values, name)]
    yield Note(f"{name}={values[name]}: without the weights; all of each validates, one behind the other")


def length(values: Values, name: str) -> Iterator[Item]:
    if tunes(values):
        yield from iterations(values, name)
        return
    steps, batch = steps_of(values, name), batch_tokens(values)
    if not steps:
        raise ConfigError(f"{name}={values[name]}: must be {batch} or more, which a global batch has")
    yield "model.data.train_tokens", values.number(name)
    yield f"{SCHED}.max_tokens", steps * batch


def warmup(values: Values, name: str) -> Iterator[Item]:
    """In pretraining whole steps, as the script counts them."""
    if tunes(values):
        yield from warmup_iterations(values, name)
        return
    tokens, batch = values.number(name), batch_tokens(values)
    steps, train = steps_of(values, name), steps_of(values, "TRAIN_TOKENS_OR_ITERS")
    if steps >= train:
        raise ConfigError(
            f"{name}={tokens}: Megatron's warm-up must end before the run, after {train} steps of {batch} tokens; "
            f"must be below {train * batch}"
        )
    yield f"{SCHED}.warmup_tokens", steps * batch
    if tokens % batch:
        yield Note(f"{name}={tokens}: {tokens / batch:.2f} steps of {batch} tokens; {steps} here as there")


def packed(values: Values, name: str) -> Iterator[Item]:
    """MP_SFT_PACKING: documents, or what was packed into one, do not see each other."""
    asked = values[name] == "true"
    if raw(values):
        yield "model.data.packing", asked
        yield from [Note(f"{name}=true: there, JSON is never packed; here it is, while the run reads it")] * asked
    elif asked and not tunes(values):
        yield "model.data.reset_position_ids", True
        yield "model.data.reset_attention_mask", True
