"""The sides of train.py: one training job under this framework, Hugging Face Trainer and a bare Megatron-Core loop."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from side_by_side import flags

from nemo_vlm.batch import IGNORE_INDEX, Batch, Images, Sample, collate
from nemo_vlm.config import RunConfig

LR, CLIP = 1e-4, 1.0
ROUNDS = 17  # short ones: on a shared machine what disturbs one is gone in the next


def trainer_flags(description: str | None, rounds: int = ROUNDS) -> argparse.ArgumentParser:
    parser = flags(description, rounds)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    return parser


def trainer_settings(threads: int) -> dict[str, Any]:
    """Under which all sides train."""
    return {
        "threads of each side": threads,
        "precision": "fp32",
        "Hugging Face Trainer": f"sdpa, adamw_torch_fused, dynamic padding, clipping at {CLIP}, no logging or saving",
        "optimizer of all": f"AdamW, learning rate {LR}, betas 0.9 and 0.999, no weight decay",
    }


@dataclass(frozen=True)
class Job:
    """What all sides train.

    Attributes:
        folder: Hugging Face's checkpoint from which they start.
        batch: samples of a step.
        text: tokens of a sample beside those of its image; of a VLM a quarter more or less.
        trained: share of a sample's positions that have a label.
        turns: of so many steps each.
    """

    family: str
    folder: Path
    batch: int
    text: int
    trained: float
    turns: int
    steps: int
    threads: int

    @property
    def settings(self) -> dict[str, Any]:
        """The branch `model` of a run; of a VLM the tower is frozen."""
        from nemo_vlm.models.base import family
        from nemo_vlm.typed import defaults

        known = defaults(family(self.family, "config").Config)
        if "mm_cfg" in known:
            known["mm_cfg"]["vision_encoder"]["freeze"] = True
        return known | {
            "family": self.family,
            "restore_from_path": str(self.folder),
            "encoder_seq_length": 2048,
            "micro_batch_size": self.batch,
            "global_batch_size": self.batch,
        }


class Turns:
    """A side's end of the line to take_turns: it waits for its turns, and tells what each took and found."""

    def __init__(self, line: Connection, job: Job) -> None:
        self.line, self.steps = line, job.steps
        self.losses: list[float] = []

    def wait(self) -> None:
        self.line.recv()
        self.started = time.perf_counter()

    def step(self, loss: float) -> None:
        """To be called behind each step."""
        self.losses.append(loss)
        if len(self.losses) == self.steps:
            self.line.send(((time.perf_counter() - self.started) / self.steps, self.losses))
            self.losses = []
            self.wait()


class Made:
    """Samples in memory, as training wants its data (data.dataset.Samples) and as Hugging Face Trainer does."""

    lengths, packed = None, False

    def __init__(self, job: Job, model: Any) -> None:
        samples = [made(job, model, number) for number in range(job.batch * job.steps)]
        self.all = samples * job.turns
        self.parts = [range(len(self.all))]

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, number: int) -> Sample:
        return self.all[number]

    def samples(self, number: int) -> list[Sample]:
        return [self.all[number]]


def made(job: Job, model: Any, number: int) -> Sample:
    """Random text, behind an image where the model sees, and labels of its end.

    The very last position has no label, since Hugging Face gives it none.
    """
    from nemo_vlm.models.images import patchify

    generator, images, text = torch.Generator().manual_seed(number), Images(), job.text
    tokens = torch.empty(0, dtype=torch.int64)
    if model.reads_media:
        vision, text = model.mm_cfg.vision_encoder, int(text * (0.75 + number % job.batch / (2 * job.batch - 2)))
        pixels = torch.randn(3, vision.image_size, vision.image_size, generator=generator)
        images = patchify([pixels], vision.patch_dim)
        tokens = torch.full((model.mm_cfg.num_image_tokens,), model.mm_cfg.image_token_index)
    tokens = torch.cat([tokens, torch.randint(model.vocab_size - 1, (text,), generator=generator)])
    labels = tokens.roll(-1)
    labels[: len(labels) - 1 - int(job.trained * (len(labels) - 1))] = IGNORE_INDEX
    labels[-1] = IGNORE_INDEX
    return Sample(tokens, labels, images, number)


def run_of(job: Job, folder: str) -> RunConfig:
    """Ours, as from the command line."""
    from nemo_vlm.experiment import read

    optim = {"lr": LR, "sched": {"name": "constant"}}
    data = {"dataloader_type": "single", "num_workers": 0}
    checkpoints = {"save_nemo_on_train_end": False}
    return read(
        {
            "trainer": dict(
                accelerator="cpu",
                devices=1,
                precision="32",
                gradient_clip_val=CLIP,
                max_steps=job.turns * job.steps,
                enable_progress_bar=False,
            ),
            "exp_manager": dict(
                exp_dir=folder, create_checkpoint_callback=False, checkpoint_callback_params=checkpoints
            ),
            "model": job.settings | {"optim": optim, "data": data},
        }
    )


def ours(job: Job, turns: Turns) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(job, folder)
        fit_watched(run, Made(job, run.model), turns, lambda module, _: module.position.metrics["reduced_train_loss"])


