"""Generation against Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_families import TINY, build, one_rank, to_hugging_face, whole

from nemo_vlm.inference.generate import greedy
from nemo_vlm.layout import one_process
from nemo_vlm.mcore.engine import StageModule
from nemo_vlm.mcore.inference import Forward
from nemo_vlm.models.base import FAMILIES, family
from nemo_vlm.models.images import unpatchify


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_hugging_face(name: str, tmp_path: Path) -> None:
    config, tiny = TINY[name], family(name, "tiny")
    prompts = tiny.samples(config, 5, torch.Generator().manual_seed(3))
    with one_rank(config):
        model, parts = build(name, config, one_process(config))
        theirs = to_hugging_face(name, config, whole(parts), tmp_path)
        forward = Forward([StageModule(model.eval())], config.vocab_size)
        free = greedy(forward.last, prompts, limit=12)
        stops = {int(free[0][5]), int(free[1][7])}
        stopped = greedy(forward.last, prompts, limit=12, stop_ids=stops)
    for prompt, tokens, ended in zip(prompts, free, stopped, strict=True):
        inputs = {
            "input_ids": prompt.tokens[None],
            "attention_mask": torch.ones(1, len(prompt.tokens)),
        } | ({"pixel_values": torch.stack(unpatchify(prompt.images))} if len(prompt.images) else {})
        expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens.tolist() == expected[0, len(prompt.tokens) :].tolist()
        ends = [place for place, token in enumerate(tokens.tolist()) if token in stops]
        assert ended.tolist() == tokens.tolist()[: min(ends, default=len(tokens)) + 1]
