"""Generation against Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_families import TINY, build, one_rank, to_hugging_face, whole

from nemo_vlm.inference.generate import greedy
from nemo_vlm.layout import one_process
from nemo_vlm.models.base import FAMILIES, family


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_hugging_face(name: str, tmp_path: Path) -> None:
    config, tiny = TINY[name], family(name, "tiny")
    prompts = tiny.samples(config, 5, torch.Generator().manual_seed(3))
    with one_rank(config):
        model, parts = build(name, config, one_process(config))
        theirs = to_hugging_face(name, config, whole(parts), tmp_path)
        free = greedy(model.eval(), prompts, limit=12, stop_id=None)
        stop = int(free[0][5])
        stopped = greedy(model, prompts, limit=12, stop_id=stop)
    for prompt, tokens, ended in zip(prompts, free, stopped, strict=True):
        inputs = {
            "input_ids": prompt.tokens[None],
            "attention_mask": torch.ones(1, len(prompt.tokens)),
        } | ({"pixel_values": prompt.images} if len(prompt.images) else {})
        expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens.tolist() == expected[0, len(prompt.tokens) :].tolist()
        until = tokens.tolist().index(stop) if stop in tokens else len(tokens)
        assert ended.tolist() == tokens.tolist()[:until]