def fit_watched(run: RunConfig, dataset: Any, turns: Turns, found: Callable[[Any, Any], float]) -> None:
    """What an example's `train` does, but for data and a tokenizer that nobody needs.

    Args:
        found: of a step by Lightning's module and the step's batches, what the turns tell of it.
    """
    from pytorch_lightning.callbacks import Callback

    from nemo_vlm.experiment import fit
    from nemo_vlm.layout import resolve
    from nemo_vlm.training.module import Plan

    class Watch(Callback):
        def on_train_start(self, *unused: Any) -> None:
            turns.wait()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batches: Any, *unused: Any) -> None:
            turns.step(found(module, batches))

    fit(Plan(run, resolve(run, 0, os.environ), "cpu", dataset), None, [Watch()])


def hugging_face(job: Job, turns: Turns) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, samples, found = theirs(job), Made(job, run_of(job, folder).model).all, []
        model.register_forward_hook(lambda module, args, output: found.append(output.loss.item()))
        train_watched(model, arguments(job, folder), samples, turns, found)


def theirs(job: Job) -> Any:
    """transformers' model with the checkpoint's weights, a tower frozen."""
    import transformers

    name = transformers.AutoConfig.from_pretrained(job.folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(job.folder, dtype=torch.float32, attn_implementation="sdpa")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad = "vision_tower" not in parameter_name
    return model


def train_watched(model: Any, settings: Any, samples: Sequence[Sample], turns: Turns, found: list[float]) -> None:
    """By Hugging Face Trainer.

    Args:
        found: where the model's hooks put, of each step, what the turns tell of it.
    """
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *unused: Any, **more: Any) -> None:
            turns.wait()

        def on_step_end(self, *unused: Any, **more: Any) -> None:
            turns.step(found.pop())

    transformers.Trainer(model, settings, collated, list(map(item, samples)), callbacks=[Watch()]).train()


def arguments(job: Job, folder: str, sampling: str = "sequential") -> Any:
    """Hugging Face Trainer's settings."""
    import transformers

    return transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=job.batch,
        max_steps=job.turns * job.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=CLIP,
        train_sampling_strategy=sampling,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def item(sample: Sample) -> dict[str, Any]:
    """A sample as Hugging Face Trainer reads it: by `input_ids` it groups, and pixels are as its models want them."""
    from nemo_vlm.models.images import unpatchify

    return {
        "input_ids": sample.tokens,
        "text": replace(sample, images=Images()),
        "pixels": unpatchify(sample.images) if len(sample.images) else [],
    }


def collated(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch as Hugging Face's models take it: labels at the very positions of the tokens."""
    samples = [one["text"] for one in items]
    batch = collate(samples)
    labels = batch.labels.roll(1, 1)
    inputs: dict[str, Any] = {"input_ids": batch.tokens, "labels": labels}
    width = batch.tokens.shape[1]
    if any(len(sample.tokens) < width for sample in samples):
        inputs["attention_mask"] = (torch.arange(width) < batch.lengths[:, None]).long()
    if pixels := [view for one in items for view in one["pixels"]]:
        inputs["pixel_values"] = torch.stack(pixels)
    return inputs


def bare(job: Job, turns: Turns) -> None:
    """Our model in Megatron's own loop in its shortest form, as examples/run_simple_mcore_train_loop.py has it.

    Its AdamW takes torch's fused kernel, as the others' do. Its linear layers make gradients before they are added to
    the buffers: that ours add them right there (mcore.replicated.add_to_buffers) is a part of what is measured.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_vlm.inference.restore import megatron_groups, process_group
    from nemo_vlm.layout import one_process

    run = run_of(job, "unused")
    data, layout = Made(job, run.model), one_process(run.model, job.batch)
    with process_group(layout), megatron_groups(layout):
        stage = loaded(run, layout)
        config = stage.config
        config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, None
        model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), stage)
        settings = OptimizerConfig(
            lr=LR, weight_decay=0.0, clip_grad=CLIP, adam_beta2=0.999, params_dtype=torch.float32
        )
        optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
        for group in optimizer.param_groups:
            group["fused"] = True
        turns.wait()
        for first in range(0, len(data), job.batch):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            (found,) = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([collate(data.all[first : first + job.batch])]),
                model=model,
                num_microbatches=1,
                seq_length=job.text,
                micro_batch_size=job.batch,
                forward_only=False,
            )
            optimizer.step()
            turns.step(found.item())


def loaded(run: RunConfig, layout: Any) -> Any:
    """Our model with the checkpoint's weights."""
    from nemo_vlm.mcore import weights
    from nemo_vlm.mcore.engine import StageModule, materialize
    from nemo_vlm.models.build import build_chunks
    from nemo_vlm.sources.starting import first_weights

    (chunk,) = build_chunks(run, layout)
    parts = weights.parts(materialize(chunk, torch.float32), run.model.vocab_size)
    for reader in first_weights(run).values():  # a Llama has one module
        weights.load(parts, reader)
    return StageModule(chunk)


def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Callable]:
    batch: Batch = next(batches)
    mask = batch.labels != IGNORE_INDEX

    def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, count = (losses * mask).sum(), mask.sum()
        return total, count.int(), total.detach() / count

    return model(batch, batch.labels), reduce
