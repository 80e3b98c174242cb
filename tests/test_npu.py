"""Ascend as an accelerator, as far as that goes without one: what it needs, what it refuses, what it resolves to."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_families import make_layout, run_of

import nemo_vlm
from nemo_vlm import options
from nemo_vlm.config import RunConfig, StepConfig, TrainerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore import npu
from nemo_vlm.mcore.cpu import BACKENDS
from nemo_vlm.mcore.layers import kernels
from nemo_vlm.models.base import family
from nemo_vlm.parallel.megatron import MegatronStrategy
from nemo_vlm.parallel.npu import NpuAccelerator
from nemo_vlm.planning import machine
from nemo_vlm.planning.plan import training

PACKAGE = Path(nemo_vlm.__file__).parent


def on_npu(**step: object) -> RunConfig:
    run = run_of("gpt", family("gpt", "tiny").config())
    return replace(run, trainer=TrainerConfig(accelerator="npu", precision="bf16"), step=replace(run.step, **step))


def test_torch_npu_is_asked_for_at_the_door() -> None:
    with pytest.raises(ConfigError, match=r"^trainer.accelerator=npu: torch_npu cannot be imported \(No module.*\)"):
        machine.num_gpus("npu")
    assert not npu.started()


def test_nothing_else_imports_torch_npu() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {node for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) for node in ast.walk(each)}
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "torch_npu" for name in names):
                assert path == PACKAGE / "mcore" / "npu.py" and node in inside


def test_what_it_resolves_to() -> None:
    found = machine.device_type("npu", 2)
    strategy = MegatronStrategy(make_layout(on_npu(), 2), 1, 60.0, BACKENDS[found])
    assert (found, strategy.process_group_backend, kernels(StepConfig().transformer_impl)) == ("npu", "hccl", "local")
    assert NpuAccelerator.parse_devices(2) == [0, 1]
    assert machine.device_type("auto", 2) == "cuda"  # which never takes an NPU


def test_what_is_read_while_a_model_is_built_is_the_host_s() -> None:
    """Lightning would make its device the default, on which random numbers and checkpoints are not drawn and read."""
    strategy = MegatronStrategy(make_layout(on_npu(), 1), 1, 60.0, "gloo")
    strategy.parallel_devices = [torch.device("meta")]
    assert strategy.root_device.type == "meta"
    with strategy.tensor_init_context():
        assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"transformer_impl": "transformer_engine"}, "model.transformer_impl=transformer_engine: needs a CUDA device"),
        ({"fp8": True}, "model.fp8=true: needs a CUDA device, and trainer.accelerator=npu; leave it out"),
        ({"attention_backend": "flash"}, "model.attention_backend=flash: needs a CUDA device"),
    ],
)
def test_what_is_of_cuda_is_refused(step: dict[str, object], message: str) -> None:
    options.check(on_npu())
    with pytest.raises(ConfigError) as error:
        options.check(on_npu(**step))
    assert str(error.value).startswith(message)


def test_a_plan_needs_no_npu() -> None:
    planned = training(on_npu(), {})
    assert (
        "trainer.devices=auto: no NPU is here to be counted; planned with as many as the layout needs" in planned.notes
    )
