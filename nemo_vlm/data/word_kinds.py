"""A demo of instructions whose answers a minute teaches: "oak elm ash: what are these?", and lm-eval's task about them.

Its held-out questions are about the same words, but never about the same three.
"""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from nemo_vlm.data.tokenizer import train_chat_tokenizer
from nemo_vlm.files import made_once

FILES = ("train.json", "held_out.json")
TASK, TOKENIZER = "word_kinds.yaml", "tokenizer"
NUM_TOKENS = 384
KINDS = {
    "birds": "crow duck eagle goose heron owl raven robin",
    "colours": "black blue brown green pink purple red white",
    "fruits": "apple cherry fig grape lemon mango peach plum",
    "metals": "brass copper gold iron lead silver tin zinc",
    "planets": "earth jupiter mars mercury neptune saturn uranus venus",
    "rivers": "amazon danube ganges loire nile rhine thames volga",
    "tools": "axe drill file hammer plane rake saw spade",
    "trees": "ash beech birch elm fir larch oak willow",
}
HELD_OUT = 25  # of the 56 threes of each kind
OF_LM_EVAL = {
    "task": "word_kinds",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": FILES[1]}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{instruction}}",
    "doc_to_choice": list(KINDS),
    "doc_to_target": "output",
    "target_delimiter": "",  # an answer begins where the chat template ends
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def write(folder: Path) -> None:
    """Write train.json, held_out.json, word_kinds.yaml and tokenizer/; nothing happens if the folder is there."""
    made_once(folder, _write)


def _write(folder: Path) -> None:
    chance = random.Random(0)
    parts: tuple[list[dict[str, Any]], ...] = ([], [])
    for kind, words in KINDS.items():
        threes = list(combinations(words.split(), 3))
        chance.shuffle(threes)
        for place, three in enumerate(threes):
            question = f"{' '.join(chance.sample(three, 3))}: what are these?"
            parts[place < HELD_OUT].append({"instruction": question, "output": kind})
    for name, part in zip(FILES, parts, strict=True):
        (folder / name).write_text(json.dumps(part, indent=1))
    (folder / TASK).write_text(yaml.safe_dump(OF_LM_EVAL, sort_keys=False))
    texts = [text for record in parts[0] for text in record.values()]
    train_chat_tokenizer(texts, NUM_TOKENS).save_pretrained(folder / TOKENIZER)
