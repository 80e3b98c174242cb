"""`exp_manager.*`: what is kept of a run, where, and from where it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_vlm.config.checks import demand, demand_name, fill, only, refuse_others, seconds
from nemo_vlm.errors import ConfigError

LOGGERS = "there are create_tensorboard_logger, create_wandb_logger and create_mlflow_logger"
OWN_TIME = "train_step_timing in metrics.csv is each step's own time, on the first rank's clock"
AVERAGES = "averages of the weights are not kept; leave it out"
OF_VALIDATION = ("val_loss", "val_accuracy")  # columns of metrics.csv that only a step with a validation has
MAXIMA = ("global_step", "val_accuracy")  # and those that are better when they are higher
Metric = Literal["global_step", "step", "reduced_train_loss", "val_loss", "val_accuracy", "grad_norm"]


def direction(monitor: str) -> str:
    """In which a metric gets better."""
    return "max" if monitor in MAXIMA else "min"


@dataclass(frozen=True)
class TensorBoardConfig:
    """`exp_manager.summary_writer_kwargs.*`, of torch's SummaryWriter."""

    max_queue: int = 10
    flush_secs: int = 120
    filename_suffix: str = ""


@dataclass(frozen=True)
class WandbConfig:
    """`exp_manager.wandb_logger_kwargs.*`, of wandb.init."""

    project: str | None = None
    name: str | None = None  # null: exp_manager.name
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] | None = None
    id: str | None = None
    resume: str | None = None
    offline: bool = False


@dataclass(frozen=True)
class MlflowConfig:
    """`exp_manager.mlflow_logger_kwargs.*`, of Lightning's MLFlowLogger."""

    experiment_name: str | None = None  # null: exp_manager.name
    run_name: str | None = None
    tracking_uri: str | None = None  # null: the run's folder
    tags: dict | None = None
    prefix: str = ""
    artifact_location: str | None = None
    run_id: str | None = None


@dataclass(frozen=True)
class StepTimingConfig:
    """`exp_manager.step_timing_kwargs.*`."""

    reduction: str = only("mean", OWN_TIME)
    sync_cuda: bool = only(False, OWN_TIME)
    buffer_size: int = only(1, OWN_TIME)

    def __post_init__(self) -> None:
        refuse_others(self, "exp_manager.step_timing_kwargs")


