"""What scripts with flags have in common. Imports neither torch nor what needs it, so that --help is quick."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_vlm.errors import ConfigError, Failure, explain
from nemo_vlm.logs import set_up_logging

if TYPE_CHECKING:
    from nemo_vlm.config import TokenizerConfig

# torch's names of the dtypes; beside ours the names that NeMo's scripts take
PRECISIONS = {
    "auto": None,
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "32": "float32",
    "16": "float16",
    "bf16-mixed": "bfloat16",
}


PATIENCE = 10.0  # seconds


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help tells all flags)")


def parser(description: str | None) -> Parser:
    """A parser with the flags of every conversion."""
    made = Parser(description)
    made.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the output; auto: each tensor keeps its own"
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the verification runs")
    made.add_argument("--no-verify", dest="verify", action="store_false", help="do not run both models at the end")
    return made


def add_tokenizer(flags: Parser) -> None:
    """The flags that say which tokenizer, see tokenizer_of."""
    flags.add_argument("--tokenizer", required=True, help="a directory; with --library sentencepiece its model")
    flags.add_argument("--library", default="huggingface", choices=("huggingface", "sentencepiece"))


def tokenizer_of(options: argparse.Namespace) -> TokenizerConfig:
    from nemo_vlm.config import TokenizerConfig

    place: dict[str, Any] = {"model" if options.library == "sentencepiece" else "type": options.tokenizer}
    return TokenizerConfig(library=options.library, **place)


def run_command(main: Callable[[], None]) -> None:
    """Run a script: an error is one line on stderr, with exit code 2 for a user's mistake and 1 for a failure.

    What is to be cleaned up is cleaned up on SIGTERM, too. NEMO_DEBUG=1 shows tracebacks.
    """
    signal.signal(signal.SIGTERM, terminate)
    set_up_logging()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.raiseExceptions = False  # where the output is piped to a command that has ended
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing was written\n")
        sys.exit(130)
    except Exception as error:
        failure = explain(error)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(PATIENCE)  # the first process says the same, if all fail, and its launcher then ends this one
        sys.stderr.write(told(failure))
        sys.exit(failure.code)


def told(failure: Failure) -> str:
    """What a script says of its failure."""
    trace = failure.trace if os.environ.get("NEMO_DEBUG") == "1" else ""
    return f"{trace}{failure.message.replace('debug=true', 'NEMO_DEBUG=1')}\n"


def terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def choose_device(device: str) -> None:
    """Must come before torch looks for GPUs.

    Raises:
        SystemExit: there is no GPU.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--device=cuda: there is no GPU that torch can use; leave the flag out")
