"""Writing and reading a run's training checkpoints: engine, random number generators, position."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from nemo_vlm import checkpoints, heartbeat
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import CheckpointConfig, ExpManagerConfig, RunConfig
from nemo_vlm.files import sync
from nemo_vlm.formats import torch_dist_writer
from nemo_vlm.formats.store import Folder
from nemo_vlm.formats.torch_dist import TorchDist
from nemo_vlm.formats.torch_dist_writer import Piece
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import cpu, groups, rng, weights
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.training import staging
from nemo_vlm.typed import model_tree, plain

log = logging.getLogger(__name__)


class Saver:
    """Writes checkpoints, in the background where async_save asks for it; every rank must call every method."""

    def __init__(self, run: RunConfig, layout: Layout) -> None:
        self.run, self.layout = run, layout
        self.config: CheckpointConfig = run.exp_manager.checkpoint_callback_params
        self.folder = checkpoints.folder_of(run.exp_manager)
        self.first = torch.distributed.get_rank() == 0
        self.gathers = layout.fsdp is not None and not run.parallel.fsdp_sharded_checkpoint
        self.group = groups.background_group() if self.config.async_save else None
        self.thread = ThreadPoolExecutor(1, "checkpoint", staging.prepare_thread, (cpu.device(),))
        self.staging = staging.Staging()
        self.pending: Future | None = None
        self.last_step: int | None = None

    def save(self, engine: Engine, position: Position) -> None:
        """Write a checkpoint; with async_save it is copied and written beside the next steps."""
        self.wait()
        heartbeat.at("checkpoint")
        path = checkpoints.path_of(self.folder, position.global_step)
        position = replace(deepcopy(position), optimizer=engine.optimizer_state(), layout=plain(self.layout))
        parts = [part for part in self.parts(engine) if part.primary and part.data.numel()]
        self.last_step = position.global_step
        if self.config.async_save and self.gathers:  # which makes copies
            self.pending = self.thread.submit(self.write, parts, path, position)
        elif self.config.async_save:
            engine.reader = self.thread.submit(self.staging.copy, parts, staging.now())
            self.pending = self.thread.submit(self.write_copies, engine.reader, path, position)
        else:
            self.write(parts, path, position)

    def wait(self) -> None:
        """Until the checkpoint before is complete; its errors are raised here."""
        if self.pending is not None:
            heartbeat.at("checkpoint in the background")
            self.pending.result()
            self.pending = None

    def parts(self, engine: Engine) -> list[weights.Part]:
        parts = engine.saved_parts()
        if self.config.save_optimizer:
            parts += engine.optimizer_parts()
        if self.gathers:
            parts = gathered(parts)
        return parts + ([rng.rng_part(torch.distributed.get_rank())] if self.config.save_rng else [])

    def write_copies(self, copies: Future[list[weights.Part]], path: Path, position: Position) -> None:
        """In the thread that has made them."""
        self.write(copies.result(), path, position)

    def write(self, parts: list[weights.Part], path: Path, position: Position) -> None:
        if self.first:
            checkpoints.begin(path)
        groups.barrier(self.group)  # nobody writes before the marker stands
        torch_dist_writer.save(map(piece, parts), path, self.group)
        if self.first:
            metrics = checkpoints.run_folder(self.run.exp_manager) / "metrics.csv"
            if metrics.exists():  # a checkpoint counts on the rows up to it
                sync(metrics)
            checkpoints.finish(path, position, model_tree(self.run))
            checkpoints.prune(self.folder, self.config)
            log.info("wrote %s", path)


def piece(part: weights.Part) -> Piece:
    offsets = tuple(start for start, _ in part.bounds)
    return Piece(part.name, part.shape, offsets, tuple(part.data.shape), part.data.dtype, lambda: part.data)


def gathered(parts: list[weights.Part]) -> list[weights.Part]:
    """Whole tensors on the first rank, nothing on the others."""
    whole = weights.gather(parts, weights.placements(parts))
    return [
        weights.Part(name, tuple(value.shape), tuple(slice(0, size) for size in value.shape), value)
        for name, value in whole
    ]


def load(engine: Engine, path: Path, config: ExpManagerConfig, layout: Layout) -> Position:
    """Put an engine where a checkpoint was, whatever layout wrote it.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    position, reader = checkpoints.read(path), TorchDist(Folder(path))
    stored = reader.names()
    load_weights(engine, reader)
    if not config.resume_optimizer:
        log.info("the optimizer starts anew (exp_manager.resume_optimizer=false)")
    elif not any(name.startswith("optimizer.") for name in stored):
        log.warning("%s holds no optimizer: its state starts anew", path)
    else:
        # fp32 main weights are missing where the run that saved was in fp32: the weights are as good
        parts = engine.optimizer_parts()
        weights.fill([part for part in parts if part.name in stored or ".state.param." not in part.name], reader)
        engine.set_optimizer_state(position.optimizer)
    name = rng.name(torch.distributed.get_rank())
    if config.resume_rng and position.layout != plain(layout):
        log.info("another layout than the one that saved: random numbers start anew")
    elif config.resume_rng and name in stored:
        part = rng.empty_part(torch.distributed.get_rank(), reader.shape(name))
        weights.fill([part], reader)
        rng.restore_rng(part)
    return position


def load_weights(engine: Engine, reader: TorchDist) -> None:
    stored = reader.names()
    weights.fill([best_source(part, stored) for part in engine.kept_parts()], reader)
    engine.updater.model_weights_loaded()


def load_best(engine: Engine, config: ExpManagerConfig) -> None:
    """Put the weights where the best checkpoint that was kept has them; without one they stay."""
    best = checkpoints.best(config) if torch.distributed.get_rank() == 0 else None
    path = groups.from_first_rank(best)
    if path is None:
        log.warning("no checkpoint is left in %s: the archive has the last weights", checkpoints.folder_of(config))
        return
    load_weights(engine, TorchDist(Folder(path)))
    log.info("the archive has the weights of %s, the best by %s", path, config.checkpoint_callback_params.monitor)


def best_source(part: weights.Part, stored: set[str]) -> weights.Part:
    """fp32 weights from the main weights of a run in half precision, where these were saved."""
    main = f"optimizer.state.param.{part.name}"
    return replace(part, name=main) if part.data.dtype is torch.float32 and main in stored else part
