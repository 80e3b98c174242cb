"""Generation against Hugging Face's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_families import TINY, build, one_rank, to_hugging_face, whole
from tiny_hf import tokenizer

from nemo_vlm.batch import collate
from nemo_vlm.inference import sampling
from nemo_vlm.inference.generate import Answer, Ends, Row, generate
from nemo_vlm.inference.settings import DecodingConfig
from nemo_vlm.layout import one_process
from nemo_vlm.mcore.engine import StageModule
from nemo_vlm.mcore.inference import Forward
from nemo_vlm.models.base import FAMILIES, family

# Of the samples; the other one of Qwen2-VL is a long video, behind which transformers 5 goes astray
ASKED = (0, 2, 3, 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_hugging_face(name: str, tmp_path: Path) -> None:
    config, tiny = TINY[name], family(name, "tiny")
    made = tiny.samples(config, 5, torch.Generator().manual_seed(3))
    prompts = [made[number] for number in ASKED]

    def answers(ends: Ends) -> list[torch.Tensor]:
        found = generate(forward, prompts, [12] * len(prompts), DecodingConfig(), ends, range(len(prompts)))
        return [answer.tokens for answer in found]

    with one_rank(config):
        model, parts = build(name, config, one_process(config))
        theirs = to_hugging_face(name, config, whole(parts), tmp_path)
        forward = Forward([StageModule(model.eval())], config.vocab_size)
        free = answers(Ends())
        stops = {int(free[0][5]), int(free[1][7])}
        stopped = answers(Ends(frozenset(stops)))
    for prompt, tokens, ended in zip(prompts, free, stopped, strict=True):
        inputs = tiny.hf_inputs(config, collate([prompt])) | {"attention_mask": torch.ones(1, len(prompt.tokens))}
        inputs.pop("position_ids", None)  # ours
        expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens.tolist() == expected[0, len(prompt.tokens) :].tolist()
        ends = [place for place, token in enumerate(tokens.tolist()) if token in stops]
        assert ended.tolist() == tokens.tolist()[: min(ends, default=len(tokens)) + 1]


def logits_of(seed: int) -> torch.Tensor:
    return 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_processed_as_by_hugging_face(seed: int) -> None:
    logits = logits_of(seed)
    seen = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(seed))
    early = torch.tensor([True, False, True, False])
    eos = transformers.MinNewTokensLengthLogitsProcessor
    for ours, theirs in [
        (sampling.penalize(logits, seen, 1.3), transformers.RepetitionPenaltyLogitsProcessor(1.3)),
        (sampling.keep_top_k(logits, 7), transformers.TopKLogitsWarper(7)),
        (sampling.keep_top_k(logits, 70), transformers.TopKLogitsWarper(70)),
        (sampling.keep_top_p(logits, 0.6), transformers.TopPLogitsWarper(0.6)),
        (sampling.keep_top_p(logits, 1e-6), transformers.TopPLogitsWarper(1e-6)),
        (sampling.forbid(logits, early | True, [3, 5]), eos(2, 8, [3, 5])),
    ]:
        assert torch.equal(ours, theirs(seen, logits.clone()))
    kept = sampling.forbid(logits, early, [3])
    assert torch.equal(kept[:, 3].isinf(), early) and torch.equal(kept[~early], logits[~early])


def test_draws_follow_their_probabilities_and_places() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf]])
    count = 4000
    drawn = sampling.draw(logits.expand(count, -1), 7, [(number, 0) for number in range(count)])
    shares = torch.bincount(drawn, minlength=5) / count
    assert (shares - logits.softmax(-1)[0]).abs().max() < 0.03  # four standard deviations
    wide = logits_of(1)
    places = [(3, 0), (3, 1), (8, 0), (9, 5)]
    together = sampling.draw(wide, 7, places)
    alone = [int(sampling.draw(wide[row : row + 1], 7, [place])) for row, place in enumerate(places)]
    assert together.tolist() == alone
    others = [sampling.draw(wide, seed, places).tolist() for seed in range(8)]
    assert len({tuple(other) for other in others}) > 1


def test_every_decoding_setting_changes_answers() -> None:
    """Of one model, whose answers under the defaults are compared with those under each setting."""
    config, tiny = TINY["gpt"], family("gpt", "tiny")
    prompts = tiny.samples(config, 3, torch.Generator().manual_seed(3))

    def answers(ends: Ends = Ends(), numbers: tuple[int, ...] = (0, 1, 2), **settings: Any) -> list[Answer]:
        chosen = [prompts[number] for number in numbers]
        return generate(forward, chosen, [12] * len(chosen), DecodingConfig(**settings), ends, numbers)

    def tokens(**settings: Any) -> list[list[int]]:
        return [answer.tokens.tolist() for answer in answers(**settings)]

    with one_rank(config):
        model, _ = build("gpt", config, one_process(config))
        forward = Forward([StageModule(model.eval())], config.vocab_size)
        plain, drawn = tokens(), tokens(greedy=False)
        assert drawn == tokens(greedy=False) != tokens(greedy=False, seed=2) and drawn != plain
        assert tokens(greedy=False, top_k=1) == tokens(greedy=False, top_p=1e-6) == plain
        assert tokens(greedy=False, temperature=1e-4) == plain != tokens(greedy=False, temperature=2.0)
        assert all(len(set(row)) == 12 for row in tokens(repetition_penalty=1e4))
        assert tokens(greedy=False, numbers=(2,)) == drawn[2:]
        stops = Ends(frozenset(range(config.vocab_size)))
        assert [len(row) for row in tokens(ends=stops)] == [1] * 3
        stop = Ends(frozenset({plain[0][0]}))
        assert plain[0][0] not in tokens(ends=stop, min_tokens_to_generate=5)[0][:5]
        scored = answers(compute_logprob=True, all_probs=True)
        logits = forward(
            collate([replace(p, tokens=torch.cat([p.tokens, a.tokens])) for p, a in zip(prompts, scored, strict=True)])
        )
    for row, (prompt, answer) in enumerate(zip(prompts, scored, strict=True)):
        begin = len(prompt.tokens) - 1
        expected = logits[row, begin : begin + 12].log_softmax(-1)
        torch.testing.assert_close(answer.full_logprob, expected, rtol=0, atol=1e-5)
        assert torch.equal(answer.logprob, answer.full_logprob.gather(1, answer.tokens[:, None])[:, 0])


@pytest.mark.parametrize("strings", [(" square", " red", " red s"), (" red s", " square", " red")])
def test_the_first_end_string_counts_and_the_longest_in_its_place(strings: tuple[str, ...]) -> None:
    """All of them are complete at once, when the least number of tokens is reached."""
    codec = tokenizer()
    ids = codec("A red square", add_special_tokens=False)["input_ids"]
    found = Ends(strings=strings, tokenizer=codec).string(torch.tensor(ids))
    assert found == " red s"
    assert Answer(torch.tensor(ids), found).text(codec) == "A"


@pytest.mark.parametrize(
    ("said", "end_string", "text"),
    [
        ("A red square and 7 blue", " 7", "A red square and"),
        ("A red square</s> and", "</s> a", "A red square"),
        ("A red<image> square</s>", "</s>", "A red square"),
        ("A red square", "A", ""),
        ("A square square", "re sq", "A squa"),
        ("A red square", "blue", None),
    ],
)
def test_an_end_string_ends_an_answer_and_is_cut(said: str, end_string: str, text: str | None) -> None:
    """Whatever tokens it consists of, parts of tokens and special tokens among them."""
    codec = tokenizer()
    ids = codec(said, add_special_tokens=False)["input_ids"]
    row, ends = Row(torch.tensor([1]), 0, limit=len(ids)), Ends(strings=("nothing", end_string), tokenizer=codec)
    for token in ids:
        if row.running:
            row.take(token, ends, 0)
    assert row.end_string == (None if text is None else end_string)
    answer = Answer(torch.tensor(row.tokens), row.end_string)
    assert answer.text(codec) == (said if text is None else text)
    assert text is None or len(row.tokens) == len(ids) or end_string in codec.decode(row.tokens)
