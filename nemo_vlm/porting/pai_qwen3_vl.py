"""The rules that Qwen3-VL's script alone needs: some of its sizes have experts."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting import pai_rules as rules
from nemo_vlm.porting.table import Item, Note, Rule, Values

OTHER_BASES = {"A3B": "1e6"}  # --rotary-base where it is not the model's


def model(values: Values, name: str) -> Iterator[Item]:
    """The size; the script's flags for its experts are the model's here, and defaults."""
    yield "model", values.size.model
    if base := OTHER_BASES.get(values[name]):
        yield Note(f"{name}={values[name]}: there --rotary-base is {base}; here it is 5e6, as the model was trained")


def model_of_table(values: Values, name: str) -> Iterator[Item]:
    """The size where arguments were given as its README's table lists them, which says nothing of experts."""
    if values.size.experts:
        raise ConfigError(
            f"{name}={values[name]}: has experts, and the 24 arguments of its README's table leave out ETP and EP, the "
            "13th and the 14th of the 26 that its script takes"
        )
    yield Note("24 arguments, as its README's table lists them; its script takes 26, with ETP and EP behind CP")
    yield from model(values, name)


def expert_size(key: str) -> Rule:
    """EP and ETP, which the script passes on for models with experts alone."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        if values.size.experts:
            yield key, values.number(name)
        elif values.number(name) != 1:
            raise ConfigError(f"{name}={values[name]}: MODEL_SIZE={values['MODEL_SIZE']} has no experts; must be 1")

    return rule


def experts(key: str) -> Rule:
    """EP, each rank of which has as many of them."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        if (count := values.size.experts) and count % values.number(name):
            size = values["MODEL_SIZE"]
            raise ConfigError(f"{name}={values[name]}: must divide the {count} experts of MODEL_SIZE={size}")
        yield from expert_size(key)(values, name)

    return rule


def precision(values: Values, name: str) -> Iterator[Item]:
    """PR, where experts are computed in 16 bits alone."""
    if values.size.experts and values[name] == "fp8":
        raise ConfigError(
            f"{name}=fp8: MODEL_SIZE={values['MODEL_SIZE']} has experts, which are not computed in 8 bits here; "
            "must be bf16 or fp16"
        )
    yield from rules.precision(values, name)


def recompute(values: Values, name: str) -> Iterator[Item]:
    """AC, where what experts keep stays on the GPU."""
    if values.size.experts and values[name] == "offload":
        raise ConfigError(
            f"{name}=offload: MODEL_SIZE={values['MODEL_SIZE']} has experts, whose activations are not offloaded here; "
            "must be sel, full or none"
        )
    yield from rules.recompute(values, name)


def sequence(values: Values, name: str) -> Iterator[Item]:
    """SP, which overlaps nothing of packed samples, and which experts need beside TP."""
    if values.size.experts and values.number("TP") > 1 and not values.true(name):
        raise ConfigError(
            f"{name}=false: MODEL_SIZE={values['MODEL_SIZE']} has experts, with which TP={values['TP']} needs it, and "
            "Megatron stops there; must be true"
        )
    packed = values["MP_SFT_PACKING"] == "true"
    yield from rules.sequence(values, name, "MP_SFT_PACKING=true: as there" if packed else "")
