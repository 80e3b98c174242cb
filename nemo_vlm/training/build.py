"""A run's model on this rank with its first weights, and the engine that trains it."""

from __future__ import annotations

import contextlib
import logging

import torch
from torch import nn

from nemo_vlm.config import RunConfig
from nemo_vlm.config.peft import is_adapter
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import cpu, groups, lora, user_buffers, weights
from nemo_vlm.mcore.config import DTYPES
from nemo_vlm.mcore.engine import Engine, materialize
from nemo_vlm.mcore.layers import kernels
from nemo_vlm.mcore.updates import UpdateConfig
from nemo_vlm.models.build import build_chunks
from nemo_vlm.options import row_length
from nemo_vlm.planning.memory import replicated_memory
from nemo_vlm.sources import starting
from nemo_vlm.sources.adapters import first_adapter
from nemo_vlm.training.loss import REDUCTIONS

log = logging.getLogger(__name__)
ACTIVATION_ROOM = 0.3  # of a GPU's memory, kept free when model.optim.offload=auto decides


def build_engine(run: RunConfig, layout: Layout, first_weights: bool = True) -> Engine:
    """Build this rank's part of a settled run's model and hand it to the engine.

    Args:
        first_weights: set them; not where the run goes on from a checkpoint.
    """
    if run.step.enable_cuda_graph:
        groups.seed_ranks(layout, run.step.seed, for_graphs=True)
    if run.step.ub_tp_comm_overlap:
        user_buffers.start(run.step, layout, row_length(run, layout), run.model.hidden_size)
    # Under FSDP no rank could hold the whole: memory is taken for the shards. Transformer Engine builds on its device.
    sharded = layout.fsdp is not None and kernels(run.step.transformer_impl) == "local"
    with torch.device("meta") if sharded else contextlib.nullcontext():
        chunks = build_chunks(run, layout)
    for chunk in chunks if not sharded else []:
        materialize(chunk, DTYPES["32" if layout.fsdp else run.trainer.precision])
    engine = make_engine(run, layout, chunks)
    if first_weights or run.peft.lora:  # an adapter's checkpoint holds nothing of its base
        set_first_weights(engine, run)
    return engine


def set_first_weights(engine: Engine, run: RunConfig) -> None:
    """Each module's from the checkpoint that brings it, else drawn; adapters after their base."""
    brought, adapters = starting.first_weights(run), [part for part in engine.parts() if is_adapter(part.name)]
    parts = [part for part in engine.parts() if not is_adapter(part.name)]
    drawn = [part for part in parts if part.name.split(".")[0] not in brought]
    weights.draw(drawn, run.step.seed, run.model.init_method_std, run.model.num_layers)
    for module in sorted({part.name.split(".")[0] for part in drawn} & run.model.parts.keys()):
        if run.model.parts[module].freeze:
            log.warning("%s is frozen, and no checkpoint brings it: its weights stay random", module)
    for module, reader in brought.items():
        weights.load([part for part in parts if part.name.split(".")[0] == module], reader)
    if run.peft.restore_from_path is not None:
        weights.load(engine.kept_parts(), first_adapter(run.peft.restore_from_path).reader)
    else:
        lora.draw(adapters, run.step.seed, run.peft.lora_tuning)
    engine.updater.model_weights_loaded()


def make_engine(run: RunConfig, layout: Layout, chunks: list[nn.Module]) -> Engine:
    """The engine of chunks, whose weights may be in place already."""
    ratios = {name: part.lr_ratio for name, part in run.model.parts.items()}
    offloaded = offload_fraction(run, layout, chunks)
    optim = run.optim.settled(layout, run.trainer.precision, cpu.device().type == "cpu")
    updates = UpdateConfig(optim, run.trainer.gradient_clip_val, ratios, offloaded, run.step)
    return Engine(
        chunks,
        layout,
        updates,
        REDUCTIONS[run.step.loss_reduction],
        run.model.vocab_size or 0,
        DTYPES[run.parallel.fsdp_grad_reduce_dtype],
        run.peft.lora is not None,
    )


def offload_fraction(run: RunConfig, layout: Layout, chunks: list[nn.Module]) -> float:
    """The share of the optimizer that model.optim.offload moves to the host's memory.

    auto: what does not fit into the GPU beside weights, gradients and the room left for activations. On a CPU it is
    there already.
    """
    offload = run.optim.offload
    if not torch.cuda.is_available():
        return 0.0
    if offload != "auto":
        return 1.0 if offload in (True, "static") else float(offload)
    held = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trained = [parameter for parameter in held if parameter.requires_grad]
    memory = replicated_memory(run, layout, held, trained)
    room = torch.cuda.get_device_properties(0).total_memory * (1 - ACTIVATION_ROOM)
    return min(max((memory.total - room) / max(memory.optimizer, 1), 0.0), 1.0)
