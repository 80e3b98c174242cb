"""Instruction tuning: the forms of records, what is trained on, packed idxmap files, and answers learnt by heart."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from commands import run
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from test_cli import ROOT
from test_families import make_layout, run_of

from nemo_vlm.batch import IGNORE_INDEX, Batch, Sample
from nemo_vlm.config import DataConfig, RunConfig, StepConfig
from nemo_vlm.data import docstring_questions, prepare_sft, presence
from nemo_vlm.data.idxmap import PackedDocuments
from nemo_vlm.data.loader import Share, training_loader
from nemo_vlm.data.opening import open_datasets, open_tokenized
from nemo_vlm.data.records import RecordDataset, RecordFile
from nemo_vlm.data.tokenizer import train_chat_tokenizer
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.mcore.indexed import IndexedFile
from nemo_vlm.models.base import family
from nemo_vlm.models.gpt.config import Config
from nemo_vlm.models.gpt.processor import Processor
from nemo_vlm.models.templates import TEMPLATES
from nemo_vlm.models.tokens import trained_texts

# The chat template of Qwen2.5's base models, without its part on tools
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    '{%- if message.role == "user" or (message.role == "system" and not loop.first) or message.role == "assistant" %}'
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
WORDS = ("sum", "a list", "of 猫", "x\n  y", "<b>", "it's", "0.5,", "\n\n", "🐈", "<|im_end|>", "assistant", " ")
TAGS = ("<video>", "<image>", '<img src="a.png" alt="x">', '<video src="a.mp4">')  # words, where no file is named
TOPICS = ("sky", "sea", "cat", "dog", "sun", "moon", "tree", "rain")
QUESTIONS = ("What is the", "Who likes the", "Where is the", "Draw the")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*WORDS, *(f"{asked} {topic}? It is {topic}." for asked in QUESTIONS for topic in TOPICS)]
    made = train_chat_tokenizer([*texts, "user system You are a helpful assistant."], 340)
    made.chat_template = QWEN
    return made


def processor(tokenizer: Any, limit: int = 4096, **data: Any) -> Processor:
    data = {"conv_template": "qwen2", "num_workers": 0} | data
    return Processor(Config(vocab_size=len(tokenizer), encoder_seq_length=limit), DataConfig(**data), tokenizer)


def write(path: Path, records: list[Any]) -> Path:
    """A JSONL, or a list."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")
    return path


# The forms of records

