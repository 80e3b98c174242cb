"""One question to a model about images and videos: examples/qwen3_vl_inference.py.

Everything heavy is imported when the flags have been read, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_vlm.config import LanguageConfig, ParallelConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference.settings import MachineConfig
from nemo_vlm.logs import only_warnings
from nemo_vlm.script import Parser, choose_device

if TYPE_CHECKING:
    from nemo_vlm.inference.generate import Heard
    from nemo_vlm.inference.prompts import Prompt

PICTURE = Path(__file__).resolve().parents[2] / "examples" / "picture.png"
ACCELERATORS: dict[str | None, Literal["auto", "cpu", "gpu"]] = {None: "auto", "cpu": "cpu", "cuda": "gpu"}


@dataclass(frozen=True)
class Question:
    """What is asked, and of whom: the flags, and what laid_out.lay_out wants to know of a task.

    Attributes:
        images, videos: in front of the prompt, or where its <image> and <video> stand.
    """

    model_path: str
    prompt: str
    images: tuple[str, ...]
    videos: tuple[str, ...]
    device: Literal["cpu", "cuda"] | None
    max_new_tokens: int

    @property
    def trainer(self) -> MachineConfig:
        return MachineConfig(devices=1, accelerator=ACCELERATORS[self.device])

    @property
    def source(self) -> tuple[str, str]:
        return "--model-path", self.model_path

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig()


def main() -> None:
    """Read the flags, ask, and print a list of the one answer, or an object of question and answer."""
    question, as_json = read_flags()
    if question.device is not None:
        choose_device(question.device)
    with only_warnings(True):  # what is printed may be for programs
        answered = ask(question)
    shown = json.dumps(answered, ensure_ascii=False) if as_json else str([answered["answer"]])
    sys.stdout.write(f"{shown}\n")


def read_flags() -> tuple[Question, bool]:
    """The question, and whether the answer is wanted as JSON."""
    flags = Parser("Ask a Qwen3-VL, or any other model that sees, about images and videos.")
    flags.add_argument("--model-path", required=True, help="a Hugging Face directory, a .nemo, a training checkpoint")
    flags.add_argument("--image", action="append", default=[], help="may be given again; default: examples/picture.png")
    flags.add_argument("--video", action="append", default=[], help="a file, or a folder of frames; may be given again")
    flags.add_argument("--prompt", help="default: Describe this image. (or video)")
    flags.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    flags.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="default: 1024")
    flags.add_argument("--json", action="store_true", help="print question and answer as one JSON object")
    options = flags.parse_args()
    if options.max_new_tokens < 1:
        flags.error(f"--max-new-tokens={options.max_new_tokens}: must be 1 or more")
    return question_of(options), options.json


def question_of(options: argparse.Namespace) -> Question:
    """With the defaults that depend on what is given."""
    images = options.image or ([] if options.video else [str(PICTURE)])
    prompt = f"Describe this {'image' if images else 'video'}." if options.prompt is None else options.prompt
    media = tuple(images), tuple(options.video)
    return Question(options.model_path, prompt, *media, options.device, options.max_new_tokens)


def ask(question: Question) -> dict[str, Any]:
    """The question and its answer, greedy, in this process alone.

    Raises:
        ConfigError: the model, an image or a video cannot be read.
    """
    from nemo_vlm.inference.answers import answer, sample_of
    from nemo_vlm.inference.laid_out import lay_out
    from nemo_vlm.inference.restore import restore
    from nemo_vlm.inference.settings import DecodingConfig
    from nemo_vlm.models.messages import encode_messages

    model = lay_out(question, {})
    prompt = as_prompt(question, model.run.model)
    model.check_machine({})
    decoding = DecodingConfig(tokens_to_generate=question.max_new_tokens)
    with restore(model.source, model.run.trainer.precision, model.layout) as restored:
        encoded = encode_messages(prompt.line["messages"], prompt.images, prompt.videos, restored.processor)
        sample = sample_of(*encoded, restored)
        with counted() as heard:
            found = answer({0: sample}, restored, decoding, (), heard)[0]
        text = found.text(restored.tokenizer)
    return {
        "model_path": question.model_path,
        "prompt": question.prompt,
        "images": list(question.images),
        "videos": list(question.videos),
        "answer": text,
        "finish_reason": found.finish_reason,
        "token_ids": found.tokens.tolist(),
        "prompt_token_ids": sample.tokens.tolist(),
    }


@contextlib.contextmanager
def counted() -> Iterator[Heard]:
    """While an answer is made, how many tokens it has, where stderr is a terminal; stdout may be for programs."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn

    console, columns = Console(stderr=True), (SpinnerColumn(), "{task.completed} tokens")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("answering", total=None)
        yield lambda rows: progress.advance(task)


def as_prompt(question: Question, config: LanguageConfig) -> Prompt:
    """The question as a line of messages.

    Raises:
        ConfigError: an image or a video is missing, or the text places more or fewer.
    """
    from nemo_vlm.inference.prompts import Prompt, image_of, video_of
    from nemo_vlm.models.messages import media_in, tagged
    from nemo_vlm.models.templates import PLACEHOLDERS

    images = [image_of(None, name, "--image") for name in question.images]
    videos = [video_of(None, name, "--video") for name in question.videos]
    in_front = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    text = tagged(question.prompt, config)
    placed = PLACEHOLDERS.search(text) is not None
    content = text if placed else [*in_front, {"type": "text", "text": text}]
    prompt = Prompt({"messages": [{"role": "user", "content": content}]}, images, videos, "--prompt")
    try:
        if placed:
            media_in(text, images, videos, config)
    except ConfigError as error:
        right = "give --image and --video once for each, or a text that places none"
        raise ConfigError(f"--prompt: {error}; {right}") from None
    return prompt
