"""The task of generation: prompts in, answers out. The copies of the model share the prompts."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.batch import Sample
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.files import written_whole
from nemo_vlm.inference.generate import Answer, Ends, Heard, Row, generate, unheard
from nemo_vlm.inference.laid_out import LaidOut, lay_out, make_folder, share, writing
from nemo_vlm.inference.neva import NevaPrompts
from nemo_vlm.inference.prompts import Prompt, RawPrompts
from nemo_vlm.inference.restore import Restored, restore
from nemo_vlm.inference.settings import AskConfig, DecodingConfig, GenerateConfig, NevaInferenceConfig
from nemo_vlm.inference.speed import Speed, in_words
from nemo_vlm.inference.streaming import Stream

log = logging.getLogger(__name__)

Encoded = tuple[Tensor, list[Any]]  # ids of a prompt, and its images and videos


@dataclass(frozen=True)
class Generation:
    """What was settled before a rank starts.

    Attributes:
        form: how prompts are read and answers written.
    """

    config: AskConfig
    form: RawPrompts | NevaPrompts
    model: LaidOut

    def make_ready(self, env: Mapping[str, str]) -> None:
        """What a plan need not find here: the prompts, the folder of the answers, a machine that takes the model.

        Raises:
            ConfigError: one of them is missing.
        """
        self.form.read()
        self.model.check_machine(env)
        if self.config.output_file is not None:
            key = f"output_file={self.config.output_file}"
            make_folder(Path(self.config.output_file).parent, key)
            if Path(self.config.output_file).is_dir():
                raise ConfigError(f"{key}: is a folder; must be a file")

    def run(self) -> None:
        """Answer all prompts; the first rank writes or prints the answers.

        Raises:
            RuntimeError: when all is written, on the first rank: some images could not be decoded.
        """
        prompts, config, layout = self.form.read(), self.config, self.model.layout
        with restore(self.model.source, self.model.run.trainer.precision, layout) as restored:
            asked = [encoded(self.form, prompt, restored) for prompt in prompts]
            began, speed, first = time.perf_counter(), Speed(), torch.distributed.get_rank() == 0
            heard = self.listener(speed, restored, streams=first and is_alone(config))

            def work(batch: range) -> list[dict[str, Any]]:
                samples, unreadable = with_pixels([asked[number] for number in batch], batch, restored)
                lines = {number: unanswered(prompts[number], why) for number, why in unreadable.items()}
                speed.begin()
                found = answer(samples, restored, config.inference, self.form.end_strings(restored), heard)
                for number, one in found.items():
                    line = self.form.line(prompts[number], samples[number], one, restored)
                    lines[number] = line | {"finish_reason": one.finish_reason} | probabilities(one)
                return [lines[number] for number in batch]

            description = "answering" if config.output_file and not is_alone(config) else ""
            lines = share(len(prompts), config.inference.batch_size, work, layout, description)
            told = f"{in_words(speed, layout)}; {time.perf_counter() - began:.2f} s in all\n"
        if first:
            deliver(lines, config)
            sys.stderr.write(told)
            tell_of_cut(lines, config.inference, restored.config.encoder_seq_length)
            complain([line["error"] for line in lines if line["finish_reason"] == "error"], len(lines))

    def listener(self, speed: Speed, restored: Restored, streams: bool) -> Heard:
        """What takes the times, and writes the answer to the terminal where it is to be streamed."""
        if not streams:
            return speed.hear
        stream = Stream(restored.tokenizer, self.form.end_strings(restored), sys.stdout)

        def hear(rows: Sequence[Row]) -> None:
            speed.hear(rows)
            stream.hear(rows)

        return hear


def prepare(config: GenerateConfig | NevaInferenceConfig, env: Mapping[str, str]) -> Generation:
    """Open the checkpoint and lay it out.

    Raises:
        ConfigError: there is none, or it cannot be laid out so.
    """
    if isinstance(config, GenerateConfig):
        return Generation(config, RawPrompts(config), lay_out(config, env))
    template = {key: value for key, value in vars(config.model.data).items() if value is not None}
    return Generation(config, NevaPrompts(config), lay_out(config, env, template))


def with_bos(ids: Tensor, restored: Restored, inference: DecodingConfig) -> Tensor:
    """The prompt's ids as inference.add_BOS wants them.

    Raises:
        ConfigError: the tokenizer has no BOS.
        SampleError: too_long: with it there is no room for an answer.
    """
    bos = restored.tokenizer.bos_token_id
    if inference.add_BOS is None:
        return ids
    if bos is None:
        raise ConfigError(f"inference.add_BOS={inference.add_BOS}: the tokenizer has no BOS; null leaves prompts alone")
    bare = ids[1:] if len(ids) and ids[0] == bos else ids
    return restored.processor.text.roomy(torch.cat([torch.tensor([bos]), bare])) if inference.add_BOS else bare


def encoded(form: RawPrompts | NevaPrompts, prompt: Prompt, restored: Restored) -> Encoded | str:
    """Or why its images and videos cannot be read, which all ranks find alike.

    Raises:
        ConfigError: names the line.
    """
    try:
        tokens, media = form.encode(prompt, restored)
        tokens = with_bos(tokens, restored, form.config.inference)
    except ConfigError as error:
        if isinstance(error, SampleError) and error.of_media:
            return str(error)
        raise ConfigError(f"{prompt.called}: {error}") from None
    if not len(tokens):
        raise ConfigError(f"{prompt.called}: the prompt is empty, and the tokenizer puts nothing in front of it")
    return tokens, media


def sample_of(tokens: Tensor, media: list[Any], restored: Restored) -> Sample:
    return Sample(tokens, torch.empty(0, dtype=torch.int64), restored.processor.pixels(media))


def with_pixels(
    asked: Sequence[Encoded | str], numbers: Sequence[int], restored: Restored
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Prompts with their pixels, by number; and of those whose pixels cannot be read, why. All ranks find the same."""
    samples, unreadable = {}, {}
    for number, one in zip(numbers, asked, strict=True):
        if isinstance(one, str):
            unreadable[number] = one
            continue
        try:
            samples[number] = sample_of(*one, restored)
        except SampleError as error:
            unreadable[number] = str(error)
    return samples, unreadable


