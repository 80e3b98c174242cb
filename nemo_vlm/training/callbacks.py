"""What happens beside the steps: the progress bar, the archive at the end, the picture of the curves."""

from __future__ import annotations

import csv
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.utilities import rank_zero_only

from nemo_vlm.archive import TensorSpec, write_archive
from nemo_vlm.mcore import weights
from nemo_vlm.training.exp_manager import archive_path, run_folder
from nemo_vlm.training.module import TrainingModule
from nemo_vlm.typed import model_tree

log = logging.getLogger(__name__)
TOKENIZER_FOLDER = "tokenizer"


class Progress(TQDMProgressBar):
    """Lightning's bar (steps, time left, steps/s) with loss, seconds a step and samples/s."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(module, TrainingModule)
        latest = module.latest
        if not latest:
            return {}
        seconds = latest["train_step_timing in s"]
        samples = latest["consumed_samples"] / latest["global_step"] / seconds
        return {
            "loss": f"{latest['reduced_train_loss']:.4f}",
            "s/step": f"{seconds:.3f}",
            "samples/s": f"{samples:.1f}",
        }


class SaveArchive(Callback):
    """Writes <name>.nemo when training ends: weights gathered one by one from all ranks, config, tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        parts = module.parts()
        placed = weights.placements(parts)
        tensors = weights.gather(parts, placed)
        if not trainer.is_global_zero:
            for _ in tensors:
                raise AssertionError("only rank 0 receives tensors")
            return
        config = model_tree(module.run)
        config["tokenizer"]["type"] = f"nemo:{TOKENIZER_FOLDER}"
        specs = [TensorSpec(name, placement.shape, placement.dtype) for name, placement in placed.items()]
        path = archive_path(module.run.exp_manager)
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer.save_pretrained(scratch)
            write_archive(path, config, {TOKENIZER_FOLDER: Path(scratch)}, specs, tensors)
        log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)


class Curves(Callback):
    """Draws loss.png when training ends."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        draw_curves(run_folder(module.run.exp_manager))


@rank_zero_only
def draw_curves(folder: Path) -> None:
    """loss.png from metrics.csv: loss, learning rate and gradient norm over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(3, 1, figsize=(8, 9), sharex=True, constrained_layout=True)
    titles = {"reduced_train_loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        axis.plot(
            [int(row["global_step"]) for row in rows],
            [float(row[column]) for row in rows],
            linewidth=1,
        )
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if column != "lr":
            axis.set_yscale("log")
    axes[0].set_title(folder.name)
    axes[-1].set_xlabel("step")
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
