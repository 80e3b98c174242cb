"""`trainer.*`: where a run happens and how long it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_vlm.config.checks import demand

Precision = Literal["32", "bf16", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer.*`: where the run happens and how long it is."""

    devices: int | Literal["auto"] = "auto"  # ranks on each node; auto: see layout.ranks_per_node
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    # bf16, bf16-mixed: bf16 weights, fp32 main weights in the optimizer; 16-mixed: so with fp16, and loss scaling
    precision: Precision = "32"
    max_steps: int = 100
    max_time: str | None = None  # DD:HH:MM:SS of this process; then the run saves and ends as on SIGTERM
    gradient_clip_val: float = 1.0  # global norm over all ranks; 0 turns clipping off
    enable_progress_bar: bool = True
    # Seconds without a sign of life after which the run is ended. The default is what torch's collectives wait for, and
    # above all that a healthy run does in silence, such as writing the archive of a large model to a slow disk.
    hang_timeout: float = 1800.0

    def __post_init__(self) -> None:
        demand(
            0 < self.hang_timeout < 1e9, "trainer.hang_timeout", self.hang_timeout, "more than 0 seconds, and finite"
        )
