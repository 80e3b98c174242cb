"""Pretraining text: .bin/.idx files against Megatron's own reader and builder, samples, order, and what they train."""

from __future__ import annotations

import json
import logging
import math
import struct
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy
import pytest
import torch
from commands import run as run_command
from megatron.core.datasets import helpers_cpp
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from test_families import build, one_rank
from tiny_hf import tokenizer as llama_tokenizer

from nemo_vlm import options
from nemo_vlm.batch import IGNORE_INDEX, collate, pack
from nemo_vlm.config import (
    DataConfig,
    ExpManagerConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StepConfig,
    TokenizerConfig,
    TrainerConfig,
)
from nemo_vlm.data import docstrings, mmap, preparation
from nemo_vlm.data.indexed import IndexedSamples, split
from nemo_vlm.data.loader import Share, order_of, training_loader, validation_loader
from nemo_vlm.data.mmap import Text, unigram_entropy
from nemo_vlm.data.opening import open_tokenized
from nemo_vlm.data.preparation import tokenize
from nemo_vlm.data.records import JsonFile
from nemo_vlm.data.tokenization import Tokenization
from nemo_vlm.data.tokenizer import open_tokenizer, train_chat_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore.indexed import IndexedFile, dtype_for, written, written_together
from nemo_vlm.models.base import family
from nemo_vlm.planning import show_data

ROOT = Path(__file__).parents[1]
EOD = 2  # </s>
LENGTH = 8
RESET = {"reset_attention_mask": True, "reset_position_ids": True}


def make_documents(count: int, seed: int = 0) -> list[list[int]]:
    """Texts of 1 to 30 ids, EOD included."""
    random = numpy.random.default_rng(seed)
    return [[*random.integers(5, 250, random.integers(0, 30)).tolist(), EOD] for _ in range(count)]


def write_documents(prefix: Path, found: list[list[int]]) -> str:
    with written(prefix, dtype_for(300)) as builder:
        for ids in found:
            builder.add(ids)
    return str(prefix)


def make_run(data_path: object, step: StepConfig = StepConfig(2, 4), **data: object) -> RunConfig:
    config = family("gpt", "tiny").config()
    return RunConfig(
        family="gpt",
        trainer=TrainerConfig(),
        exp_manager=ExpManagerConfig(),
        model=replace(config, vocab_size=300, encoder_seq_length=LENGTH),
        parallel=ParallelConfig(),
        step=step,
        data=DataConfig(**{"data_impl": "mmap", "data_path": data_path, "num_workers": 0} | data),  # type: ignore[arg-type]
        optim=OptimConfig(),
        tokenizer=TokenizerConfig(),
    )


def layout(data: int, micro_batch_size: int, num_micro_batches: int) -> Layout:
    return Layout(1, data, 1, 1, False, (1,), micro_batch_size, num_micro_batches)


def opened(run: RunConfig) -> IndexedSamples:
    datasets = open_tokenized(run, llama_tokenizer())
    assert isinstance(datasets.train, IndexedSamples)
    return datasets.train


@pytest.fixture
def text(tmp_path: Path) -> tuple[str, list[list[int]]]:
    found = make_documents(100)
    return write_documents(tmp_path / "a", found), found


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_files_written_here_are_megatrons_and_the_other_way_round(tmp_path: Path, dtype: type) -> None:
    found = make_documents(20)
    with written(tmp_path / "ours", dtype) as builder:
        for ids in found:
            builder.add(ids)
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs_text_document.bin"), dtype)
    for ids in found:
        theirs.add_document(torch.tensor(ids), [len(ids)])
    theirs.finalize(str(tmp_path / "theirs_text_document.idx"))
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs_text_document{suffix}").read_bytes()
    assert [ids.tolist() for ids in IndexedDataset(str(tmp_path / "ours"))] == found
    for name in ("theirs", "theirs_text_document", "theirs_text_document.bin", "theirs_text_document.idx"):
        file = IndexedFile(str(tmp_path / name))
        assert [file.read(number).tolist() for number in range(len(file))] == found
    assert file.read(3, 1, 2).tolist() == found[3][1:3]