CHAT = [("user", "a?"), ("assistant", "b."), ("user", "c?"), ("assistant", "d.")]
MESSAGES = [{"role": role, "content": text} for role, text in CHAT]
GPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in CHAT]
BE_BRIEF = {"role": "system", "content": "Be brief."}
FORMS: list[tuple[dict[str, Any], str | None, list[str]]] = [
    ({"instruction": "a?", "output": "b."}, None, ["a?", "b."]),
    ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, None, ["Add.\n1 and 2", "3"]),
    ({"query": "a?", "input": "", "response": "b.", "system": "Be brief."}, "Be brief.", ["a?", "b."]),
    ({"instruction": "a?", "input": None, "content": "b."}, None, ["a?", "b."]),
    ({"instruction": "a?", "output": "b.", "messages": None, "conversations": None}, None, ["a?", "b."]),
    ({"conversations": None, "messages": MESSAGES, "instruction": None}, None, ["a?", "b.", "c?", "d."]),
    ({"messages": MESSAGES}, None, ["a?", "b.", "c?", "d."]),
    ({"messages": [BE_BRIEF, *MESSAGES]}, "Be brief.", ["a?", "b.", "c?", "d."]),
    ({"conversations": GPT, "system": "Be brief."}, "Be brief.", ["a?", "b.", "c?", "d."]),
    ({"conversations": [{"from": "system", "value": "Be brief."}, *GPT]}, "Be brief.", ["a?", "b.", "c?", "d."]),
]
BROKEN = [
    ({"instruction": "a?"}, "no_answer", "has no answer"),
    ({"instruction": "a?", "output": " \n"}, "no_answer", "has no answer"),
    ({"messages": MESSAGES[:1]}, "no_answer", "has no answer"),
    ({"instruction": "a?", "query": "b?", "output": "c"}, "broken_record", "both 'instruction' and 'query'"),
    ({"instruction": "a?", "output": "c", "response": "d"}, "broken_record", "both 'output' and 'response'"),
    ({"instruction": "a?", "output": "c", "history": [["d", "e"]]}, "broken_record", "as 'messages'"),
    ({"instruction": "a?", "output": 3}, "broken_record", "must be texts"),
    ({"messages": [*MESSAGES, {"role": "tool", "content": "e"}]}, "broken_record", "unknown role 'tool'"),
    ({"messages": [*MESSAGES, BE_BRIEF]}, "broken_record", "a system message must come first"),
    ({"messages": [BE_BRIEF, *MESSAGES], "system": "Be long."}, "broken_record", "two system messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "broken_record", "'role' and 'content'"),
    ({"prompt": "a?"}, "broken_record", "'conversations', 'messages' or 'instruction'"),
    ([{"instruction": "a?", "output": "b."}], "broken_record", "; it is .{.instruction"),
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_every_form_is_known_record_by_record(suffix: str, tmp_path: Path) -> None:
    file = RecordFile(write(tmp_path / f"x.{suffix}", [record for record, _, _ in FORMS]))
    for number, (_, system, said) in enumerate(FORMS):
        assert file[number]["id"] == number  # which names it in messages
        assert (file[number]["system"], [turn["value"] for turn in file[number]["conversations"]]) == (system, said)


def test_what_cannot_be_used_is_counted_by_reason(tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [FORMS[0][0], *(record for record, _, _ in BROKEN)])
    file = RecordFile(path)
    for number, (_, reason, says) in enumerate(BROKEN, start=1):
        with pytest.raises(SampleError, match=says) as error:
            file[number]
        assert error.value.reason == reason
    found = RecordDataset([file], None, processor(tokenizer))
    skipped = Counter(sample.skipped.partition(":")[0] for sample in map(found.__getitem__, range(1, len(file))))
    assert skipped == Counter(reason for _, reason, _ in BROKEN)
    write(path, [])
    with pytest.raises(ConfigError, match=r"x.jsonl: must be a list of conversations; it is empty"):
        RecordFile(path)


# What is trained on


def conversations(seed: int, count: int) -> list[dict[str, Any]]:
    """Records of any form, of 1 to 4 turns of anything."""
    source = random.Random(seed)

    def said() -> str:
        return "".join(source.choice(WORDS + TAGS) for _ in range(source.randint(1, 6)))

    made: list[dict[str, Any]] = []
    for number in range(count):
        turns = source.randint(1, 4)
        messages = [{"role": CHAT[n % 2][0], "content": said() + "." * (n % 2)} for n in range(2 * turns)]
        if number % 3 == 0:
            made.append({"instruction": messages[0]["content"], "output": messages[1]["content"]})
        elif number % 3 == 1:
            made.append({"messages": [{"role": "system", "content": said() + "!"}, *messages]})
        else:
            turn = [{"from": one["role"], "value": one["content"]} for one in messages]
            made.append({"conversations": turn})
    return made


def as_messages(record: dict[str, Any]) -> list[dict[str, str]]:
    """The same by hand, as a chat template takes it."""
    if "conversations" in record:
        roles = {"human": "user", "gpt": "assistant"}
        said = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        return [{"role": roles.get(who, who), "content": text} for who, text in said]
    if "messages" in record:
        return record["messages"]
    asked = "\n".join(record[name] for name in ("instruction", "query", "input") if name in record)
    (answer,) = (record[name] for name in ("output", "response") if name in record)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("template", ["qwen2", "llama_3", "v1", "mistral"])
def test_only_answers_and_their_ends_are_trained_on(template: str, tokenizer, tmp_path: Path) -> None:
    given = conversations(seed=0, count=60)
    file, makes = (
        RecordFile(write(tmp_path / "x.jsonl", given), media=False),
        processor(tokenizer, conv_template=template),
    )
    before, after = (text.replace("{eos}", tokenizer.eos_token) for text in TEMPLATES[template].around_answer)
    for number, record in enumerate(given):
        sample = makes.sample(file[number])
        answers = [message["content"] for message in as_messages(record) if message["role"] == "assistant"]
        assert trained_texts(sample.labels, makes.text.encoder.codec) == [f"{before}{text}{after}" for text in answers]
        trained = sample.labels != IGNORE_INDEX
        assert torch.equal(sample.labels[:-1][trained[:-1]], sample.tokens[1:][trained[:-1]])


def test_qwen2_is_qwens_template(tokenizer, tmp_path: Path) -> None:
    """Text by text, with transformers' rendering: whole conversations, prompts, and where the trained part begins."""
    given = [record for record in conversations(seed=1, count=60) if "<|im_end|>" not in json.dumps(record)]
    file, makes = RecordFile(write(tmp_path / "x.jsonl", given), media=False), processor(tokenizer)
    for number, record in enumerate(given):
        messages, sample = as_messages(record), makes.sample(file[number])
        first = 1 + next(n for n, message in enumerate(messages) if message["role"] == "user")
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:first], tokenize=False, add_generation_prompt=True)
        asked = makes.prompt(file[number]).tokens
        assert tokenizer.decode(sample.tokens) + "\n" == whole and tokenizer.decode(asked) == prompt
        assert sample.tokens[: len(asked)].equal(asked)
        assert int((sample.labels != IGNORE_INDEX).nonzero()[0]) == len(asked) - 1
    plain = [{"role": "user", "content": "What is the sky?"}]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    record = {"conversations": [{"from": "human", "value": "What is the sky?"}], "image": []}
    assert makes.asked(record)[0].tolist() == ids
    told = processor(tokenizer, system_message="Be brief.").asked(record)[0]
    assert tokenizer.decode(told).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def sft_run(path: Path, tokenizer: Any, limit: int, step: StepConfig, **data: Any) -> RunConfig:
    run = run_of("gpt", replace(family("gpt", "tiny").config(), vocab_size=len(tokenizer), encoder_seq_length=limit))
    return replace(run, step=step, data=DataConfig(data_path=str(path), conv_template="qwen2", num_workers=0, **data))


