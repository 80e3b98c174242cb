"""Tokens a second of generation beside transformers' generate.

    python scripts/benchmarks/generate.py [--model X.nemo ...] [--tokens N] [--rounds N] [--json FILE]

Greedy, fp32, one process, batches of 1 and 8 equal prompts, answers of N tokens: of two Llamas of random weights, a
tiny one, where Python's time tells, and one of 115 million parameters, and of those that --model names, which are asked
about an image where they see. Both take turns, and must find the same tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from side_by_side import by_turns, flags, report, row

from nemo_vlm.batch import Sample, collate
from nemo_vlm.conversion.jobs import Run, export_huggingface
from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference.answers import sample_of
from nemo_vlm.inference.generate import Ends, generate
from nemo_vlm.inference.restore import Restored, restore
from nemo_vlm.inference.settings import DecodingConfig
from nemo_vlm.mcore import cpu
from nemo_vlm.models.base import family
from nemo_vlm.script import run_command
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

QUESTION = "USER: <image>\nWhat is in the picture? ASSISTANT:"
LLAMAS = {  # layers, width, FFN, heads, groups of them
    "tiny Llama": (4, 64, 176, 4, 2),
    "Llama 8 x 1024": (8, 1024, 2816, 16, 8),
}
GOAL = ">= 0.9"  # of transformers' speed


def main() -> None:
    parser = flags(__doc__, rounds=7)
    parser.add_argument(
        "--model", type=Path, nargs="*", default=[], help="to be measured too: .nemo, or Hugging Face's directories"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (64)")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    named = opened(options.model)
    settings = {"peer": f"transformers {transformers.__version__}, generate, sdpa", "tokens": options.tokens}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: make_llama(Path(folder) / name, *sizes) for name, sizes in LLAMAS.items()} | named
        rows = (
            row
            for number, (name, source) in enumerate(models.items())
            for row in measure(name, source, Path(folder) / str(number), options.tokens, options.rounds)
        )
        report(rows, options.json, settings | {"threads": torch.get_num_threads()})


def opened(paths: Sequence[Path]) -> dict[str, Source]:
    """By the names that they have in the table.

    Raises:
        ConfigError: there is no such model, or another one has its name.
    """
    found: dict[str, Source] = {}
    for path in paths:
        if path.name in found:
            raise ConfigError(f"--model={path}: another one is called {path.name}, too; measure one after the other")
        found[path.name] = open_source(path, "--model")
    return found


def make_llama(folder: Path, layers: int, width: int, ffn: int, heads: int, groups: int) -> Source:
    sizes = dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=ffn, num_attention_heads=heads)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=groups, vocab_size=8000, max_position_embeddings=512)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer([QUESTION], 300).save_pretrained(folder)
    return open_source(folder, "")


def measure(name: str, source: Source, exported: Path, count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of one model."""
    export_huggingface(source, exported, Run("fp32", "cpu", verify=False))
    architecture = transformers.AutoConfig.from_pretrained(exported).architectures[0]
    theirs = getattr(transformers, architecture).from_pretrained(exported, dtype=torch.float32).eval()
    with restore(source, "32") as restored:
        sample = prompt(restored, exported.parent / "noise.png", source.family != "gpt")
        for size in (1, 8):
            samples = [sample] * size
            speeds = compared(
                lambda samples=samples: ours(restored, samples, count),
                lambda samples=samples: by_transformers(theirs, source, samples, count),
                rounds,
            )
            mine, peer = ([size * count / seconds for seconds in found] for found in speeds)
            yield row(f"{name}, batch {size}", mine, peer, "tokens/s", GOAL)


def prompt(restored: Restored, picture: Path, sees: bool) -> Sample:
    text = QUESTION if sees else QUESTION.replace("<image>\n", "")
    Image.effect_noise((64, 64), 50).convert("RGB").save(picture)
    media = [picture] if sees else []
    return sample_of(restored.processor.tokens(text, media), media, restored)


def compared(ours: Callable, theirs: Callable, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each in each round; both must find the same tokens."""
    found: dict[str, list[list[int]]] = {}
    ways = {"ours": lambda: found.update(ours=ours()), "theirs": lambda: found.update(theirs=theirs())}
    seconds = by_turns(ways, rounds)
    assert found["ours"] == found["theirs"], "the ways disagree"
    return seconds["ours"], seconds["theirs"]


def ours(restored: Restored, samples: list[Sample], count: int) -> list[list[int]]:
    limits, decoding = [count] * len(samples), DecodingConfig(tokens_to_generate=count)
    answers = generate(restored.forward, samples, limits, decoding, Ends(), range(len(samples)))
    return [answer.tokens.tolist() for answer in answers]


@torch.no_grad()
def by_transformers(model: Any, source: Source, samples: list[Sample], count: int) -> list[list[int]]:
    batch = collate(samples)
    inputs = family(source.family, "tiny").hf_inputs(source.model, batch)
    with cpu.without_redirection():  # which is ours, and would cost its calls of torch up to a third of its time
        made = model.generate(
            **{key: value for key, value in inputs.items() if key != "position_ids"},
            attention_mask=torch.ones_like(batch.tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return made[:, batch.tokens.shape[1] :].tolist()


if __name__ == "__main__":
    run_command(main)
