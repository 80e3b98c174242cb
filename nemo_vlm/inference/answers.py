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
from nemo_vlm.inference.generate import Answer, Ends, generate
from nemo_vlm.inference.laid_out import LaidOut, lay_out, make_folder, share, unwritable
from nemo_vlm.inference.neva import Questions
from nemo_vlm.inference.prompts import Prompt, RawPrompts
from nemo_vlm.inference.restore import Restored, restore
from nemo_vlm.inference.settings import AskConfig, DecodingConfig, GenerateConfig, NevaInferenceConfig

log = logging.getLogger(__name__)

Encoded = tuple[Tensor, list[Any]]  # ids of a prompt, and its images and videos


@dataclass(frozen=True)
class Generation:
    """What was settled before a rank starts.

    Attributes:
        form: how prompts are read and answers written.
    """

    config: AskConfig
    form: RawPrompts | Questions
    model: LaidOut

    def make_ready(self, env: Mapping[str, str]) -> None:
        """What a plan need not find here: the prompts, the folder of the answers, a machine that takes the model.

        Raises:
            ConfigError: one of them is missing.
        """
        self.form.read()
        self.model.check_machine(env)
        if self.config.output_file is not None:
            make_folder(Path(self.config.output_file).parent, f"output_file={self.config.output_file}")

    def run(self) -> None:
        """Answer all prompts; the first rank writes or prints the answers.

        Raises:
            RuntimeError: when all is written, on the first rank: some images could not be decoded.
        """
        prompts, inference = self.form.read(), self.config.inference
        with restore(self.model.source, self.model.run.trainer.precision, self.model.layout) as restored:
            asked = [encoded(self.form, prompt, restored) for prompt in prompts]
            began = time.perf_counter()

            def work(batch: range) -> list[tuple[dict[str, Any], int]]:
                samples, unreadable = with_pixels([asked[number] for number in batch], batch, restored)
                found = answer(samples, restored, inference, self.form.end_strings(restored))
                lines = {number: (unanswered(prompts[number], why), 0) for number, why in unreadable.items()}
                for number, one in found.items():
                    line = self.form.line(prompts[number], samples[number], one, restored)
                    lines[number] = line | probabilities(one), len(one.tokens)
                return [lines[number] for number in batch]

            description = "answering" if self.config.output_file else ""
            answered = share(len(prompts), inference.batch_size, work, self.model.layout, description)
            seconds, first = time.perf_counter() - began, torch.distributed.get_rank() == 0
        count = sum(length for _, length in answered)
        log.info("%d tokens in %.2f s, %.1f tokens/s", count, seconds, count / seconds)
        if first:
            deliver([line for line, _ in answered], self.config)
            complain([line["error"] for line, length in answered if not length], len(answered))


def prepare(config: GenerateConfig | NevaInferenceConfig, env: Mapping[str, str]) -> Generation:
    """Open the checkpoint and lay it out.

    Raises:
        ConfigError: there is none, or it cannot be laid out so.
    """
    if isinstance(config, GenerateConfig):
        return Generation(config, RawPrompts(config), lay_out(config, env))
    template = {key: value for key, value in vars(config.model.data).items() if value is not None}
    return Generation(config, Questions(config), lay_out(config, env, template))


def with_bos(ids: Tensor, restored: Restored, inference: DecodingConfig) -> Tensor:
    """The prompt's ids as inference.add_BOS wants them.

    Raises:
        ConfigError: the tokenizer has no BOS.
    """
    bos = restored.tokenizer.bos_token_id
    if inference.add_BOS is None:
        return ids
    if bos is None:
        raise ConfigError(f"inference.add_BOS={inference.add_BOS}: the tokenizer has no BOS; null leaves prompts alone")
    bare = ids[1:] if len(ids) and ids[0] == bos else ids
    return torch.cat([torch.tensor([bos]), bare]) if inference.add_BOS else bare


def encoded(form: RawPrompts | Questions, prompt: Prompt, restored: Restored) -> Encoded | str:
    """Or why its images and videos cannot be read, which all ranks find alike.

    Raises:
        ConfigError: names the line.
    """
    try:
        tokens, media = form.encode(prompt, restored)
    except ConfigError as error:
        if isinstance(error, SampleError) and error.of_media:
            return str(error)
        raise ConfigError(f"{prompt.called}: {error}") from None
    return with_bos(tokens, restored, form.config.inference), media


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
    samples: Mapping[int, Sample], restored: Restored, inference: DecodingConfig, end_strings: tuple[str, ...]
) -> dict[int, Answer]:
    """Continue a batch of prompts, by number, each as far as inference and the model allow."""
    if not samples:
        return {}
    room, batch = restored.config.encoder_seq_length, list(samples.values())
    limits = [min(inference.tokens_to_generate, room - len(sample.tokens)) for sample in batch]
    ends = Ends(frozenset(restored.stop_ids), end_strings, restored.tokenizer)
    return dict(zip(samples, generate(restored.forward, batch, limits, inference, ends, list(samples)), strict=True))


def unanswered(prompt: Prompt, why: str) -> dict[str, Any]:
    return prompt.line | {"text": "", "error": f"{prompt.called}: {why}"}


def complain(errors: Sequence[str], count: int) -> None:
    """Raises RuntimeError where some of the prompts could not be answered."""
    if errors:
        told = f"{len(errors)} of {count} prompts could not be answered, see 'error' in their lines"
        raise RuntimeError(f"{told}; the first: {errors[0]}")


def probabilities(found: Answer) -> dict[str, list]:
    """NeMo's fields of inference.compute_logprob and all_probs."""
    fields = {"logprob": found.logprob, "full_logprob": found.full_logprob}
    return {name: values.tolist() for name, values in fields.items() if values is not None}


def deliver(lines: list[dict[str, Any]], config: AskConfig) -> None:
    """To the file or the terminal; of a prompt on the command line, the answer alone."""
    if config.output_file is not None:
        write(lines, Path(config.output_file), f"output_file={config.output_file}")
    alone = isinstance(config, GenerateConfig) and config.prompt is not None
    if alone or config.output_file is None:
        for line in lines:
            sys.stdout.write(f"{line['text'] if alone else json.dumps(line, ensure_ascii=False)}\n")
        sys.stdout.flush()


def write(lines: Sequence[dict[str, Any]], path: Path, key: str) -> None:
    """Raises ConfigError, which names the key that asked for it, where it cannot be written."""
    try:
        regular = not path.exists() or path.is_file()
        with written_whole(path) if regular else path.open("w") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        raise unwritable(key, error) from None
    log.info("wrote %s", path)