def test_packs_hold_the_samples_of_the_padded_batches(tokenizer, tmp_path: Path) -> None:
    """Online, with text: too long ones dropped, each batch as wide as asked."""
    path = write(tmp_path / "x.jsonl", conversations(seed=2, count=24))
    found = []
    for data in ({"packing": True, "pad_to": 128}, {"pad_to": 128}):
        run = sft_run(path, tokenizer, 128, StepConfig(1, 24), too_long="drop", **data)
        train = open_datasets(run, Processor(run.model, run.data, tokenizer)).train
        (step,) = training_loader(train, make_layout(run, 1), Share(0, 1), run, 1, 0)
        assert {batch.tokens.shape for batch in step} == {(1, 128)}
        found.append({sample_key(batch, number) for batch in step for number in range(len(batch.lengths))})
        dropped = sorted(number for batch in step for number, why in batch.skipped if why.startswith("too_long"))
        assert 0 < len(dropped) < 24
    assert found[0] == found[1] and len(found[0]) == 24


def sample_key(batch: Batch, number: int) -> tuple[int, ...]:
    """A sample of a batch of one row: its record, tokens and labels."""
    start, length = int(batch.lengths[:number].sum()), int(batch.lengths[number])
    row = torch.stack([batch.tokens[0], batch.labels[0]])[:, start : start + length]
    return (int(batch.records[number]), *row.flatten().tolist())


# Packed idxmap files