def test_nothing_is_written_where_the_writer_fails(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[1, 2]])
    with pytest.raises(KeyError), written(tmp_path / "a", numpy.int32) as builder:
        builder.add([3])
        raise KeyError
    assert IndexedFile(str(tmp_path / "a")).read(0).tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def header(path: Path, place: int, form: str, value: object) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, place, value)
    path.write_bytes(content)


DAMAGES = {
    "no_bin": (lambda a: a.with_suffix(".bin").unlink(), "/a.bin: cannot be read (No such file or directory)"),
    "no_idx": (lambda a: a.with_suffix(".idx").unlink(), "a.idx: cannot be read (No such file or directory)"),
    "short_bin": (lambda a: cut_off(a.with_suffix(".bin"), 3), "bytes, but 3120 by a.idx: cut off, or of another pair"),
    "short_idx": (lambda a: cut_off(a.with_suffix(".idx"), 8), "by its header: it was cut off"),
    "header_only": (lambda a: a.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0\1"), "was cut off after 10 bytes"),
    "magic": (lambda a: header(a.with_suffix(".idx"), 0, "7s", b"TNTIDX\0"), "does not begin with MMIDIDX"),
    "version": (lambda a: header(a.with_suffix(".idx"), 9, "<Q", 2), "a.idx is of version 2; Megatron's version 1 is"),
    "dtype": (lambda a: header(a.with_suffix(".idx"), 17, "<B", 7), "a.idx is of dtype 7; token ids are whole numbers"),
}


def test_a_file_without_tokens_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a.bin has no tokens"):
        IndexedFile(write_documents(tmp_path / "a", [[], []]))


def cut_off(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_one_line(text: tuple, damage: str) -> None:
    path, _ = text
    spoil, message = DAMAGES[damage]
    spoil(Path(path))
    with pytest.raises(ConfigError, match=f"^model.data.data_path={path}: ") as raised:
        opened(make_run(path))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a", [[5] * 100 + [300], [5] * 100])
    with pytest.raises(ConfigError, match="has the token id 300, the model's vocabulary 300 tokens"):
        opened(make_run(path))


def test_a_late_id_beyond_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found when its sample is drawn, in a worker too."""
    monkeypatch.setattr("nemo_vlm.data.mmap.LOOKED_AT", 10)
    path = write_documents(tmp_path / "a", [[5] * 99 + [300] + [5] * 100])
    run = make_run(path, splits_string="1", dataloader_type="single")
    for workers in (0, 1):
        run = replace(run, data=replace(run.data, num_workers=workers))
        batches = iter(training_loader(opened(run), layout(1, 2, 2), Share(0, 1), run, 10, 0))
        for _ in range(3):  # of 12 samples, which 96 tokens are
            next(batches)
        with pytest.raises(ConfigError, match="has the token id 300"):
            next(batches)


def test_samples_counted_by_hand(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a", [[10, 11, EOD], [EOD], [20, 21, 22, 23, 24, 25, 26, 27, EOD], [30, 31]])
    data = opened(make_run(path, splits_string="1", dataloader_type="single"))
    assert len(data) == 1  # 15 tokens: a second sample would need 17
    (sample,) = data.samples(0)
    assert sample.tokens.tolist() == [10, 11, EOD, EOD, 20, 21, 22, 23]
    assert sample.labels.tolist() == [11, EOD, EOD, 20, 21, 22, 23, 24]
    reset = {"reset_attention_mask": True, "reset_position_ids": True}
    data = opened(make_run(path, splits_string="1", dataloader_type="single", eod_mask_loss=True, **reset))
    found = [(sample.tokens.tolist(), sample.labels.tolist()) for sample in data.samples(0)]
    ignored = IGNORE_INDEX
    assert found == [
        ([10, 11, EOD], [11, EOD, ignored]),
        ([EOD], [ignored]),
        ([20, 21, 22, 23], [21, 22, 23, 24]),
    ]
    assert (data.origin(0).path.name, data.origin(0).number) == ("a.bin", 0)


def test_samples_are_where_megatron_cuts(text: tuple) -> None:
    """Its own index of samples, over our order of the documents."""
    path, found = text
    file, run = IndexedFile(path), make_run(path)
    part = Text(file, range(len(file)), run, llama_tokenizer())
    documents = part.order[0].astype(numpy.int32)
    assert sorted(documents.tolist()) == list(range(100)) and documents.tolist() != list(range(100))
    sizes = numpy.array([len(ids) for ids in found], numpy.int32)
    index = helpers_cpp.build_sample_idx_int32(sizes, documents, LENGTH, 1, int(sizes.sum()), True, 1)
    assert len(part) == len(index) - 1
    for number, ((first, start), (last, end)) in enumerate(zip(index[:-1], index[1:], strict=True)):
        between = [found[documents[place]] for place in range(first, last + 1)]
        between[-1] = between[-1][: end + 1]
        (sample,) = part.samples(number)
        expected = sum(between, [])[start:]
        assert [*sample.tokens.tolist(), sample.labels[-1].item()] == expected
    other = replace(run, step=replace(run.step, seed=5))
    assert Text(file, range(len(file)), other, llama_tokenizer()).order[0].tolist() != documents.tolist()


@pytest.mark.parametrize("shares", ["99,1,0", "969,30,1", "1", "0.5,0.5"])
@pytest.mark.parametrize("count", [7, 150])
def test_splits_are_megatrons(shares: str, count: int) -> None:
    data = DataConfig(data_impl="mmap", splits_string=shares)
    borders = convert_split_vector_to_split_matrix(parse_and_normalize_split(shares))
    ranges = [(0, 0) if b is None else tuple(int(round(end * float(count))) for end in b) for b in borders[:2]]
    for ours, (first, last) in zip(split(count, data.splits), ranges, strict=True):
        assert len(ours) == last - first and (not ours or ours.start == first)


def test_blends_and_validation(tmp_path: Path) -> None:
    a, b, held_out = (write_documents(tmp_path / name, make_documents(60, seed)) for seed, name in enumerate("abc"))
    run = make_run((0.7, a, 0.3, b))
    datasets = open_tokenized(run, llama_tokenizer())
    border = len(datasets.train.parts[0])
    assert order_of(datasets.train, make_run((a, b))).parts == [range(len(datasets.train))]
    steps = training_loader(datasets.train, layout(1, 2, 2), Share(0, 1), run, 25, 0)
    records = torch.cat([batch.records for step in steps for batch in step])
    assert int((records < border).sum()) == 70
    assert datasets.validation is not None and len(datasets.validation.parts) == 2  # a document of each
    run = make_run((0.7, a, 0.3, b), validation_path=held_out)
    datasets = open_tokenized(run, llama_tokenizer())
    tokens = sum(len(ids) for ids in make_documents(60, 2))
    assert datasets.validation is not None and len(datasets.validation) == (tokens - 1) // LENGTH
    steps = validation_loader(datasets.validation, layout(2, 2, 1), Share(1, 2), run, 1000)
    assert all(batch.tokens.shape == (2, LENGTH) for step in steps for batch in step if -1 not in batch.records)


def test_a_run_goes_on_in_the_middle(text: tuple) -> None:
    """In another layout too, and beyond an epoch."""
    path, _ = text
    run = make_run(path, **RESET)
    data = opened(run)
    epoch = len(data)
    whole = list(training_loader(data, layout(1, 2, 2), Share(0, 1), run, 60, 0))
    rest = list(training_loader(opened(run), layout(1, 2, 2), Share(0, 1), run, 20, 160))
    assert epoch < 240
    for got, expected in zip(rest, whole[40:], strict=True):
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.lengths, theirs.lengths)
            assert ours.tokens.shape == (1, 2 * LENGTH) and ours.packed
    halves = [list(training_loader(data, layout(2, 2, 1), Share(rank, 2), run, 20, 160)) for rank in (0, 1)]
    for step, *of_ranks in zip(rest, *halves, strict=True):
        assert [batch.tokens.tolist() for batch in step] == [one.tokens.tolist() for (one,) in of_ranks]
    drawn = [record for step in whole for batch in step for record in batch.records.unique().tolist()]
    assert sorted(drawn[:epoch]) == list(range(epoch)) and drawn[:epoch] != drawn[epoch : 2 * epoch]


def idxmap_documents(count: int) -> list[list[int]]:
    """Packs of sequences of two to four ids, none of which is trained on; see data.sequences."""
    random = numpy.random.default_rng(0)
    found = []
    for _ in range(count):
        lengths = random.integers(2, 5, 3)
        ids = [number for length in lengths for number in [*range(5, 4 + length), -1 - EOD]]
        found.append((ids + [0] * LENGTH)[:LENGTH] + [IGNORE_INDEX] * LENGTH)
    return found


GATHERED = {"moe_token_dispatcher_type": "allgather"}


@pytest.mark.parametrize("settings", [{"ub_tp_comm_overlap": True}, GATHERED], ids=["overlap", "allgather"])
@pytest.mark.parametrize("data", [{}, RESET, {"data_impl": "sft_idxmap"}], ids=["text", "documents", "idxmap"])
def test_every_batch_is_of_one_length_where_it_must(data: dict, settings: dict, tmp_path: Path) -> None:
    """For the buffers of overlapping tensor parallelism, and where ranks gather each other's tokens for experts.

    The last of the validation too, which empty samples fill; three ranks do not divide a row of eight.
    """
    found = idxmap_documents(60) if "data_impl" in data else make_documents(60)
    with written(tmp_path / "a", numpy.int32) as builder:
        for ids in found:
            builder.add(ids)
    parallel = ParallelConfig(3, sequence_parallel=True)
    run = make_run(str(tmp_path / "a"), StepConfig(2, 8, **settings), splits_string="80,20", **data)
    if settings == GATHERED:
        parallel = replace(parallel, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
        run = replace(run, model=replace(run.model, num_moe_experts=4))
    run = replace(run, parallel=parallel, trainer=TrainerConfig(precision="bf16-mixed"))
    options.check(run)
    laid_out = Layout(1, 12, 3, 1, True, (1,), 2, 1)
    datasets = open_tokenized(run, llama_tokenizer())
    assert datasets.validation is not None and len(datasets.validation) % 8
    row = options.row_length(run, laid_out)
    assert row == 9
    for share in (Share(rank, 4) for rank in range(4)):
        loaders = (
            training_loader(datasets.train, laid_out, share, run, 20, 0),
            *[validation_loader(datasets.validation, laid_out, share, run, 1000)],
        )
        for batch in (batch for loader in loaders for step in loader for batch in step):
            assert batch.tokens.numel() == 2 * row and batch.tokens.shape[1] % row == 0


def test_documents_see_only_themselves(text: tuple) -> None:
    """The loss of a sample is that of its documents one by one, and not that of the text as a whole."""
    path, _ = text
    run = make_run(path)
    plain = opened(run)
    run = replace(run, data=replace(run.data, reset_attention_mask=True, reset_position_ids=True))
    data = opened(run)
    number = next(number for number in range(len(data)) if len(data.samples(number)) > 2)
    pieces = data.samples(number)
    with one_rank(run.model):
        model, _ = build("gpt", run.model, one_process(run.model))
        model.eval()
        batches = [pack(pieces), collate(plain.samples(number))]
        together, joined = (float(model(batch, batch.labels).sum()) for batch in batches)
        alone = sum(float(model(batch, batch.labels).sum()) for batch in map(collate, ([piece] for piece in pieces)))
    assert together == pytest.approx(alone, rel=1e-6)
    assert abs(joined - alone) > 1e-3


def test_show_data_shows_the_documents(text: tuple) -> None:
    """Those of the first step's micro-batches, in their order."""
    path, _ = text
    run = make_run(path, reset_attention_mask=True, reset_position_ids=True)
    data, where = opened(run), layout(1, 2, 2)
    (batches,) = training_loader(data, where, Share(0, 1), run, 1, 0)
    lengths = torch.cat([batch.lengths for batch in batches]).tolist()
    shown = list(islice(show_data.samples(run, where, data, llama_tokenizer()), len(lengths)))
    assert [len(one.sample.tokens) for one in shown] == lengths
    assert [one.place for one in shown[:: len(shown) - 1]] == ["step 1, pack 1", "step 1, pack 2"]
    tokens = torch.cat([batch.tokens.flatten() for batch in batches])
    assert torch.cat([one.sample.tokens for one in shown]).equal(tokens)
    assert all(one.headline() and one.as_json()["trained_text"] for one in shown)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reset_attention_mask": True}, "give both or none of them"),
        ({"splits_string": "99,1", "validation_path": "b"}, "validation_path is given too; give one"),
        ({"splits_string": "some"}, "model.data.splits_string=some: must be shares, as 99,1,0"),
        ({"splits_string": "0,1,0"}, "must be shares, as 99,1,0"),
        ({"packing": True}, "model.data.packing=true: goes with model.data.data_impl=json"),
        ({"dataloader_type": "modality"}, "must be cyclic or single"),
        ({"too_long": "drop"}, "model.data.too_long=drop: goes with model.data.data_impl=json"),
        ({"max_visual_tokens": 9}, "model.data.max_visual_tokens=9: goes with model.data.data_impl=json or energon"),
        ({"image_folder": "x", "data_impl": "sft_idxmap"}, "model.data.image_folder=x: goes with"),
        ({"data_impl": "json", "eod_mask_loss": True}, "eod_mask_loss=true: goes with model.data.data_impl=mmap"),
        ({"data_impl": "json", "splits_string": "1"}, "splits_string=1: goes with model.data.data_impl=mmap or sft"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        DataConfig(**{"data_impl": "mmap", "data_path": "a", **settings})
    assert message in str(raised.value)


def test_text_that_cannot_be_trained_on(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a", [[5, 6, 7], [8, 9]])
    with pytest.raises(ConfigError, match="with 5 tokens in all, too few for one sample of model.encoder_seq_length=8"):
        opened(make_run(path))
    path = write_documents(tmp_path / "b", [[5] * 100])
    with pytest.raises(ConfigError, match="ends with token 5, not with the tokenizer's EOD </s>"):
        opened(make_run(path, splits_string="1", eod_mask_loss=True))


def test_text_that_cannot_be_validated_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A whole file of it is an error, the end of one a warning; messages name the setting that named the file."""
    long, short, bad, packed = (
        write_documents(tmp_path / name, documents)
        for name, documents in {
            "long": [[5] * 100] * 99 + [[6, 7]],
            "short": [[5, 6, 7]],
            "bad": [[5] * 40 + [300]],
            "packed": [[5] * 8 + [6] * 8],
        }.items()
    )
    with pytest.raises(ConfigError, match=f"^model.data.validation_path={short}: 1 of its documents are to validate, "):
        opened(make_run(long, validation_path=(long, short)))
    with pytest.raises(ConfigError, match=f"^model.data.validation_path={bad}: has the token id 300, the model's"):
        opened(make_run(long, validation_path=bad))
    with pytest.raises(ConfigError, match=f"^model.encoder_seq_length=9: model.data.data_path={packed} is made for 8"):
        run = make_run(packed, data_impl="sft_idxmap")
        opened(replace(run, model=replace(run.model, encoder_seq_length=9)))
    assert open_tokenized(make_run(long), llama_tokenizer()).validation is None
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == (
        f"model.data.data_path={long}: 1 of its documents are to validate, with 2 tokens in all, too few for one "
        "sample of model.encoder_seq_length=8; they are not used"
    )


def test_packed_conversations_are_no_text(tmp_path: Path) -> None:
    with written(tmp_path / "a", numpy.int32) as builder:
        builder.add([5, -7] + [0] * 20 + [IGNORE_INDEX] * 22)
    with pytest.raises(ConfigError, match="has the token id -100, which no text has; .*data_impl=sft_idxmap"):
        opened(make_run(str(tmp_path / "a"), splits_string="1"))


@pytest.mark.parametrize("name", [".", "", "/"])
def test_what_names_no_file_is_said(name: str, lines: Path) -> None:
    with pytest.raises(ConfigError, match=f"^model.data.data_path={name}: must be the beginning of the names"):
        opened(make_run(name or ("",)))
    with pytest.raises(ConfigError, match="^--output=[./]: must be the beginning of the files' names"):
        tokenize([lines], Path(name), Tokenization(llama_tokenizer()), 1)


def test_text_is_told_from_tokens() -> None:
    with pytest.raises(ConfigError, match="a.jsonl: is not tokenized; see scripts/prepare_mmap.py"):
        opened(make_run("a.jsonl"))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Records with text, and three without."""
    records = [{"text": f"{number} red circles." * (1 + number % 5), "title": "A"} for number in range(40)]
    rows = [json.dumps(record) for record in records]
    rows[3:3] = ["{broken", json.dumps({"title": "B"}), json.dumps({"text": "", "title": "C"})]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_tokenizing(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same files whatever the workers: each text's ids and EOD, in order; what is left out is counted."""
    monkeypatch.setattr(preparation, "AT_ONCE", 200)
    tokenizer = llama_tokenizer()
    settings = Tokenization(tokenizer, ("text", "title"), append_eod=True)
    with caplog.at_level(logging.WARNING):
        for workers in (1, 2):
            tokenize([lines, lines], tmp_path / f"of{workers}", settings, workers, max_skip_fraction=0.1)
    assert "6 of 86 records are left out (2 not JSON, 2 no text 'text', 2 an empty 'text')" in caplog.text
    for key in ("text", "title"):
        for suffix in (".bin", ".idx"):
            one, two = ((tmp_path / f"of{workers}_{key}_document{suffix}").read_bytes() for workers in (1, 2))
            assert one == two
    file = IndexedFile(str(tmp_path / "of2"))
    texts = [record["text"] for record in map(read, lines.read_text().splitlines()) if record.get("text")]
    expected = [[*tokenizer(text, add_special_tokens=False).input_ids, EOD] for text in texts]
    assert [file.read(number).tolist() for number in range(len(file))] == expected * 2


def read(line: str) -> dict:
    return {} if line == "{broken" else json.loads(line)


def test_too_many_broken_records_leave_nothing(lines: Path, tmp_path: Path) -> None:
    """Records without text are left out too, but are no fault."""
    with pytest.raises(RuntimeError, match="3 of 43 records are left out .* nothing was written"):
        tokenize([lines], tmp_path / "b", Tokenization(llama_tokenizer()), 1, max_skip_fraction=0.04)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(ConfigError, match="--eod-token=<none>: the tokenizer .* has no such token"):
        Tokenization(llama_tokenizer(), eod="<none>")


def test_it_gives_up_where_chance_cannot_explain_what_is_broken(lines: Path, tmp_path: Path) -> None:
    """As training: from the 100th record on, with three standard deviations."""
    whole = json.dumps({"text": "A red circle."})
    lines.write_text("\n".join([*[whole] * 99, *["{broken"] * 20, *[whole] * 5000]))
    with pytest.raises(RuntimeError, match=r"5 of 104 records are left out \(5 not JSON\), more than .*=0.01; nothing"):
        tokenize([lines], tmp_path / "b", Tokenization(llama_tokenizer()), 1, max_skip_fraction=0.01)
    lines.write_text("\n".join([json.dumps({"text": ""})] * 200))
    with pytest.raises(RuntimeError, match=r"200 of 200 records are left out \(200 an empty 'text'\), all there are"):
        tokenize([lines], tmp_path / "b", Tokenization(llama_tokenizer()), 1)


@pytest.mark.parametrize("content", ["[]", "[ \n ]", "[\n]\n"])
def test_an_empty_list_is_said_to_be_empty(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"^--input={path}: it is empty"):
        tokenize([path], tmp_path / "b", Tokenization(llama_tokenizer()), 1)
    with pytest.raises(ConfigError, match=f"^--input={path}: .* it is empty$"):
        JsonFile(path, "--input")


def test_the_files_of_several_keys_appear_together(lines: Path, tmp_path: Path) -> None:
    prefixes = [tmp_path / "x", tmp_path / "y"]
    write_documents(prefixes[0], [[1, 2]])
    with pytest.raises(FileNotFoundError), written_together(prefixes, numpy.int32) as builders:
        for builder in builders:
            builder.add([3])
        (partial,) = tmp_path.glob(".y.partial*.bin")
        partial.unlink()
    assert IndexedFile(str(prefixes[0])).read(0).tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "x.bin", "x.idx"]
    with pytest.raises(ConfigError, match="^--output=.*/b: .*/a.jsonl: cannot be a folder"):
        tokenize([lines], lines / "b", Tokenization(llama_tokenizer()), 1)
    command = [str(ROOT / "scripts/prepare_mmap.py"), "--input", str(lines), "--output", "b", "--tokenizer", "none"]
    result = run_command(*command, "--json-keys", "text", "text", cwd=tmp_path, forked=False)
    assert result.returncode == 2 and result.stderr.startswith("--json-keys text text: a key is given twice (")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which examples/gpt_pretrain.py runs, with the docstrings of a few modules."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = folder / "sources"
    for name in ("argparse.py", "email/message.py", "logging/__init__.py", "shutil.py"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_bytes((docstrings.STDLIB / name).read_bytes())
    (sources / "test").mkdir()
    (sources / "test/left_out.py").write_text('"""Not this."""')
    docstrings.write(folder / "datasets/docstrings", sources)
    return folder


def test_the_docstring_corpus(corpus: Path) -> None:
    made = corpus / "datasets/docstrings"
    records = [json.loads(line) for line in (made / "text.jsonl").read_text().splitlines()]
    by_name = {record["name"]: record for record in records}
    assert by_name["shutil.copy"]["heading"] == "shutil.copy(src, dst, *, follow_symlinks=True)"
    assert by_name["shutil.copy"]["docstring"].startswith("Copy data and mode bits")
    assert by_name["email.message.Message.attach"]["text"].startswith("email.message.Message.attach(self, payload)\n\n")
    assert "logging.Handler" in by_name and "test.left_out" not in by_name
    tokenizer, file = open_tokenizer(str(made / "tokenizer"), "it"), IndexedFile(str(made / "docstrings"))
    assert len(tokenizer) == docstrings.NUM_TOKENS and len(file) == len(records)
    for number in (0, len(file) - 1):
        assert tokenizer.decode(file.read(number)) == records[number]["text"] + "<|endoftext|>"
    question = [{"role": "user", "content": "What?"}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_entropy_is_that_of_the_frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_documents(tmp_path / "a", [[5, 5, 6, 7]]), write_documents(tmp_path / "b", [[8]])
    assert unigram_entropy(DataConfig(data_impl="mmap", data_path=a)) == pytest.approx(1.5 * math.log(2))
    c, d = write_documents(tmp_path / "c", [[5] * 30]), write_documents(tmp_path / "d", [[6] * 10])
    monkeypatch.setattr(mmap, "LOOKED_AT", 5)
    expected = 2 * math.log(2) - 0.75 * math.log(3)  # the shares are those of whole files
    assert unigram_entropy(DataConfig(data_impl="mmap", data_path=(c, d))) == pytest.approx(expected)
    mixed = DataConfig(data_impl="mmap", data_path=(0.5, a, 0.5, b))
    assert unigram_entropy(mixed) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4) + 0.25 * math.log(2))


def test_pretraining_gets_below_the_unigram_entropy(corpus: Path) -> None:
    """As the example, with fewer steps and tokens; it ends with samples of the archive that it has written."""
    texts = corpus / "datasets/docstrings/text.jsonl"
    tokenizer = train_chat_tokenizer((read(line)["text"] for line in texts.read_text().splitlines()), 400)
    tokenizer.save_pretrained(corpus / "tokenizer")
    tokenize([texts], corpus / "small", Tokenization(tokenizer, append_eod=True), 1)
    small = ["model.num_layers=2", "model.encoder_seq_length=128", "trainer.max_steps=60"]
    data = ["data=mmap", "model.data.data_path=small", "model.tokenizer.type=tokenizer"]
    asked = ['samples.prompts=["Return True if"]', "trainer.enable_progress_bar=false", "model.data.num_workers=0"]
    command = [str(ROOT / "examples/gpt_pretrain.py"), *small, *data, *asked]
    result = run_command(*command, cwd=corpus, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    (told,) = [line for line in result.stdout.splitlines() if line.startswith("loss of the last 20 steps")]
    loss, entropy = (float(part.split()[0]) for part in told.split(": ")[1:])
    assert loss < entropy - 0.3
    assert "--- 'Return True if'\n" in result.stdout
