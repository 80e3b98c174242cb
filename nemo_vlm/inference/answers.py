"""The task of generation: prompts in, answers out."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from nemo_vlm import layout as layouts
from nemo_vlm.batch import Sample
from nemo_vlm.config import ExpManagerConfig, RunConfig, StepConfig, TrainerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import written_whole
from nemo_vlm.inference.generate import greedy
from nemo_vlm.inference.prompts import Prompt, read_prompts
from nemo_vlm.inference.restore import Restored, restore, stored_precision
from nemo_vlm.inference.settings import GenerateConfig
from nemo_vlm.layout import Layout
from nemo_vlm.models.conversation import chat_text
from nemo_vlm.planning import machine
from nemo_vlm.planning.plan import Planned
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What was settled before a rank starts.

    Attributes:
        run: the model as a run of its layout.
    """

    config: GenerateConfig
    source: Source
    run: RunConfig
    layout: Layout

    @property
    def planned(self) -> Planned:
        return Planned(self.run, self.layout, False, [])


def prepare(config: GenerateConfig, env: Mapping[str, str]) -> Generation:
    """Open the checkpoint and lay it out.

    Raises:
        ConfigError: there is none, or it cannot be laid out so.
    """
    if config.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    source = open_source(str(config.model_path), "model_path")
    settled, stored = config.trainer, stored_precision(source)
    precision: Any = stored if settled.precision == "auto" else settled.precision
    trainer = TrainerConfig(
        settled.devices, settled.num_nodes, settled.accelerator, precision, hang_timeout=settled.hang_timeout
    )
    # What serves training alone is left out.
    parallel = replace(config.model, virtual_pipeline_model_parallel_size=None, sequence_parallel=False)
    one_by_one = StepConfig(micro_batch_size=1, global_batch_size=1)
    settings = source.settings | {"parallel": parallel, "step": one_by_one}
    run = RunConfig(trainer=trainer, exp_manager=ExpManagerConfig(name=Path(source.path).stem), **settings)
    layouts.check(run)
    gpus = machine.num_gpus(trainer.accelerator)
    ranks, needed = layouts.ranks_per_node(run, gpus, env) * trainer.num_nodes, layouts.replica_size(parallel)
    if ranks != needed:
        raise ConfigError(f"{ranks} ranks: one copy of the model answers, it takes {needed} (tensor x pipeline)")
    return Generation(config, source, run, layouts.resolve(run, gpus, env))


def make_ready(generation: Generation, env: Mapping[str, str]) -> None:
    """What a plan need not find here: the prompts, the folder of the answers, a machine that takes the model.

    Raises:
        ConfigError: one of them is missing.
    """
    read_prompts(generation.config)
    run, layout = generation.run, generation.layout
    machine.check_machine(run, layout, machine.num_gpus(run.trainer.accelerator), env, trains=False)
    if generation.config.output_file is not None:
        try:
            Path(generation.config.output_file).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(generation.config.output_file, error) from None


def answer(generation: Generation) -> None:
    """Answer all prompts; the first rank writes or prints the answers."""
    config, prompts = generation.config, read_prompts(generation.config)
    with restore(generation.source, generation.run.trainer.precision, generation.layout) as restored:
        first = torch.distributed.get_rank() == 0
        questions = [encode(prompt, restored) for prompt in prompts]  # before the first answer takes its time
        began, lines = time.perf_counter(), []
        shown = track(range(len(prompts)), "answering", disable=not (first and config.output_file))
        for number in shown:
            lines.append(one_answer(prompts[number], questions[number], restored, config))
            if first and (config.prompt is not None or config.output_file is None):
                say(lines[-1], config)
        seconds = time.perf_counter() - began
    count = sum(len(line["token_ids"]) for line in lines)
    if first and config.output_file is not None:
        write(lines, config.output_file)
    log.info("%d tokens in %.2f s, %.1f tokens/s", count, seconds, count / seconds)


def encode(prompt: Prompt, restored: Restored) -> Tensor:
    """Ids [s] of a prompt; a chat template that writes BOS itself gets no second one, as in transformers' processors.

    Raises:
        ConfigError: names the line.
    """
    line, tokenizer = prompt.line, restored.tokenizer
    try:
        if "prompt" in line:
            return restored.processor.tokens(line["prompt"], len(prompt.images))
        text = chat_text(line["messages"], tokenizer)
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return restored.processor.tokens(text, len(prompt.images), add_special_tokens=not has_bos)
    except ConfigError as error:
        raise ConfigError(f"{prompt.called}: {error}") from None


def one_answer(prompt: Prompt, ids: Tensor, restored: Restored, config: GenerateConfig) -> dict[str, Any]:
    """The line with its answer."""
    sample = Sample(ids, torch.empty(0, dtype=torch.int64), restored.processor.pixels(prompt.images))
    room = restored.config.encoder_seq_length - len(ids)
    limit = min(config.inference.tokens_to_generate, room)
    (tokens,) = greedy(restored.forward.last, [sample], limit, restored.stop_ids)
    return prompt.line | {
        "text": restored.tokenizer.decode(tokens, skip_special_tokens=True),
        "token_ids": tokens.tolist(),
        "prompt_token_ids": ids.tolist(),
    }


def say(line: dict[str, Any], config: GenerateConfig) -> None:
    """The answer to a prompt of the command line, the whole line of a file."""
    text = line["text"] if config.prompt is not None else json.dumps(line, ensure_ascii=False)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def write(lines: list[dict[str, Any]], path: str) -> None:
    try:
        with written_whole(Path(path)) as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        raise unwritable(path, error) from None
    log.info("wrote %s", path)


def unwritable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"output_file={path}: cannot be written ({error.strerror})")
