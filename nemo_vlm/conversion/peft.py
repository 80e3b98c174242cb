"""Adapters in the layout of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_vlm.config.peft import factors
from nemo_vlm.conversion.convert import check_free, finish
from nemo_vlm.files import folder_written_whole, remove_partial
from nemo_vlm.formats import safetensors
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.mapping import Rows
from nemo_vlm.models.base import family, starts
from nemo_vlm.sources.opening import open_adapter
from nemo_vlm.sources.source import Source

PREFIX, A, B = "base_model.model.", "lora_A", "lora_B"  # get_peft_model_state_dict's


def export_adapter(adapter_path: str, output: Path, base: str | None) -> None:
    """Write an adapter as PEFT loads it beside the exported base.

    Args:
        base: what adapter_config.json calls the base; None: what the run had its language model from.
    Raises:
        ConfigError: there is no adapter, the output is not free, or Hugging Face has no place for the model.
    """
    adapter = open_adapter(adapter_path, "--adapter")
    output = Path(os.path.abspath(output))
    remove_partial(output)
    check_free(output)
    family(adapter.family, "mapping").hf_config(adapter.model)
    tensors = peft_tensors(adapter)
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    config = peft_config(adapter, sorted(tensors), base or language_base(adapter))
    output.parent.mkdir(parents=True, exist_ok=True)
    with folder_written_whole(output) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        with open(folder / "adapter_model.safetensors", "wb") as file:
            safetensors.write(file, specs, iter(tensors.items()))
            finish(file)


def language_base(adapter: Source) -> str | None:
    """The last of the checkpoints that the run started from which is for the language model, or for all."""
    found = [path for _, module, path in starts(adapter.tree) if module in (None, "language_model")]
    return found[-1] if found else None


def peft_tensors(adapter: Source) -> dict[str, Tensor]:
    """What was trained, under PEFT's names.

    The A of a fused layer goes to each layer that is fused in it; the rows of B are divided as the weight's.
    """
    reader, held = adapter.reader, adapter.reader.names()
    found: dict[str, Tensor] = {}
    for rule in family(adapter.family, "mapping").rules(adapter.model):
        a_name, b_name = factors(rule.ours)
        if rule.ours in held:
            found |= {peft_name(name, adapter.family): rule.split(reader, name, ()) for name in rule.theirs}
        elif a_name in held:
            assert isinstance(rule, Rows)
            rows, a = replace(rule, ours=b_name, rest=reader.shape(b_name)[1:]), reader.read(a_name)
            for name in rule.theirs:
                module = peft_name(name, adapter.family).removesuffix(".weight")
                found |= {f"{module}.{A}.weight": a, f"{module}.{B}.weight": rows.split(reader, name, ())}
    return found


def peft_name(theirs: str, family_name: str) -> str:
    """A tensor's name in transformers' memory, which is not that in its files, behind PEFT's prefix."""
    for in_memory, in_files in family(family_name, "mapping").HF_VARIANTS.items():
        if theirs.startswith(in_files):
            return PREFIX + in_memory + theirs.removeprefix(in_files)
    return PREFIX + theirs


def peft_config(adapter: Source, names: list[str], base: str | None) -> dict[str, Any]:
    """PEFT's LoraConfig. Layers are named in full: a vision tower's may be called alike."""
    lora, ending = adapter.settings["peft"].lora_tuning, f".{A}.weight"
    projector = {
        name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in names if f".{A}." not in name and f".{B}." not in name
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.adapter_dim,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.adapter_dropout,
        "bias": "none",
        "target_modules": [name.removeprefix(PREFIX).removesuffix(ending) for name in names if name.endswith(ending)],
        "modules_to_save": sorted(outermost(projector)) or None,
    }


def outermost(modules: set[str]) -> set[str]:
    """Those that stand in no other of them."""
    return {name for name in modules if not any(name.startswith(f"{other}.") for other in modules)}
