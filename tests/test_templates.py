"""Conversations as text, tokens and labels: every template with every kind of tokenizer."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AutoTokenizer

from nemo_vlm.batch import IGNORE_INDEX
from nemo_vlm.config import DataConfig, TokenizerConfig
from nemo_vlm.data.codec import Codec
from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.formats.reader import InMemory
from nemo_vlm.models.base import family
from nemo_vlm.models.chat import chat_template
from nemo_vlm.models.llava.config import Config
from nemo_vlm.models.templates import STEERLM_LABEL, TEMPLATES, VICUNA_SYSTEM, Turn, segments
from nemo_vlm.models.text import ConversationText
from nemo_vlm.models.tokens import Encoded, MediaTokens, PlaceholderRun, SegmentEncoder, trained_texts
from nemo_vlm.sources.opening import with_tokenizer
from nemo_vlm.sources.source import Source
from nemo_vlm.sources.tokenizers import load_tokenizer
from nemo_vlm.typed import plain, plain_defaults, read

USER, ASSISTANT = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
FORMS = {  # two turns, as Conversation.get_prompt of NeMo 2.0.0 (v1_fork: of the fork) writes them, with a short system
    "v1": "S USER: Q1 ASSISTANT:« A1</s>» USER: Q2 ASSISTANT:« A2</s>»",
    "v1_fork": "S USER: Q1 ASSISTANT:« A1</s>»\n<s>USER: Q2 ASSISTANT:« A2</s>»\n",
    "llama_2": " [INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]« A1 </s>»<s> [INST] Q2 [/INST]« A2 </s>»",
    "llama_3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    f"{USER}Q1<|eot_id|>{ASSISTANT}«A1<|eot_id|>»{USER}Q2<|eot_id|>{ASSISTANT}«A2<|eot_id|>»",
    "nvgpt": f"<extra_id_0>System\nS<extra_id_1>User\nQ1\n<extra_id_1>Assistant\n<extra_id_2>{STEERLM_LABEL}\n"
    f"«A1\n<extra_id_1>»User\nQ2\n<extra_id_1>Assistant\n<extra_id_2>quality:1\n«A2\n<extra_id_1>»",
    "nv_dpo": "<extra_id_0>System\nS<extra_id_1>User\nQ1\n<extra_id_1>Assistant\n"
    "«A1\n<extra_id_1>»User\nQ2\n<extra_id_1>Assistant\n<extra_id_2>quality:1\n«A2\n<extra_id_1>»",
    "mistral": " [INST] S\nQ1 [/INST]«A1</s>» [INST] Q2 [/INST]«A2</s>»",
    "yi_34b": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»"
    "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>»",
}
FORMS |= {"nv_steerlm": FORMS["nvgpt"]} | dict.fromkeys(("chatml", "qwen2"), FORMS["yi_34b"] + "\n")


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_nemos(name: str) -> None:
    turns = [Turn("Q1", "A1"), Turn("Q2", "A2", "quality:1")]
    found = segments(TEMPLATES[name], turns, "S", "<s>", "</s>")
    text = "".join(f"«{part.text}»" if part.trained else part.text for part in found)
    assert text.replace("»«", "") == FORMS[name]


@pytest.mark.parametrize(
    ("name", "before"), [("chatml", ""), ("qwen2", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")]
)
def test_chatml_has_no_system_message_of_its_own(name: str, before: str) -> None:
    found = "".join(part.text for part in segments(TEMPLATES[name], [Turn("Q1", None)], None, "", "<|endoftext|>"))
    assert found == f"{before}<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"


def test_plain_is_a_caption_behind_its_image() -> None:
    found = segments(TEMPLATES["plain"], [Turn("Describe <image> it.", "A cat.")], None, "<s>", "</s>")
    assert [(part.text, part.trained) for part in found] == [("<image>", False), ("A cat.", True), ("\n", True)]


STEERING = (
    *(f"<extra_id_{number}>" for number in range(8)),
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
CORPUS = [
    "USER: What is in the picture? ASSISTANT: A red square and 7 blue circles. [INST] It is a cat. [/INST]",
    f"{VICUNA_SYSTEM} {STEERLM_LABEL}",
]
KINDS = ("fast", "fast_legacy", "slow", "slow_legacy", "sentencepiece", "sentencepiece_bare", "bytes", "bytes_bare")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model like Llama's, with some of NeMo's tokens: user-defined, and control."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=["<image>", "<extra_id_1>"],
        control_symbols=["<extra_id_2>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every kind; the bare ones lack the templates' tokens, which are ordinary text to them."""
    made = {}
    for legacy in (False, True):
        folder = tmp_path_factory.mktemp("hf")
        (folder / "tokenizer.model").write_bytes(model.read_bytes())
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for use_fast in (False, True):
            name = ("fast" if use_fast else "slow") + ("_legacy" if legacy else "")
            config = TokenizerConfig(str(folder), use_fast=use_fast, additional_special_tokens=("<image>", *STEERING))
            made[name] = load_tokenizer(config)
    alone = TokenizerConfig(library="sentencepiece", model=str(model))
    made["sentencepiece"] = load_tokenizer(replace(alone, additional_special_tokens=STEERING))
    made["sentencepiece_bare"] = load_tokenizer(alone)
    made["bytes_bare"] = train_tokenizer(CORPUS, 400)
    made["bytes"] = train_tokenizer(CORPUS, 400)
    made["bytes"].add_tokens(list(STEERING), special_tokens=True)
    return made