@dataclass(frozen=True)
class EmaConfig:
    """`exp_manager.ema.*`."""

    enable: bool = only(False, AVERAGES)
    decay: float = 0.999
    every_n_steps: int = 1
    cpu_offload: bool = False
    validate_original_weights: bool = False

    def __post_init__(self) -> None:
        refuse_others(self, "exp_manager.ema")


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """`exp_manager.early_stopping_callback_params.*`, as Lightning's EarlyStopping: when a run that stands still ends.

    A metric is judged in each step that has one: val_loss and val_accuracy after each validation, the others always but
    where the step was skipped (an overflow under 16-mixed), which says nothing of the model.
    """

    monitor: Literal["reduced_train_loss", "val_loss", "val_accuracy", "grad_norm"] = "val_loss"
    mode: Literal["min", "max"] | None = None  # null: max of val_accuracy, min of the others
    min_delta: float = 0.001  # a smaller change is none
    patience: int = 10  # so many metrics in a row that were no better end the run
    check_finite: bool = True  # NaN and infinity end it at once
    stopping_threshold: float | None = None  # so does a metric better than this
    divergence_threshold: float | None = None  # and one worse than this
    verbose: bool = True  # of no effect, as the next two: the run always says why it ends, once
    check_on_train_epoch_end: bool | None = None
    log_rank_zero_only: bool = False
    strict: bool = only(True, "a metric that the run does not have could never end it")

    def __post_init__(self) -> None:
        key = "exp_manager.early_stopping_callback_params"
        refuse_others(self, key)
        fill(self, mode=direction(self.monitor))
        demand(self.patience > 0, f"{key}.patience", self.patience, "1 or more")
        demand(self.min_delta >= 0, f"{key}.min_delta", self.min_delta, "0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """`exp_manager.checkpoint_callback_params.*`: when a training checkpoint is written, and which are kept."""

    dirpath: str | None = None  # null: checkpoints/ in the run's folder
    # Each of the next four asks for checkpoints; where none does, the last step's is written, and with
    # monitor=val_loss or val_accuracy one after each validation.
    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    train_time_interval: str | None = None  # DD:HH:MM:SS between two checkpoints
    monitor: Metric = "global_step"  # a column of metrics.csv; step is NeMo's name for global_step
    mode: Literal["min", "max"] | None = None  # null: max of global_step and val_accuracy, min of the others
    save_top_k: int = 3  # the best by `monitor` are kept, the newest always; -1: all
    save_optimizer: bool = True
    save_rng: bool = True
    save_weights_only: bool = False  # true: neither optimizer nor random numbers
    # Written in the background while the next steps run, from a copy in the host's memory, pinned where there is a GPU;
    # each rank keeps the room for it to the end of the run
    async_save: bool = False
    save_nemo_on_train_end: bool = True
    always_save_nemo: bool = False  # the archive is written anew with each checkpoint
    save_best_model: bool = False  # the archive of the end has the weights of the best checkpoint by `monitor`
    prefix: str | None = None  # of the archive's name; null: exp_manager.name
    postfix: str = ".nemo"
    model_parallel_size: int | None = None  # checked against the layout, which is known without it
    filename: str | None = None  # of no effect, as the next two: a checkpoint is step_NNNNNN, its metrics in state.json
    save_on_train_epoch_end: bool | None = None
    verbose: bool = True
    save_last: bool = only(True, "a run goes on from its newest checkpoint; it is always kept")

    def __post_init__(self) -> None:
        key = "exp_manager.checkpoint_callback_params"
        refuse_others(self, key)
        if self.every_n_epochs == 0:  # so NeMo's recipes turn it off
            object.__setattr__(self, "every_n_epochs", None)
        for name in ("every_n_train_steps", "every_n_epochs"):
            every = getattr(self, name)
            demand(every is None or every > 0, f"{key}.{name}", every, "1 or more, or null")
        if self.monitor == "step":
            object.__setattr__(self, "monitor", "global_step")
        fill(self, mode=direction(self.monitor))
        demand(self.save_top_k >= -1, f"{key}.save_top_k", self.save_top_k, "-1 (all) or more")
        seconds(f"{key}.train_time_interval", self.train_time_interval)
        demand(self.postfix.endswith(".nemo"), f"{key}.postfix", self.postfix, "a name that ends with .nemo")
        for name in ("prefix", "postfix"):
            if getattr(self, name):
                demand_name(f"{key}.{name}", getattr(self, name))
        if self.save_weights_only:
            object.__setattr__(self, "save_optimizer", False)
            object.__setattr__(self, "save_rng", False)

    @property
    def at_validations(self) -> bool:
        """Whether each validation is followed by a checkpoint."""
        asked = (self.every_n_train_steps, self.every_n_epochs, self.train_time_interval)
        return self.monitor in OF_VALIDATION and asked == (None, None, None)


@dataclass(frozen=True)
class ExpManagerConfig:
    """`exp_manager.*`: what is kept of the run, where, and from where it goes on."""

    name: str = "default"
    exp_dir: str | None = "./nemo_experiments"  # null means the same
    version: str | int | None = None  # a folder below the name; null: none
    use_datetime_version: bool = False  # the time of the start as version, unless resume_if_exists
    explicit_log_dir: str | None = None  # the run's folder itself, in place of exp_dir, name and version
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointConfig = field(default_factory=CheckpointConfig)
    create_early_stopping_callback: bool = False
    early_stopping_callback_params: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    resume_if_exists: bool = False  # go on from the newest complete checkpoint of this name
    resume_ignore_no_checkpoint: bool = True  # false: to find none is an error
    resume_from_checkpoint: str | None = None  # a checkpoint of any run; resume_if_exists prefers this name's own
    resume_from_step: int | None = None  # go on from this checkpoint; later ones are removed
    resume_optimizer: bool = True  # false: weights only, the optimizer starts anew
    resume_rng: bool = True
    max_time_per_run: str | None = None  # as trainer.max_time
    files_to_copy: tuple[str, ...] | None = None  # into the run's folder
    create_tensorboard_logger: bool = True
    summary_writer_kwargs: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    create_wandb_logger: bool = False
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: MlflowConfig = field(default_factory=MlflowConfig)
    log_global_rank_0_only: bool = False  # false: nemo_log_*.txt of the first rank of each node
    log_local_rank_0_only: bool = False  # of no effect: it is always so
    seconds_to_sleep: float = 5.0  # of no effect: ranks wait for each other, as long as it takes
    resume_past_end: bool = False  # of no effect: a run that is done goes on where trainer.max_steps has grown

    # NeMo's, of which only one value makes sense here.
    create_dllogger_logger: bool = only(False, LOGGERS)
    create_clearml_logger: bool = only(False, LOGGERS)
    create_neptune_logger: bool = only(False, LOGGERS)
    create_preemption_callback: bool = only(True, "SIGTERM always saves and ends; create_checkpoint_callback=false")
    disable_validation_on_resume: bool = only(True, "what was validated before a checkpoint stands in metrics.csv")
    log_step_timing: bool = only(True, OWN_TIME)
    step_timing_kwargs: StepTimingConfig = field(default_factory=StepTimingConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)

    def __post_init__(self) -> None:
        refuse_others(self, "exp_manager")
        fill(self, exp_dir="./nemo_experiments")
        demand_name("exp_manager.name", self.name)
        if self.version is not None:
            demand_name("exp_manager.version", str(self.version))
        seconds("exp_manager.max_time_per_run", self.max_time_per_run)
        if self.checkpoint_callback_params.save_best_model and not self.create_checkpoint_callback:
            raise ConfigError(
                "exp_manager.checkpoint_callback_params.save_best_model=true: needs create_checkpoint_callback=true"
            )