def by_hand(record: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """A one-turn record's tokens and shifted labels up to its <|im_end|>, from the chat template's ids alone."""
    whole = tokenizer.apply_chat_template(as_messages(record))["input_ids"][:-1]  # without the line's end
    prompt = tokenizer.apply_chat_template(as_messages(record)[:-1], add_generation_prompt=True)["input_ids"]
    labels = [*[IGNORE_INDEX] * (len(prompt) - 1), *whole[len(prompt) :], IGNORE_INDEX]
    return [*whole[:-1], -1 - whole[-1]], labels


def prepared(path: Path, prefix: Path, tokenizer: Any, seq_length: int, **how: Any) -> prepare_sft.Report:
    settings = {"across": False, "too_long": "truncate", "padding": 0, "workers": 1, "fraction": 0.0} | how
    workers, fraction = settings.pop("workers"), settings.pop("fraction")
    packing = prepare_sft.Packing(seq_length, **settings)
    return prepare_sft.prepare(path, prefix, processor(tokenizer, prepare_sft.UNLIMITED), packing, workers, fraction)


def opened(prefix: Path, tokenizer: Any, seq_length: int, step: StepConfig = StepConfig(1, 1)) -> Any:
    run = sft_run(prefix, tokenizer, seq_length, step, data_impl="sft_idxmap", splits_string="1")
    return run, open_tokenized(run, tokenizer).train


def test_documents_are_laid_out_as_pais(tokenizer, tmp_path: Path) -> None:
    """Bytes of the file, counted by hand; a line that is a list is a pack, and goes on where it is full."""
    records = [{"instruction": f"{asked} {topic}?", "output": f"{topic}."} for asked in QUESTIONS for topic in TOPICS]
    sequences = [by_hand(record, tokenizer) for record in records[:6]]
    length = len(sequences[0][0]) + len(sequences[1][0])  # the first two fill it to the last token
    path = write(tmp_path / "x.jsonl", [records[:3], records[3], records[4:6]])
    report = prepared(path, tmp_path / "packed", tokenizer, length)
    expected = []
    for pack in ([0, 1], [2], [3], [4, 5]):
        for half, fill in ((0, 0), (1, IGNORE_INDEX)):
            numbers = [number for place in pack for number in sequences[place][half]]
            expected.append(numbers + [fill] * (length - len(numbers)))
    content = numpy.fromfile(tmp_path / "packed.bin", "<i4").reshape(-1, length)
    assert content.tolist() == expected
    assert (report.documents, report.skipped.kept, report.truncated) == (4, 6, 0) and len(expected[0]) == length
    theirs = IndexedDataset(str(tmp_path / "packed"))
    assert len(theirs) == 4 and theirs.sequence_lengths.tolist() == [2 * length] * 4
    assert (tmp_path / "packed_lengths.png").read_bytes().startswith(b"\x89PNG")


def test_packs_are_read_as_the_records_are(tokenizer, tmp_path: Path, monkeypatch) -> None:
    """The same samples as from JSON; the same files, whatever the workers; any micro-batch size."""
    monkeypatch.setattr(prepare_sft, "AT_ONCE", 9)
    given = conversations(seed=3, count=40)
    path = write(tmp_path / "x.jsonl", [*given, {"instruction": "a?"}])
    with pytest.raises(
        RuntimeError, match=r"1 of 41 conversations are left out \(1 no_answer\), .*nothing was written"
    ):
        prepared(path, tmp_path / "a", tokenizer, 256, across=True)
    assert not list(tmp_path.glob("a*"))
    report = prepared(path, tmp_path / "a", tokenizer, 256, across=True, fraction=0.1)
    prepared(path, tmp_path / "b", tokenizer, 256, across=True, fraction=0.1, workers=2)
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/a{suffix}").read_bytes() == Path(f"{tmp_path}/b{suffix}").read_bytes()
    assert report.skipped.kept == len(report.lengths) == 40 and report.skipped.reasons == {"no_answer": 1}
    assert report.kept_tokens / (256 * report.documents) > 0.7
    records = open_datasets(sft_run(path, tokenizer, 255, StepConfig(1, 1)), processor(tokenizer, 255)).train
    expected = Counter(key(ended(sample)) for number in range(40) for sample in records.samples(number))
    run, train = opened(tmp_path / "a", tokenizer, 256, StepConfig(2, 2 * (report.documents // 2)))
    assert Counter(key(sample) for number in range(len(train)) for sample in train.samples(number)) == expected
    (step,) = training_loader(train, make_layout(run, 1), Share(0, 1), run, 1, 0)
    assert len(step) == report.documents // 2 and all(batch.packed for batch in step)
    for batch in step:
        numbers = list(dict.fromkeys(batch.records.tolist()))
        assert len(numbers) == 2
        assert batch.tokens[0].tolist() == [
            token for number in numbers for sample in train.samples(number) for token in sample.tokens.tolist()
        ]


def ended(sample: Sample) -> Sample:
    """Without what follows the last token that is trained on."""
    count = int((sample.labels != IGNORE_INDEX).nonzero().max()) + 1
    return Sample(sample.tokens[:count], sample.labels[:count])


def key(sample: Sample) -> tuple[int, ...]:
    return (*sample.tokens.tolist(), *sample.labels.tolist())


def pais(path: Path, documents: list[list[int]]) -> Path:
    """A file as Pai-Megatron-Patch writes it, with Megatron's builder."""
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=numpy.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{path}.idx")
    return path


def test_files_of_pai_are_read(tokenizer, tmp_path: Path) -> None:
    """Which trains the header, and ends a sequence behind the last line's end; one has the full length."""
    no = IGNORE_INDEX
    documents = [
        [5, 6, 7, -9, 10, 11, -13, 0, 0, no, 7, 8, no, 11, 12, no, no, no],
        [5, 6, 7, 8, 9, 10, 11, 12, -14, no, no, no, 9, 10, 11, 12, 13, no],  # the pack that crashed there
        [0] * 9 + [no] * 9,
    ]
    _, train = opened(pais(tmp_path / "x_text_document", documents), tokenizer, 9)
    assert [[sample.tokens.tolist() for sample in train.samples(number)] for number in range(3)] == [
        [[5, 6, 7], [10, 11]],
        [[5, 6, 7, 8, 9, 10, 11, 12]],
        [[0]],
    ]
    assert [sample.labels.tolist() for sample in train.samples(0)] == [[no, 7, 8], [11, 12]]
    assert train.samples(1)[0].labels.tolist() == [no, no, no, 9, 10, 11, 12, 13]
    assert train.samples(2)[0].labels.tolist() == [no]


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([[5, -7, -100, -100]] * 2, "model.encoder_seq_length=9: model.data.data_path=.*/x is made for 2"),
        (
            [[5, -7, -100, -100], [5, -7]],
            "^model.data.data_path=.*/x: documents of 2, 4 numbers; an SFT idxmap has 2 \\* SEQ_LEN in each",
        ),
        ([[5] * 18], "^model.data.data_path=.*/x: document 0: .*can have no labels; not an SFT idxmap"),
        ([[5] * 8 + [-7] + [-100] * 7 + [999, -100]], "has the token id 999, the model's vocabulary"),
        ([[900] * 8 + [-7] + [-100] * 9], "has the token id 900, the model's vocabulary"),
    ],
)
def test_what_is_no_such_file_is_said(documents: list[list[int]], says: str, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        run, _ = opened(pais(tmp_path / "x", documents), tokenizer, 9)
        PackedDocuments(IndexedFile(str(tmp_path / "x")), range(len(documents)), run).samples(0)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_cut_or_dropped(tokenizer, tmp_path: Path) -> None:
    """A cut sequence ends with an answer's token, as when it is cut online."""
    long = {"instruction": "What is the sky?", "output": "the sea, " * 20}
    path = write(tmp_path / "x.json", [long, {"instruction": "What is the sky?" * 30, "output": "It is."}])
    report = prepared(path, tmp_path / "cut", tokenizer, 64, fraction=0.5)
    assert (report.skipped.kept, report.truncated, report.skipped.reasons) == (1, 1, {"too_long": 1}) and min(
        report.lengths
    ) > 64
    _, train = opened(tmp_path / "cut", tokenizer, 64)
    assert key(train.samples(0)[0]) == key(processor(tokenizer, 63).sample(RecordFile(path)[0]))
    with pytest.raises(RuntimeError, match="2 of 2 conversations are left out"):
        prepared(path, tmp_path / "dropped", tokenizer, 64, too_long="drop", fraction=0.5)


# The questions of the demo


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Copy data and mode bits. Return the file's\ndestination.", "Copy data and mode bits."),
        ("Return a copy of\n    the list.\n\nMore.", "Return a copy of the list."),
        ("No stop here", None),
        ("Short.", None),
        ("lower case to begin with.", None),
        ("The 'assert' statement *** is here.", None),
    ],
)
def test_first_sentences(docstring: str, answer: str | None) -> None:
    assert docstring_questions.first_sentence(docstring) == answer
    described = [
        {"name": "shutil.copy", "heading": "shutil.copy(src, dst)", "docstring": docstring},
        {"name": "shutil", "heading": "shutil", "docstring": docstring},
        {"name": "shutil._copy", "heading": "shutil._copy()", "docstring": docstring},
    ]
    asked = ["What does shutil.copy do?", "What is shutil?"] if answer else []
    found = list(docstring_questions.records(described))
    assert [(one["instruction"], one["output"]) for one in found] == [(question, answer) for question in asked]


def test_the_demo_writes_no_corpus_beside_other_data(tmp_path: Path) -> None:
    """A train.json of somebody's own is only read."""
    own = tmp_path / "mine"
    own.mkdir()
    write(own / "train.json", [FORMS[0][0]])
    docstring_questions.write(own)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in own.iterdir()] == ["train.json"]


