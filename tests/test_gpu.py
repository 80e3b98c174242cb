"""The same run on a CUDA device as on the CPU."""

from __future__ import annotations

import pytest
import torch
from test_cli import TRAIN, metrics, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("transformer_impl", ["local", "auto"])
def test_a_gpu_trains_as_the_cpu(tmp_path, transformer_impl: str) -> None:
    steps = ("trainer.max_steps=4", "model.data.num_workers=0", f"model.transformer_impl={transformer_impl}")
    for accelerator in ("cpu", "gpu"):
        where = (f"trainer.accelerator={accelerator}", "trainer.devices=1", f"exp_manager.name={accelerator}")
        impl = ("model.transformer_impl=local",) if accelerator == "cpu" else ()
        result = run(str(TRAIN), *steps, *where, *impl, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"on 1 {'cuda' if accelerator == 'gpu' else 'cpu'} ranks" in result.stdout
    for on_gpu, on_cpu in zip(metrics(tmp_path, "gpu"), metrics(tmp_path, "cpu"), strict=True):
        assert on_gpu["reduced_train_loss"] == pytest.approx(on_cpu["reduced_train_loss"], rel=1e-3)
        assert on_gpu["grad_norm"] == pytest.approx(on_cpu["grad_norm"], rel=1e-2)
