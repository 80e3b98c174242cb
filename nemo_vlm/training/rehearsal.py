"""A step of a run's own engine on made-up samples, its tensors counted: what a plan of memory is measured against."""

from __future__ import annotations

import math
from collections import Counter

import torch

from nemo_vlm.batch import IGNORE_INDEX, Batch, Images, Sample, collate, pack
from nemo_vlm.config import RunConfig
from nemo_vlm.data.loader import pad_multiple
from nemo_vlm.layout import Layout
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.planning.measured import TensorBytes
from nemo_vlm.planning.workload import num_micro_batches, workload
from nemo_vlm.training.build import build_engine

BATCH = "batch"
PARTS = ("vision_model", "vision_projection")  # beside those of the language model
OF_LANGUAGE = ("embedding", "decoder", "output_layer")


def rehearse(run: RunConfig, layout: Layout, steps: int = 2) -> Counter[str]:
    """Bytes on this rank at the peak of the last of some steps, by kind; Megatron's groups must stand.

    A step is rehearsed on the samples that planning.workload estimates. The batch itself is not counted.
    """
    engine, batches = build_engine(run, layout), batches_of(run, layout)
    for _ in range(steps - 1):
        engine.step(batches, lr=0.0)
    tracker = tracked(engine)
    tracker.count([tensor for batch in batches for tensor in vars(batch).values() if torch.is_tensor(tensor)], BATCH)
    tracker.count([batch.images.pixel_values for batch in batches], BATCH)
    tracker.restart()
    with tracker:
        engine.step(batches, lr=0.0)
    return Counter({kind: size for kind, size in tracker.at_peak.items() if kind != BATCH})


def tracked(engine: Engine) -> TensorBytes:
    """A tracker that knows what the engine keeps, and of which part what it makes is."""
    tracker = TensorBytes()
    for module in engine.updater.modules:
        parameters = list(module.parameters())
        grads = [getattr(each, "main_grad", each.grad) for each in parameters]
        tracker.count(parameters, "weights")
        tracker.count([grad for grad in grads if grad is not None], "gradients")
        named = dict(module.named_modules())
        wanted = {name: each for name, each in named.items() if name.rpartition(".")[2] in PARTS + OF_LANGUAGE}
        tracker.follow((name.rpartition(".")[2], each) for name, each in wanted.items())
    for shard in engine.updater.shards():
        tracker.count(shard.tensors.values(), "optimizer")
    return tracker


def batches_of(run: RunConfig, layout: Layout) -> list[Batch]:
    """Micro-batches of this rank, each as planning.workload has it."""
    work, multiple = workload(run, layout, fullest=True), pad_multiple(run, layout, packed=False)
    put_together, count = pack if work.packed else collate, work.tokens // work.samples
    grids = run.model.typical_views(run.data)
    samples = [sample_of(run, grids, count, torch.Generator().manual_seed(seed)) for seed in range(work.samples)]
    return [put_together(samples, multiple) for _ in range(num_micro_batches(run, layout, work))]


def sample_of(run: RunConfig, grids: list[tuple[int, int, int]], length: int, generator: torch.Generator) -> Sample:
    """Random text of so many tokens with views in it, and their random pixels."""
    model, visual = run.model, run.model.visual_tokens(grids)
    ids = torch.randint(model.vocab_size or 1, (length + 1,), generator=generator)
    if not visual:
        return Sample(ids[:-1], ids[1:])
    placeholders = torch.tensor(model.placeholder_ids)
    ids = ids.masked_fill(torch.isin(ids, placeholders), 0)
    ids[1 : 1 + visual] = placeholders[0]
    labels = ids.masked_fill(ids == placeholders[0], IGNORE_INDEX)[1:]
    shape = sum(map(math.prod, grids)), model.media.vision_encoder.patch_values  # type: ignore[union-attr]
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Sample(ids[:-1], labels, Images(pixels, torch.tensor(grids), mean=(0.5,) * 3, std=(0.5,) * 3))
