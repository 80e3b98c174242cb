"""Tokens a second of generation: with the cache, beside passes over the whole sequence and transformers' generate.

python scripts/benchmarks/generation.py [--model X.nemo] [--tokens N] [--rounds N] [--json FILE]

Greedy, fp32, one process, batches of 1 and 8 equal prompts, answers of N tokens: of a small Llama of random weights,
and of a LLaVA (--model; the demo's archive, say). Medians of rounds in which the three take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from nemo_vlm.batch import Sample, collate
from nemo_vlm.conversion.jobs import Run, export_huggingface
from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.inference.answers import sample_of
from nemo_vlm.inference.generate import Ends, generate
from nemo_vlm.inference.restore import Restored, restore
from nemo_vlm.inference.settings import DecodingConfig
from nemo_vlm.models.images import unpatchify
from nemo_vlm.sources.opening import open_source

QUESTION = "USER: <image>\nWhat is in the picture? ASSISTANT:"
LLAMA = dict(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=8
)
# The cached speed over theirs. On a CPU our operations pass a Python hook (mcore/cpu.py), which tells in small models.
GOALS = {"passes over all": 2.0, "transformers": 0.7}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, help="a LLaVA to be measured too: a .nemo, or Hugging Face's directory")
    flags.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--json", type=Path, help="where the figures are written")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {"Llama": make_llama(Path(folder) / "llama")}
        if options.model is not None:
            models["LLaVA"] = options.model
        rows = [
            row
            for name, path in models.items()
            for row in measure(name, path, Path(folder) / f"{name}_hf", options.tokens, options.rounds)
        ]
    report(rows, options.json)


def make_llama(folder: Path) -> Path:
    config = transformers.LlamaConfig(**LLAMA, vocab_size=8000, max_position_embeddings=512)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer([QUESTION], 300).save_pretrained(folder)
    return folder


def measure(name: str, path: Path, exported: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    source, rows = open_source(path, "--model"), []
    export_huggingface(source, exported, Run("fp32", "cpu", verify=False))
    vision = source.family == "llava"
    cls = transformers.LlavaForConditionalGeneration if vision else transformers.LlamaForCausalLM
    theirs = cls.from_pretrained(exported, dtype=torch.float32).eval()
    with restore(source, "32") as restored:
        sample = prompt(restored, exported.parent / "noise.png", vision)
        for size in (1, 8):
            samples = [sample] * size
            ways: dict[str, Callable[[], list[list[int]]]] = {
                "cached": lambda samples=samples: cached(restored, samples, count),
                "passes over all": lambda samples=samples: uncached(restored, samples, count),
                "transformers": lambda samples=samples: by_transformers(theirs, samples, count),
            }
            seconds = take_turns(ways, rounds)
            speed = {way: size * count / median(found) for way, found in seconds.items()}
            for peer, goal in GOALS.items():
                rows.append(row(f"{name}, batch {size}: cached / {peer}", speed["cached"], speed[peer], goal))
    return rows


def prompt(restored: Restored, picture: Path, vision: bool) -> Sample:
    text = QUESTION if vision else QUESTION.replace("<image>\n", "")
    Image.effect_noise((64, 64), 50).convert("RGB").save(picture)
    media = [picture] if vision else []
    return sample_of(restored.processor.tokens(text, media), media, restored)


def take_turns(ways: dict[str, Callable[[], list[list[int]]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way; all must find the same tokens. A first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        found = {}
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            if number:
                seconds[name].append(time.perf_counter() - start)
        assert all(tokens == found["cached"] for tokens in found.values()), "the ways disagree"
    return seconds


def cached(restored: Restored, samples: list[Sample], count: int) -> list[list[int]]:
    limits, decoding = [count] * len(samples), DecodingConfig(tokens_to_generate=count)
    answers = generate(restored.forward, samples, limits, decoding, Ends(), range(len(samples)))
    return [answer.tokens.tolist() for answer in answers]


def uncached(restored: Restored, samples: list[Sample], count: int) -> list[list[int]]:
    """Each token by a pass over prompt and answer, without the vision tower's second pass being spared."""
    tokens = torch.stack([sample.tokens for sample in samples])
    start = tokens.shape[1]
    for _ in range(count):
        rows = [Sample(row, sample.labels, sample.images) for row, sample in zip(tokens, samples, strict=True)]
        _, logits = restored.forward.start(collate(rows), tokens.shape[1])
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens[:, start:].tolist()


@torch.no_grad()
def by_transformers(model: Any, samples: list[Sample], count: int) -> list[list[int]]:
    ids = torch.stack([sample.tokens for sample in samples])
    views = [view for sample in samples for view in unpatchify(sample.images)] if len(samples[0].images) else []
    inputs: dict[str, Tensor] = {"pixel_values": torch.stack(views)} if views else {}
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[:, ids.shape[1] :].tolist()


def row(name: str, ours: float, peer: float, goal: float) -> dict[str, Any]:
    ratio = ours / peer
    figures = {"ours": round(ours, 1), "peer": round(peer, 1), "unit": "tokens/s", "ratio": round(ratio, 2)}
    return {"name": name, **figures, "goal": f">= {goal}", "ok": ratio >= goal}


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    for one in rows:
        verdict = "ok" if one["ok"] else "MISSED"
        print(
            f"{one['name']:45} {one['ours']:>8} {one['peer']:>8} {one['unit']}  {one['ratio']} {one['goal']} {verdict}"
        )
    if path is not None:
        machine = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