def answer(
    samples: Mapping[int, Sample],
    restored: Restored,
    inference: DecodingConfig,
    end_strings: tuple[str, ...],
    heard: Heard = unheard,
) -> dict[int, Answer]:
    """Continue a batch of prompts, by number, each as far as inference and the model allow; see generate."""
    if not samples:
        return {}
    room, batch = restored.config.encoder_seq_length, list(samples.values())
    limits = [min(inference.tokens_to_generate, room - len(sample.tokens)) for sample in batch]
    ends = Ends(frozenset(restored.stop_ids), end_strings, restored.tokenizer)
    found = generate(restored.forward, batch, limits, inference, ends, list(samples), heard)
    return dict(zip(samples, found, strict=True))


def unanswered(prompt: Prompt, why: str) -> dict[str, Any]:
    return prompt.line | {"text": "", "finish_reason": "error", "error": f"{prompt.called}: {why}"}


def tell_of_cut(lines: Sequence[Mapping[str, Any]], inference: DecodingConfig, room: int) -> None:
    """How many answers would have gone on.

    Args:
        room: for the tokens of a prompt and its answer.
    """
    if cut := sum(line["finish_reason"] == "length" for line in lines):
        limits = f"inference.tokens_to_generate={inference.tokens_to_generate} or model.encoder_seq_length={room}"
        sys.stderr.write(f"{cut} of {len(lines)} answers reached {limits}\n")


def complain(errors: Sequence[str], count: int) -> None:
    """Raises RuntimeError where some of the prompts could not be answered."""
    if errors:
        told = f"{len(errors)} of {count} prompts could not be answered, see 'error' in their lines"
        raise RuntimeError(f"{told}; the first: {errors[0]}")


def probabilities(found: Answer) -> dict[str, list]:
    """NeMo's fields of inference.compute_logprob and all_probs."""
    fields = {"logprob": found.logprob, "full_logprob": found.full_logprob}
    return {name: values.tolist() for name, values in fields.items() if values is not None}


def is_alone(config: AskConfig) -> bool:
    """Whether the one prompt of the command line is asked, whose answer goes to the terminal as it comes."""
    return isinstance(config, GenerateConfig) and config.prompt is not None


def deliver(lines: list[dict[str, Any]], config: AskConfig) -> None:
    """To the file, else to the terminal, unless it has been there already."""
    if config.output_file is not None:
        write(lines, Path(config.output_file), f"output_file={config.output_file}")
    elif not is_alone(config):
        for line in lines:
            sys.stdout.write(f"{json.dumps(line, ensure_ascii=False)}\n")
        sys.stdout.flush()


def write(lines: Sequence[dict[str, Any]], path: Path, key: str) -> None:
    """Raises ConfigError, which names the key that asked for it, where it cannot be written."""
    with writing(key):
        regular = not path.exists() or path.is_file()
        with written_whole(path) if regular else path.open("w") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    log.info("wrote %s", path)