SAID = (
    *(
        "What is this?",
        "It is a cat.",
        "",
        "两只猫 and a 🐈",
        "  two  spaces ",
        "\nlines\n\n",
        "\t",
        "It's a <",
        "1 \\ {eos}",
    ),
    *("USER: no ASSISTANT: yes</s>", "[/INST] a </s><s> [INST]", "<extra_id_1>User\n<extra_id_2>\n", "<|im_end|>\n"),
)


def conversations(template: str, seed: int) -> Iterator[list[Turn]]:
    """Of 1 to 5 turns of anything, the first with an image."""
    random_ = random.Random(seed)
    for count in (1,) if TEMPLATES[template].captions else (1, 2, 3, 4, 5):
        for _ in range(3):
            said = [random_.choice(SAID) for _ in range(2 * count)]
            yield [Turn("<image>\n" + said[0], said[1]), *map(Turn, said[2::2], said[3::2])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_the_answers(template: str, kind: str, tokenizers: dict[str, Any]) -> None:
    """Every trained token, decoded where it stands, gives the answers and their ends; prompts are beginnings."""
    tokenizer, parts = tokenizers[kind], TEMPLATES[template]
    image = tokenizer.convert_tokens_to_ids("<image>")
    encoder, marks = SegmentEncoder(tokenizer, MediaTokens(image)), (tokenizer.bos_token, tokenizer.eos_token)
    before, after = (text.replace("{eos}", tokenizer.eos_token) for text in parts.around_answer)
    for turns in conversations(template, seed=0):
        ids, trained = map(torch.tensor, encoder.encode(segments(parts, turns, None, *marks)))
        labels = torch.where(trained, ids, IGNORE_INDEX)
        assert trained_texts(labels, encoder.codec) == [f"{before}{turn.answer}{after}" for turn in turns]
        special = labels[torch.isin(labels, torch.tensor(list(encoder.codec.special.values())))]
        ends = [encoder.codec.special[after.strip()]] * len(turns) if after.strip() in encoder.codec.special else []
        assert special.tolist() == ends  # a special token in what was said is none
        assert (ids == image).sum() == 1
        for number in range(len(turns)):
            asked = [*turns[:number], replace(turns[number], answer=None)]
            prompt, _ = encoder.encode(segments(parts, asked, None, *marks))
            assert prompt == ids[: len(prompt)].tolist()
            assert trained[len(prompt)] and not trained[len(prompt) - 1]


def test_an_end_of_an_answer_is_the_tokenizers(tokenizers: dict[str, Any]) -> None:
    for kind, tokenizer in tokenizers.items():
        encoder = SegmentEncoder(tokenizer, None)
        ids, _ = encoder.encode(segments(TEMPLATES["v1_fork"], [Turn("a", "b"), Turn("c", "d")], "", "<s>", "</s>"))
        assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 2, kind
        assert ids[0] == tokenizer.bos_token_id


def test_all_kinds_read_a_sentencepiece_model_alike(model: Path, tokenizers: dict[str, Any]) -> None:
    """As the library itself does, but for the space in front; and ordinary conversations as a whole text."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    turns = [Turn("What is in the picture?", "A red square."), Turn("And 两只猫?", "It is a cat.")]
    found = segments(TEMPLATES["v1"], turns, None, "<s>", "</s>")
    first, second, _ = "".join(part.text for part in found).split("</s>")
    expected = [1, *library.encode(first), 2, *library.encode("\n" + second)[2:], 2]  # without ▁ and the line's end
    for kind in KINDS[:6]:
        assert SegmentEncoder(tokenizers[kind], None).encode(found)[0] == expected, kind
    whole = "".join(part.text for part in found)
    assert tokenizers["fast"](whole)["input_ids"] == tokenizers["slow"](whole)["input_ids"] == expected
    codec = Codec(tokenizers["sentencepiece"])
    assert codec.ids("\n a", first=False) == library.encode("x\n a")[2:]


def test_a_saved_sentencepiece_tokenizer_opens_as_what_it_was(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("slow_legacy", "sentencepiece"):
        given = tokenizers[kind]
        given.save_pretrained(tmp_path / kind)
        for again in (load_tokenizer(TokenizerConfig(str(tmp_path / kind))), pickle.loads(pickle.dumps(given))):
            for text in SAID:
                assert again(text)["input_ids"] == given(text)["input_ids"]
            assert (type(again), again.legacy, len(again)) == (type(given), given.legacy, len(given))
    stock, text = AutoTokenizer.from_pretrained(tmp_path / "sentencepiece"), "USER: 两<extra_id_1>It</s> is"
    assert stock(text)["input_ids"] == tokenizers["sentencepiece"](text)["input_ids"]
    assert tokenizers["sentencepiece"].decode(stock(text)["input_ids"], skip_special_tokens=True) == "USER: 两It is"


def test_a_checkpoint_has_the_tokenizer_of_its_run(model: Path, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """A SentencePiece model, and tokens that only the settings add to it."""
    given = TokenizerConfig(library="sentencepiece", model=str(model), additional_special_tokens=STEERING)
    source = with_tokenizer(Source(tmp_path, {"tokenizer": plain(given)}, InMemory({}), {}))
    again = load_tokenizer(TokenizerConfig(str(source.save_files(tmp_path))))
    assert again.get_vocab() == tokenizers["sentencepiece"].get_vocab()
    assert all(again(text)["input_ids"] == tokenizers["sentencepiece"](text)["input_ids"] for text in SAID)


def record(*said: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]
    return {"id": "x", "conversations": turns, **more}


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("system", [None, "", 'Say "yes"\n{bos} or \U0001f600.'])
@pytest.mark.parametrize("template", TEMPLATES)
def test_jinja_is_the_same_text(template: str, system: str | None, front: bool, tokenizers: dict[str, Any]) -> None:
    tokenizer, data = tokenizers["bytes"], DataConfig(conv_template=template, system_message=system)
    data = replace(data, sep_image_conv_front=front)
    text = ConversationText(Config(), data, tokenizer, MediaTokens(4))
    jinja = chat_template(Config(), data, with_bos=True)
    for number, turns in enumerate(conversations(template, seed=1)):
        said = record(*(text for turn in turns for text in (f"{turn.question} <image>", turn.answer)))
        said["system"] = "Given.\n" if number % 3 == 0 else None
        said["conversations"][1] |= {"label": "quality:0"} if number % 2 else {}
        messages = [
            {"role": ("user", "assistant")[n % 2], "content": turn["value"]}
            for n, turn in enumerate(said["conversations"])
        ]
        messages[1] |= {"label": "quality:0"} if number % 2 else {}
        messages = [{"role": "system", "content": said["system"]}] * bool(said["system"]) + messages
        for asking in (False, True):
            turns = text.turns(said)
            if asking:
                turns, messages = [*turns[:-1], Turn(turns[-1].question, None)], messages[:-1]
            found = segments(text.template, turns, said["system"] or system, "<s>", "</s>")
            rendered = tokenizer.apply_chat_template(
                messages, chat_template=jinja, tokenize=False, add_generation_prompt=asking
            )
            assert rendered == "<s>" + "".join(part.text for part in found)


@pytest.fixture
def text(tokenizers: dict[str, Any]) -> ConversationText:
    return made_text(tokenizers, 40)


def made_text(tokenizers: dict[str, Any], limit: int, **data: Any) -> ConversationText:
    tokenizer = tokenizers["bytes"]
    around = (tuple(tokenizer.convert_tokens_to_ids([token])) for token in ("<extra_id_4>", "<extra_id_5>"))
    media = MediaTokens(tokenizer.convert_tokens_to_ids("<image>"), *around)
    return ConversationText(Config(encoder_seq_length=limit), DataConfig(system_message="", **data), tokenizer, media)


LONG = record("<image>\nWhat is this?", "It is a cat.", "And <image> <video>?", "It is a cat and a cat and a cat.")


def sample(text: ConversationText, given: dict[str, Any], counts: list[int]) -> Encoded:
    return text.train(given, text.turns(given), runs(*counts))


def runs(*counts: int) -> list[list[PlaceholderRun]]:
    """Of an image each."""
    return [[PlaceholderRun(count)] for count in counts]


def test_truncation_cuts_no_image(tokenizers: dict[str, Any]) -> None:
    counts = [5, 4, 3]
    whole = sample(made_text(tokenizers, 10_000), LONG, counts)
    tokens, labels = whole.shifted()
    image, start, end = (
        tokenizers["bytes"].convert_tokens_to_ids(f"<{name}>") for name in ("image", "extra_id_4", "extra_id_5")
    )
    seen = []
    for limit in range(len(tokens) + 1, 0, -1):
        text = made_text(tokenizers, limit)
        try:
            encoded = sample(text, LONG, counts)
        except SampleError as error:
            assert error.reason == "too_long"
            break
        left, learnt = encoded.shifted()
        kept = text.num_runs(encoded)
        assert len(left) == len(encoded) - 1 <= limit
        assert left.equal(tokens[: len(left)]) and learnt.equal(labels[: len(left)])
        assert int((left == image).sum()) == sum(counts[:kept])
        assert (left == start).sum() == (left == end).sum() == kept
        assert learnt[-1] != IGNORE_INDEX
        seen.append(kept)
    assert set(seen) == {3, 1}  # both media of the second question, or neither
    prompt = made_text(tokenizers, 10_000).prompt(LONG, Turn("<image>\nWhat is this?", None), runs(*counts[:1]))
    assert limit == len(prompt) - 1  # one more, and the first token of an answer were left


@pytest.mark.parametrize(("limit", "num_images"), [(200, 2), (60, 1)])
def test_a_processor_cuts_images_with_their_text(
    limit: int, num_images: int, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    parts, config, path = family("llava", "processor"), family("llava", "tiny").config(), tmp_path / "x.png"
    Image.new("RGB", (30, 20)).save(path)
    mm_cfg = replace(config.mm_cfg, image_token_index=None, use_im_start_end=True)
    config = parts.settle(replace(config, vocab_size=None, mm_cfg=mm_cfg), tokenizers["bytes"])
    config = replace(config, encoder_seq_length=limit)
    processor = pickle.loads(pickle.dumps(parts.Processor(config, DataConfig(system_message=""), tokenizers["bytes"])))
    given = record("<image>\na?", "It is", "and <image>?", "It is a cat " * 5, image=[path, path])
    made = processor.sample(given)
    assert (len(made.tokens), num_images * mm_cfg.num_image_tokens) == processor.length(given)
    assert len(made.tokens) <= limit
    assert len(made.images) == num_images
    assert (made.tokens == config.mm_cfg.image_token_index).sum() == num_images * mm_cfg.num_image_tokens


def test_too_long_drops(tokenizers: dict[str, Any]) -> None:
    length = len(sample(made_text(tokenizers, 10_000), LONG, [5, 4, 3])) - 1
    assert len(sample(made_text(tokenizers, length, too_long="drop"), LONG, [5, 4, 3])) == length + 1
    with pytest.raises(SampleError, match=f"{length} tokens do not fit model.encoder_seq_length={length - 1}"):
        sample(made_text(tokenizers, length - 1, too_long="drop"), LONG, [5, 4, 3])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (record("only a question"), "no_answer"),
        ({"id": 1}, "broken_record"),
        ({"conversations": ["a"]}, "broken_record"),
        ({"conversations": [{"from": "human", "value": 3}]}, "broken_record"),
        ({"conversations": [{"from": "gpt", "value": "alone"}]}, "broken_record"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "broken_record"),
        (record("<image> too many", "b"), "broken_record"),
    ],
)
def test_records_without_a_sample(broken: dict[str, Any], reason: str, text: ConversationText) -> None:
    with pytest.raises(SampleError) as error:
        sample(text, broken, [])
    assert error.value.reason == reason


def test_images_to_the_front(tokenizers: dict[str, Any]) -> None:
    text = made_text(tokenizers, 1, sep_image_conv_front=True)
    assert text.turns(record("see <image> and <image>?", "b"))[0].question == "<image>\n<image>\nsee  and ?"
    assert text.turns(record("none ", "b"))[0].question == "none "


def test_prompts_leave_room(text: ConversationText) -> None:
    short, turn = len(text.prompt(LONG, Turn("a", None), [])), Turn("<image>", None)
    assert len(text.prompt(LONG, turn, runs(39 - short - 2))) < 40
    with pytest.raises(ConfigError, match="leave no room for an answer in model.encoder_seq_length=40"):
        text.prompt(LONG, turn, runs(40))
    assert text.raw("<image>a", runs(3), add_special_tokens=False)[:5].tolist() == [
        *text.media.front,
        *[4] * 3,
        *text.media.back,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=true: code that comes with a tokenizer is never run"),
        ({"library": "megatron"}, "library=megatron: take huggingface"),
        ({"library": "sentencepiece"}, "model=null: model.tokenizer.library=sentencepiece needs"),
        ({"model": "x"}, "model=x: only with model.tokenizer.library=sentencepiece"),
        ({"delimiter": ","}, "delimiter=,: NeMo's tokenizers of tables"),
        ({"vocab_file": "x"}, "give both or none"),
        ({"library": "sentencepiece", "model": "/nowhere"}, "model=/nowhere: no SentencePiece model there"),
        ({"vocab_file": "/nowhere", "merge_file": "/nowhere"}, "vocab_file=/nowhere: no vocabulary there"),
        ({"type": "/nowhere"}, "type=/nowhere: no tokenizer there"),
        ({}, "type=null: give the directory"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(TokenizerConfig(**settings))


def test_tokens_and_roles_can_be_given(tmp_path: Path) -> None:
    train_tokenizer(CORPUS, 300).backend_tokenizer.model.save(str(tmp_path))
    nemos = {"additional_special_tokens": {"additional_special_tokens": ["<image>"]}}
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    tree = plain_defaults(TokenizerConfig) | files | nemos | {"special_tokens": {"eos_token": "</s>"}}
    tokenizer = load_tokenizer(read(TokenizerConfig, tree, "model.tokenizer"))
    assert (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<image>")) == (2, 4)
    assert tokenizer.decode(tokenizer("a 猫<image>")["input_ids"]) == "a 猫<image>"
    assert read(TokenizerConfig, tree | {"special_tokens": None}, "model.tokenizer").roles == {}
