"""How the tokens of a mixture-of-experts model spread over its experts: numbers beside the loss, and experts.png."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from nemo_vlm.checkpoints import run_folder
from nemo_vlm.mcore.experts import ExpertLoads

LAST = 20  # steps whose loads are drawn
LEGIBLE = 16  # experts or layers, beyond which their shares are not written into the picture


def columns(loads: ExpertLoads) -> dict[str, float]:
    """Of metrics.csv: the mean of the layers' auxiliary losses, and the busiest expert of any layer over the mean."""
    return {"aux_loss": float(loads.aux_loss.mean()), "expert_load_max": float(busiest(loads.tokens).max())}


def by_layer(loads: ExpertLoads) -> dict[str, float]:
    """The same of each layer, for the loggers that draw curves; layers count from 0, as weights name them."""
    found = {"aux_loss": loads.aux_loss, "load_max": busiest(loads.tokens)}
    return {
        f"experts/{name}/layer_{layer:02d}": float(value)
        for name, values in found.items()
        for layer, value in enumerate(values)
    }


def busiest(tokens: Tensor) -> Tensor:
    """Tokens of each layer's busiest expert over the mean of its experts: [layers, experts] -> [layers]."""
    return tokens.amax(1) / tokens.double().mean(1)


class ExpertPicture(Callback):
    """Draws experts.png when training ends, of the last steps that this process took."""

    def __init__(self) -> None:
        self.tokens: deque[Tensor] = deque(maxlen=LAST)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *unused: Any) -> None:
        if module.experts is not None:
            self.tokens.append(module.experts.tokens)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.tokens:
            last = module.position.global_step
            steps = f"steps {last - len(self.tokens) + 1} to {last}"
            draw_loads(sum(self.tokens), steps, run_folder(module.run.exp_manager))  # type: ignore[arg-type]


@rank_zero_only
def draw_loads(tokens: Tensor, steps: str, folder: Path) -> None:
    """experts.png: the share of its layer's tokens that each expert got; white is an even share.

    Args:
        tokens: [layers, experts].
        steps: in which it got them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    percent = (100 * tokens / tokens.double().sum(1, keepdim=True)).tolist()
    layers, experts = tokens.shape
    even = 100 / experts
    size = min(max(6.5, 0.6 * experts), 16), min(max(3.6, 1.2 + 0.2 * layers), 14)
    figure, axis = pyplot.subplots(figsize=size, constrained_layout=True)
    scale = colors.TwoSlopeNorm(even, 0, max(2 * even, *map(max, percent)))
    drawn = axis.imshow(percent, cmap="RdBu_r", norm=scale, aspect="auto", interpolation="nearest")
    if max(layers, experts) <= LEGIBLE:
        for layer, shares in enumerate(percent):
            for expert, share in enumerate(shares):
                shade = "white" if abs(scale(share) - 0.5) > 0.35 else "black"
                axis.text(expert, layer, f"{share:.0f}", ha="center", va="center", color=shade)
    for one, name in ((axis.xaxis, "expert"), (axis.yaxis, "layer")):
        one.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        one.set_label_text(name)
    axis.set_title(f"{folder.name}: tokens of each expert, {steps}")
    figure.colorbar(drawn, label=f"% of what its layer routes (even: {even:.3g})")
    figure.savefig(folder / "experts.png", dpi=120)
    pyplot.close(figure)
