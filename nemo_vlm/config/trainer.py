"""`trainer.*`: where a run happens and how long it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_vlm.config.checks import demand, only, refuse_others, seconds

Precision = Literal["32", "bf16", "bf16-mixed", "16-mixed", "16"]
LOGGERS = "the loggers are exp_manager's: create_tensorboard_logger, create_wandb_logger, create_mlflow_logger"
ACCUMULATION = "model.global_batch_size over model.micro_batch_size and the data-parallel ranks says how many there are"


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer.*`: where the run happens and how long it is."""

    devices: int | Literal["auto"] = "auto"  # ranks on each node; auto: see layout.ranks_per_node
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu", "npu"] = "auto"  # npu: Ascend, by torch_npu, which auto never takes
    # bf16, bf16-mixed: bf16 weights, fp32 main weights in the optimizer; 16, 16-mixed: so with fp16, and loss scaling
    precision: Precision = "32"
    # -1: as many as max_epochs, or as model.data.train_samples or train_tokens, which take a recipe's place here
    max_steps: int = 100
    max_epochs: int | None = None  # ends the run as well, whichever comes first; null, -1: does not
    max_time: str | None = None  # DD:HH:MM:SS of this process; then the run saves and ends as on SIGTERM
    gradient_clip_val: float = 1.0  # global norm over all ranks; 0 turns clipping off
    val_check_interval: int | float = 1.0  # whole: steps between two validations; with a point: part of an epoch
    check_val_every_n_epoch: int | None = None  # validate in every n-th epoch only; null, -1: in each
    limit_val_batches: int | float = 1.0  # whole: global batches of a validation; with a point: part of them; 0: none
    limit_test_batches: int | float = 1.0  # of no effect: a run has no test
    log_every_n_steps: int = 1  # for TensorBoard, W&B, MLflow; metrics.csv has every step
    benchmark: bool = False  # torch.backends.cudnn.benchmark
    profile: Literal["torch"] | None = None  # a trace of the third to the fifth step of this process, in <run>/profile
    peak_tflops: float | None = None  # of a rank, which mfu in metrics.csv is taken against; null: its GPU's data sheet
    enable_progress_bar: bool = True
    # Seconds without a sign of life after which the run is ended. The default is what torch's collectives wait for, and
    # above all that a healthy run does in silence, such as writing the archive of a large model to a slow disk.
    hang_timeout: float = 1800.0

    # Lightning's and NeMo's, of which only one value makes sense here.
    logger: bool = only(False, LOGGERS)
    enable_checkpointing: bool = only(False, "checkpoints are exp_manager's: create_checkpoint_callback")
    enable_model_summary: bool = only(False, "dry_run=true shows what the model holds")
    accumulate_grad_batches: int = only(1, ACCUMULATION)
    use_distributed_sampler: bool = only(False, "each rank already reads its own part of the samples")
    replace_sampler_ddp: bool = only(False, "each rank already reads its own part of the samples")
    num_sanity_val_steps: int = only(0, "validation needs no rehearsal; trainer.val_check_interval=1 shows it at once")

    def __post_init__(self) -> None:
        refuse_others(self, "trainer")
        if self.precision == "16":
            object.__setattr__(self, "precision", "16-mixed")
        for key in ("max_epochs", "check_val_every_n_epoch"):
            if getattr(self, key) == -1:
                object.__setattr__(self, key, None)
        steps, epochs, every = self.max_steps, self.max_epochs, self.check_val_every_n_epoch
        demand(self.devices == "auto" or self.devices > 0, "trainer.devices", self.devices, "1 or more, or auto")
        demand(epochs is None or epochs > 0, "trainer.max_epochs", epochs, "1 or more, or -1 for no limit")
        demand(steps > 0 or steps == -1, "trainer.max_steps", steps, "1 or more, or -1 for no limit")
        demand(every is None or every > 0, "trainer.check_val_every_n_epoch", every, "1 or more, or null")
        demand(self.gradient_clip_val >= 0, "trainer.gradient_clip_val", self.gradient_clip_val, "0 (off) or more")
        peak = self.peak_tflops
        demand(peak is None or peak > 0, "trainer.peak_tflops", peak, "more than 0, or null")
        demand(self.log_every_n_steps > 0, "trainer.log_every_n_steps", self.log_every_n_steps, "1 or more")
        seconds("trainer.max_time", self.max_time)
        demand(
            0 < self.hang_timeout < 1e9, "trainer.hang_timeout", self.hang_timeout, "more than 0 seconds, and finite"
        )
        for key in ("val_check_interval", "limit_val_batches"):
            value = getattr(self, key)
            right = value >= 0 and (isinstance(value, int) or value <= 1)
            demand(right, f"trainer.{key}", value, "a whole number (steps, batches), or a part from 0.0 to 1.0")
        demand(self.val_check_interval > 0, "trainer.val_check_interval", self.val_check_interval, "more than 0")