@pytest.mark.parametrize(
    ("impl", "says"),
    [
        ("json", "a JSON or JSONL of conv.*digits_vqa .LLaVA."),
        ("mmap", "data=docstrings$"),
        ("sft_idxmap", "idxmap.py$"),
    ],
)
def test_what_is_missing_is_named(impl: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.data.data_path=null: give .*{says}"):
        presence.check(DataConfig(data_impl=impl))


# Learnt by heart


def test_answers_learnt_by_heart_are_given_here_and_by_transformers(tokenizer, tmp_path: Path) -> None:
    """32 records of all forms through the command, the archive, generation, the export and transformers' generate."""
    records = taught()
    write(tmp_path / "x.jsonl", records)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    trained = command(
        "examples/gpt_finetune.py",
        *(
            "data=sft_json",
            "model.data.data_path=x.jsonl",
            "model.tokenizer.type=tokenizer",
            "model.data.num_workers=0",
        ),
        *("model.num_layers=2", "model.encoder_seq_length=256", "model.global_batch_size=32", "trainer.max_steps=45"),
        *("trainer.precision=32", "model.optim.lr=5e-3", "exp_manager.name=heart"),
        'samples.prompts=["What is the sky?"]',
        cwd=tmp_path,
    )
    assert "32 samples" in trained and "--- 'What is the sky?'\nIt is the sea.\n" in trained
    archive = "nemo_experiments/heart/checkpoints/heart.nemo"
    prompts = [{"messages": as_messages(record)[:-1]} for record in records]
    write(tmp_path / "in.jsonl", prompts)
    command(
        "examples/generate.py",
        *(f"model_path={archive}", "prompt_file=in.jsonl", "output_file=out.jsonl", "inference.batch_size=32"),
        *("inference.tokens_to_generate=24", "trainer.precision=32"),
        cwd=tmp_path,
    )
    expected = [as_messages(record)[-1]["content"] for record in records]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == expected
    command("scripts/convert_nemo_to_hf.py", "--input", archive, "--output", "exported", "--no-verify", cwd=tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported", padding_side="left")
    inputs = stock.apply_chat_template(
        [prompt["messages"] for prompt in prompts],
        **{"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True},
    )
    made = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert stock.batch_decode(made, skip_special_tokens=True) == expected


def taught() -> list[dict[str, Any]]:
    """Each topic asked in four forms, which have four answers."""
    made: list[dict[str, Any]] = []
    for place, topic in enumerate(TOPICS):
        other, third = TOPICS[(place + 1) % 8], TOPICS[(place + 3) % 8]
        made.append({"instruction": f"What is the {topic}?", "output": f"It is the {other}."})
        made.append({"query": "Where is the", "input": f"{topic}?", "response": f"the {third} the {topic}"})
        pair = [{"role": "user", "content": f"Who likes the {topic}?"}, {"role": "assistant", "content": third}]
        made.append({"messages": [{"role": "system", "content": "You are a list."}, *pair]})
        again = [{"from": "human", "value": f"Draw the {topic}?"}, {"from": "gpt", "value": f"{topic}{other}"}]
        made.append({"conversations": [*turns_of(pair), *again]})
    return made


def turns_of(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in messages]


def command(script: str, *arguments: str, cwd: Path) -> str:
    result = run(str(ROOT / script), *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr
