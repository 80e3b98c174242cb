"""Records, orders, packs and loaders: what each step reads, whatever the layout, the files or the workers."""

from __future__ import annotations

import json
import random
import tarfile
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from distributed import run_ranks
from megatron.core.datasets import helpers_cpp
from PIL import Image
from test_families import build_all

from nemo_vlm import options
from nemo_vlm.batch import IGNORE_INDEX, Batch, Sample
from nemo_vlm.checkpoints import Position
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
from nemo_vlm.data import lengths, loader, packing, spans
from nemo_vlm.data.loader import Packs, Share, StepSampler, order_of, training_loader, validation_loader
from nemo_vlm.data.opening import open_datasets
from nemo_vlm.data.orders import PERIOD, Blend, Grouped
from nemo_vlm.data.records import RecordDataset, RecordFile
from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.layout import Layout, resolve
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.models.images import load_image
from nemo_vlm.training import skips
from nemo_vlm.training.build import make_engine
from nemo_vlm.training.validation import Validation

LENGTHS = Path(__file__).parents[1] / "scripts/benchmarks/llava665k_lengths.json"
WORDS = ["a", "cat", "and", "two", "dogs", "look", "at", "the", "sea", "while", "it", "rains"]


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def text_record(number: int, words: int, **more: object) -> dict:
    said = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(words))
    return {"id": f"r{number}", "conversations": conversation("Tell me.", said), **more}


def write(path: Path, records: list) -> str:
    path.write_text(json.dumps(records))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, vocab_size=300)


@pytest.fixture(scope="module")
def make_run(tokenizer):
    """A run, of gpt if nothing else is said, and its processor."""

    def make(step: StepConfig, name: str = "gpt", **data: object) -> tuple[RunConfig, object]:
        parts = family(name, "processor")
        config = replace(family(name, "tiny").config(), vocab_size=None, encoder_seq_length=64)
        if name == "llava":
            config = replace(config, mm_cfg=replace(config.mm_cfg, image_token_index=None))
        run = RunConfig(
            family=name,
            trainer=TrainerConfig(),
            exp_manager=ExpManagerConfig(),
            model=parts.settle(config, tokenizer),
            parallel=ParallelConfig(),
            step=step,
            data=DataConfig(system_message="", num_workers=0, **data),  # type: ignore[arg-type]
            optim=OptimConfig(),
            tokenizer=TokenizerConfig(),
        )
        return run, parts.Processor(run.model, run.data, tokenizer)

    return make


def layout(data: int, micro_batch_size: int, num_micro_batches: int) -> Layout:
    return Layout(1, data, 1, 1, False, (1,), micro_batch_size, num_micro_batches)


# Files


def random_value(source: random.Random, depth: int = 0) -> object:
    kind = source.random()
    if kind < 0.5 or depth > 3:
        return "".join(source.choice('ab"\\[]{},:\n é😀') for _ in range(source.randint(0, 12)))
    if kind < 0.6:
        return source.choice([1, None, True, 1.5])
    inner = [random_value(source, depth + 1) for _ in range(source.randint(0, 4))]
    return inner if kind < 0.8 else {f'"{n}]': value for n, value in enumerate(inner)}


@pytest.mark.parametrize("block", [1, 2, 7, 64, 200, 10**6])
def test_any_list_is_cut_into_its_elements(block: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(spans, "BLOCK", block)
    source = random.Random(block)
    for suffix in (".json", ".jsonl") * 15:
        records = [[random_value(source)] for _ in range(source.randint(1, 20))]
        ascii_only, indent = source.random() < 0.5, source.choice([None, 1])
        text = json.dumps(records, ensure_ascii=ascii_only, indent=indent) + " \n"
        if suffix == ".jsonl":
            text = "\n\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
        path = tmp_path / f"x{suffix}"
        path.write_text(text, encoding="utf-8")
        content = path.read_bytes()
        assert [json.loads(content[start:end]) for start, end in spans.find(path)] == records


@pytest.mark.parametrize("block", [64, 100, 10**6])
def test_backslashes_in_any_number_and_place(block: int, tmp_path: Path, monkeypatch) -> None:
    """Runs of them end within, at and behind the words of 64 bytes that are looked at together."""
    monkeypatch.setattr(spans, "BLOCK", block)
    path, counts, ends = tmp_path / "x.json", (0, 1, 2, 3, 31, 32, 33, 63, 64), ('"', '",', "")
    records = [["a" * n + "\\" * count + end, "],["] for count in counts for n in range(65) for end in ends]
    path.write_text(json.dumps(records))
    content = path.read_bytes()
    assert [json.loads(content[start:end]) for start, end in spans.find(path)] == records


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "no list"),
        ("[]", "empty"),
        ("", "no list"),
        ('[{"a": "b', "ends within a text"),
        ('[{"a": [1}', "ends within its list"),
        ("[1] [2]", "something follows"),
        ("[1, 2]", "must have 'conversations'"),
        ('[{"conversations": [{"from": "human"}]}]', "'from' and 'value'"),
    ],
)
def test_a_broken_file_is_one_line_at_the_door(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=says) as error:
        RecordFile(tmp_path / "x.json")
    assert str(error.value).startswith("model.data.data_path=") and "\n" not in str(error.value)


def test_a_broken_record_is_the_matter_of_its_drawing(tmp_path: Path) -> None:
    records = [text_record(0, 3), {"id": "x", "conversations": 5}, text_record(2, 3, image=7), text_record(3, 3)]
    records[3]["conversations"].pop()
    path = tmp_path / "x.json"
    path.write_text(json.dumps(records).replace('"id": "r0"', '"id": nul, "image": ""', 1))
    with pytest.raises(ConfigError, match="not JSON"):
        RecordFile(path)  # none of them is whole
    path.write_text(json.dumps([*records, text_record(4, 2, image="")]).replace('"id": "r0"', '"id": nul', 1))
    file = RecordFile(path)
    reasons = []
    for number in range(4):
        with pytest.raises(SampleError) as error:
            file[number]
        reasons.append(error.value.reason)
    assert reasons == ["broken_record"] * 3 + ["no_answer"]
    assert file[4]["image"] == file[4]["video"] == []


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ('"id": "\\ud800"', "half of a surrogate pair"),
        ('"label": "\\udfff\\ud800"', "half of a surrogate pair"),
        ('"system": 5', "'system' must be a text"),
        ('"image": "a\\u0000.jpg"', "'image' must be a file's name"),
        ('"video": ["a\\u0000.mp4"]', "'video' must be a file's name"),
        (f'"more": {"[" * 50_000}{"]" * 50_000}', "nested too deeply"),
    ],
    ids=["id", "label", "system", "image", "video", "deep"],
)
def test_one_odd_record_is_left_out(entry: str, says: str, make_run, tmp_path: Path) -> None:
    odd = json.dumps(text_record(1, 3)).replace("{", f"{{{entry}, ", 1).replace('"id": "r1", ', "")
    path = tmp_path / "x.json"
    path.write_text(f"[{json.dumps(text_record(0, 3))}, {odd}]")
    run, processor = make_run(StepConfig(1, 2), data_path=str(path), packing=True, datasets_exclude=("x",))
    dataset = open_datasets(run, processor).train
    assert dataset.lengths[1].tolist() == [1, 0] and len(dataset[0].tokens) > 1
    assert dataset[1].skipped.startswith("broken_record: ") and says in dataset[1].skipped
    (step,) = training_loader(dataset, layout(1, 1, 2), Share(0, 1), run, 1, 0)
    skips.append(skips.details(step, dataset), tmp_path)
    (listed,) = (tmp_path / skips.FILE).read_text().splitlines()
    assert json.loads(listed)["record"] == 1


def test_a_half_of_a_surrogate_pair_is_odd_and_a_pair_is_not(tmp_path: Path) -> None:
    records = [text_record(0, 3), text_record(1, 3), text_record(2, 3)]
    records[1]["conversations"][1]["value"] = "\ud83d"
    records[2]["conversations"][1]["value"] = "\U0001f600"
    file = RecordFile(Path(write(tmp_path / "x.json", records)))
    with pytest.raises(SampleError, match="record 1: half of a surrogate pair"):
        file[1]
    assert file[2]["conversations"][1]["value"] == "\U0001f600" and file.name(1) is None


def test_a_file_is_indexed_once_for_each_of_its_versions(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    passes = []
    find = spans.find
    monkeypatch.setattr(spans, "find", lambda path: passes.append(path) or find(path))
    short, long = tmp_path / "x.json", tmp_path / f"{'x' * 250}.json"  # the latter leaves no room for a longer name
    for path in (short, long):
        for count in (3, 3, 4):
            write(path, [text_record(n, 2) for n in range(count)]) if count == 4 or not path.exists() else None
            assert [record["id"] for record in map(RecordFile(path).__getitem__, range(count))][-1] == f"r{count - 1}"
    assert passes == [short, short, long, long]
    data = tmp_path / "x"  # the arrays of x.json are none of x
    data.write_text(json.dumps([text_record(0, 2)]))
    RecordFile(data)
    assert len(list(tmp_path.glob(".x.json.*"))) == len(list((tmp_path / "cache/nemo_vlm").iterdir())) == 1


def test_images_in_a_tar_are_those_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    names = [f"a/{n}.png" for n in range(5)]
    for n, name in enumerate(names):
        Image.new("RGB", (4, 4), (50 * n, 0, 0)).save(tmp_path / "images" / name)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", arcname=".")
    data = Path(write(tmp_path / "x.json", [text_record(n, 2, image=[name]) for n, name in enumerate(names)]))
    in_tar, in_folder = (RecordFile(data, str(tmp_path / name)) for name in ("images.tar", "images"))
    for number in range(5):
        ours, theirs = (load_image(file[number]["image"][0]) for file in (in_tar, in_folder))
        assert ours.tobytes() == theirs.tobytes() and ours.getpixel((0, 0)) == (50 * number, 0, 0)
    write(data, [text_record(0, 2), text_record(1, 2, image="a/9.png")])
    with pytest.raises(SampleError, match="images.tar: holds no a/9.png") as error:
        RecordFile(data, str(tmp_path / "images.tar"))[1]
    assert error.value.reason == "missing_image"
    (tmp_path / "no.tar").write_text("none")
    with pytest.raises(ConfigError, match="model.data.image_folder=.*no.tar: not an uncompressed tar"):
        RecordFile(data, str(tmp_path / "no.tar"))


def test_a_tar_may_name_files_in_no_unicode(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "a.png", arcname="\udce9.png")
        tar.add(tmp_path / "a.png", arcname="é.png")
    data = Path(write(tmp_path / "x.json", [text_record(0, 2, image="é.png")]))
    assert load_image(RecordFile(data, str(tmp_path / "images.tar"))[0]["image"][0]).size == (4, 4)


def test_steerlm_speaks_of_its_images_in_the_text(tmp_path: Path) -> None:
    turns = [
        {"from": "User", "value": 'See <img src="/data/one.jpg"> and <img src="two.jpg"/>.', "label": None},
        {"from": "Assistant", "value": "Both.", "label": "quality:4"},
    ]
    path = tmp_path / "x.jsonl"
    html = {"messages": [{"role": "user", "content": "HTML?"}, {"role": "assistant", "content": '<img src="a.png">'}]}
    path.write_text(json.dumps({"conversations": turns}) + "\n\n" + json.dumps(html) + "\n")
    (tmp_path / "images").mkdir()
    below, beside = RecordFile(path, str(tmp_path / "images")), RecordFile(path)
    assert len(below) == 2
    assert below[0]["image"] == [tmp_path / "images/one.jpg", tmp_path / "images/two.jpg"]
    assert beside[0]["image"] == [Path("/data/one.jpg"), tmp_path / "two.jpg"]
    assert [turn["value"] for turn in below[0]["conversations"]] == ["See <image> and <image>.", "Both."]
    assert [turn["from"] for turn in below[0]["conversations"]] == ["user", "assistant"]
    assert (below[1]["image"], below[1]["conversations"][1]["value"]) == ([], '<img src="a.png">')  # not SteerLM's form
    of_text = RecordFile(path, media=False)[0]
    assert (of_text["image"], of_text["conversations"][0]["value"]) == ([], turns[0]["value"])


# Orders


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.3, 0.2), (0.98, 0.01, 0.01)])
def test_blends_are_megatrons(weights: tuple[float, ...]) -> None:
    parts = [numpy.arange(1000 * n, 1000 * n + 7 * (n + 1)) for n in range(len(weights))]
    which, sample = numpy.zeros(PERIOD, numpy.int16), numpy.zeros(PERIOD, numpy.int64)
    helpers_cpp.build_blending_indices(which, sample, numpy.array(weights), len(weights), PERIOD, False)
    blend = Blend(parts, weights, seed=3, shuffle=False)
    for k in (*range(300), PERIOD - 1):
        part = parts[which[k]]
        assert blend[k] == part[sample[k] % len(part)]
    drawn = Counter(blend[k] // 1000 for k in range(10 * PERIOD - 500, 10 * PERIOD + 500))  # anywhere, at once
    assert [drawn[n] / 1000 for n in range(len(weights))] == pytest.approx(weights, abs=0.003)


def kinds_of_lengths(generator: numpy.random.Generator) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Lengths of 90 records, and which third of them has no images."""
    return generator.integers(10, 400, 90), numpy.arange(90) % 3 == 0


@pytest.mark.parametrize("rampup", [None, (4, 4, 24)])
def test_no_batch_mixes_records_with_and_without_images(rampup) -> None:
    sizes, without = kinds_of_lengths(numpy.random.default_rng(0))
    kinds = [Blend([numpy.flatnonzero(kind)], (1.0,), 5, shuffle=True) for kind in (~without, without)]
    step = StepConfig(micro_batch_size=2, global_batch_size=8, rampup_batch_size=rampup, mega_batch_mult=3)

    def sampled(num_steps: int, consumed: int, of: int) -> list[list[int]]:
        grouped = Grouped(kinds, (2 / 3, 1 / 3), sizes, seed=5)
        ranks = [list(StepSampler(grouped, num_steps, consumed, step, Share(rank, of))) for rank in range(of)]
        return [[k for (group,) in step for k in group] for step in zip(*ranks, strict=True)]

    batches = sampled(45, 0, of=1)
    assert all(len({bool(without[k]) for k in batch}) == 1 for batch in batches)
    seen = Counter(k for batch in batches for k in batch)
    assert seen.keys() == set(range(90)) and max(seen.values()) - min(seen.values()) <= 1
    consumed = sum(map(len, batches[:20]))
    assert sampled(25, consumed, of=2) == batches[20:]
    if rampup is None:
        spread = [numpy.ptp(sizes[batch]) for batch in batches]
        assert numpy.mean(spread) < 0.5 * numpy.ptp(sizes)


# Packs


def llava_lengths(count: int, generator: numpy.random.Generator) -> list[int]:
    parts = json.loads(LENGTHS.read_text())["parts"]
    weights = numpy.array([part["thousand_samples"] for part in parts], float)
    found = []
    for number in generator.choice(len(parts), count, p=weights / weights.sum()):
        percentiles = parts[number]["text_tokens_percentiles"]
        text = numpy.interp(generator.uniform(0, 100), [int(p) for p in percentiles], list(percentiles.values()))
        found.append(parts[number]["image_tokens"] + int(text))
    return found


def test_packs_of_llavas_lengths_hold_next_to_no_padding() -> None:
    generator = numpy.random.default_rng(0)
    tokens, positions = 0, {"batch": 0, "4096": 0}
    for _ in range(30):
        sizes = llava_lengths(128, generator)
        packs = packing.plan(numpy.array(sizes)[:, None], [4096], 1)
        filled = [sum(sizes[place] for place in pack) for pack in packs]
        assert sorted(place for pack in packs for place in pack) == list(range(128)) and max(filled) <= 4096
        assert filled == sorted(filled, reverse=True) and filled[-1] > 0.85 * filled[0]
        tokens += sum(sizes)
        positions["batch"] += sum(-(-size // 8) * 8 for size in filled)  # sequence parallelism over 8 ranks
        positions["4096"] += 4096 * len(packs)
    assert tokens / positions["batch"] > 0.99
    assert tokens / positions["4096"] > 0.95


@pytest.mark.parametrize(("count", "of", "together"), [(128, 4, 1), (16, 2, 2), (3, 4, 1), (1, 1, 1)])
def test_every_rank_has_as_many_packs_and_together_they_are_the_batch(count: int, of: int, together: int) -> None:
    sizes = numpy.array(llava_lengths(count, numpy.random.default_rng(1)))
    sizes = numpy.stack([sizes, sizes // 2], axis=1)
    ranks = [Packs(sizes, [4096], together)(range(count), Share(rank, of)) for rank in range(of)]
    assert len({len(packs) for packs in ranks}) == 1 and len(ranks[0]) % together == 0
    assert sorted(k for packs in ranks for pack in packs for k in pack if k >= 0) == list(range(count))
    assert all(packs and all(pack for pack in packs) for packs in ranks)


def drawn_sizes(count: int, seed: int) -> numpy.ndarray:
    """[count, 2]: tokens and visual tokens, of text, images of several sizes and videos."""
    generator = numpy.random.default_rng(seed)
    visual = generator.choice([0, 0, 64, 256, 300, 1024, 3000], count)
    return numpy.stack([visual + generator.integers(1, 900, count), visual], axis=1)


@pytest.mark.parametrize("count", [1, 7, 96, 300])
def test_packs_hold_neither_too_many_tokens_nor_visual_ones(count: int) -> None:
    sizes = drawn_sizes(count, seed=count)
    packs = packing.plan(sizes, [4096, 3000], 2)
    assert sorted(place for pack in packs for place in pack) == list(range(count)) and len(packs) % 2 == 0
    loads = numpy.array([sizes[pack].sum(0) for pack in packs])
    assert (loads.max(0) <= [4096, 3000]).all()
    assert len(packs) <= 1.2 * (sizes.sum(0) / [4096, 3000]).max() + 2
    assert loads[:, 1].max() == 3000 or count == 1  # a sample that fills one alone


@pytest.mark.parametrize(("of", "each"), [(1, 5), (2, 1), (3, 4), (8, 16), (16, 64)])
def test_evened_ranks_have_the_same_samples_and_never_more_at_most(of: int, each: int) -> None:
    for seed in range(5):
        sizes, share = drawn_sizes(of * each, seed), [Share(rank, of) for rank in range(of)]
        lengths = numpy.concatenate([sizes[::-1], sizes])
        batch = list(range(of * each, 2 * of * each))
        plain = [loader.InTurn()(batch, one)[0] for one in share]
        evened = [loader.Evened(lengths)(batch, one)[0] for one in share]
        assert [len(mine) for mine in evened] == [each] * of
        assert sorted(k for mine in evened for k in mine) == batch
        before, after = ([lengths[mine, 1].sum() for mine in ranks] for ranks in (plain, evened))
        assert max(after) <= max(before)
        if each >= 16:
            assert max(after) - min(after) <= 256 and max(before) - min(before) > 1000


@pytest.mark.parametrize("of", [1, 2, 4])
def test_evened_packs_are_as_many_and_the_same(of: int) -> None:
    for seed in range(5):
        sizes = drawn_sizes(64, seed)
        ranks = [
            [Packs(sizes, [8192, 6000], 1, evened)(range(64), Share(rank, of)) for rank in range(of)]
            for evened in (False, True)
        ]
        assert len({len(packs) for half in ranks for packs in half}) == 1
        plain, evened = (sorted(map(tuple, (pack for packs in half for pack in packs))) for half in ranks)
        assert plain == evened
        before, after = ([sum(sizes[pack, 1].sum() for pack in packs) for packs in half] for half in ranks)
        assert max(after) <= max(before)


# Loaders


def samples_of(batch: Batch) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Record, tokens and labels of each sample of a batch, packed or padded."""
    found, start = [], 0
    for row, (record, length) in enumerate(zip(batch.records.tolist(), batch.lengths.tolist(), strict=True)):
        row, start = (0, start) if batch.packed or len(batch.tokens) == 1 else (row, 0)
        tokens, labels = (tensor[row, start : start + length].tolist() for tensor in (batch.tokens, batch.labels))
        found.append((record, tuple(tokens), tuple(labels)))
        start += length
    return found


def steps_of(dataset: RecordDataset, run: RunConfig, data: int, num_steps: int, consumed: int) -> list[list[Batch]]:
    """The micro-batches of all data-parallel ranks, step by step."""
    where = layout(data, run.step.micro_batch_size, 1)
    loaders = [training_loader(dataset, where, Share(rank, data), run, num_steps, consumed) for rank in range(data)]
    return [[batch for rank in ranks for batch in rank] for ranks in zip(*loaders, strict=True)]


def test_a_packed_step_has_the_samples_of_the_padded_one(make_run, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [text_record(n, 3 + 5 * (n % 7)) for n in range(40)])
    found = {}
    for packs in (False, True):
        run, processor = make_run(StepConfig(1, 16), data_path=path, packing=packs)
        dataset = open_datasets(run, processor).train
        for data in (1, 2):
            steps = steps_of(dataset, run, data, 5, 16)
            found[packs, data] = [sorted(s for batch in step for s in samples_of(batch)) for step in steps]
            if packs:
                assert all(batch.tokens.shape[1] <= 64 for step in steps for batch in step)
                assert len(steps[0]) < 16
                assert all(batch.tokens.numel() == batch.lengths.sum() for step in steps for batch in step)
    assert found[False, 1] == found[False, 2] == found[True, 1] == found[True, 2]


def trained(runs: list[RunConfig], tokenizer: object) -> list[list[tuple[float, ...]]]:
    """Loss, gradient norm, and the visual tokens of each rank, of steps on what the loader of each run gives."""
    found = []
    for run in runs:
        where = resolve(replace(run, trainer=replace(run.trainer, devices=2)), 0, {})
        groups.initialize(where, seed=1)
        processor = family(run.family, "processor").Processor(run.model, run.data, tokenizer)
        dataset, share = open_datasets(run, processor).train, Share(groups.data_parallel_rank(), 2)
        engine, steps = make_engine(run, where, build_all(run, where)[0]), []
        for micro_batches in training_loader(dataset, where, share, run, 3, 0):
            result = engine.step(micro_batches, 1e-2)
            mine = sum(run.model.visual_tokens(batch.images.grids) for batch in micro_batches)
            loads = [load for (load,) in groups.of_every_rank([mine])]
            steps.append((result.loss, result.grad_norm, *loads))
        found.append(steps)
        groups.shut_down()
    return found


def test_evened_ranks_train_as_they_are_without(make_run, tokenizer, tmp_path: Path) -> None:
    """Padded and packed, the second with a limit of its own."""
    for width in (32, 64):
        Image.new("RGB", (width, 32), (9 * width % 256, 0, 99)).save(tmp_path / f"{width}.png")
    records = []
    for number in range(24):
        images = [["32.png"], [], ["64.png", "32.png"], ["64.png"]][number // 2 % 4]
        records.append(text_record(number, 3 + number % 5, image=images))
        records[-1]["conversations"][0]["value"] = "<image>" * len(images)
    given = {"data_path": write(tmp_path / "x.json", records), "image_aspect_ratio": "keep", "conv_template": "plain"}
    given["dataloader_type"] = "single"
    packs = {"packing": True, "max_visual_tokens_per_micro_batch": 48}
    variants = [{}, {"balance_visual_tokens": True}, packs, {**packs, "balance_visual_tokens": True}]
    runs = [make_run(StepConfig(1 if "packing" in more else 2, 8), "llava", **given, **more)[0] for more in variants]
    found = run_ranks(trained, 2, [replace(run, trainer=TrainerConfig(precision="32")) for run in runs], tokenizer)[0]
    expected = found[0]
    for steps in found[1:]:
        for (loss, norm, *loads), (same_loss, same_norm, *before) in zip(steps, expected, strict=True):
            assert (loss, norm) == (pytest.approx(same_loss, rel=1e-5), pytest.approx(same_norm, rel=1e-4))
            assert sum(loads) == sum(before)
    most = [[max(loads) for _, _, *loads in steps] for steps in found]
    assert most[3] == most[1] and sum(most[1]) < sum(most[0])


def test_lengths_are_those_of_the_samples_and_are_kept(make_run, tmp_path: Path, monkeypatch) -> None:
    records = [text_record(n, 3 + n) for n in range(9)] + [{"id": "broken"}, text_record(10, 500)]
    path = write(tmp_path / "x.json", records)
    run, processor = make_run(StepConfig(1, 4), data_path=path, packing=True)
    dataset = open_datasets(run, processor).train
    assert dataset.lengths[:, 0].tolist() == [len(dataset[n].tokens) for n in range(11)]
    assert dataset[9].skipped.startswith("broken_record: ") and dataset.lengths[10, 0] == 64
    monkeypatch.setattr(lengths, "lengths", None)  # not called again
    assert (open_datasets(run, processor).train.lengths == dataset.lengths).all()
    other, processor = make_run(StepConfig(1, 4), data_path=path, packing=True, conv_template="plain")
    with pytest.raises(TypeError, match="callable"):
        open_datasets(other, processor)


def test_lengths_are_measured_anew_for_what_changes_them_alone(make_run, tmp_path: Path, monkeypatch) -> None:
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "a.png")
    path = write(tmp_path / "x.json", [text_record(n, 3, image="a.png") for n in range(3)])
    for record in (records := json.loads(Path(path).read_text())):
        record["conversations"][0]["value"] = "<image>\nTell me."
    write(Path(path), records)
    calls = []
    monkeypatch.setattr(
        lengths, "measured", lambda file, *_, measured=lengths.measured: calls.append(1) or measured(file, *_)
    )
    run, processor = make_run(StepConfig(1, 2), "llava", data_path=path, packing=True)
    open_datasets(run, processor)
    mm_cfg = processor.config.mm_cfg
    frozen = replace(mm_cfg, freeze_mm_mlp_adapter=True, vision_encoder=replace(mm_cfg.vision_encoder, freeze=True))
    processor.config = replace(processor.config, mm_cfg=frozen)
    open_datasets(run, processor)
    assert len(calls) == 1
    for number, other in enumerate(
        ({"image_aspect_ratio": "keep"}, {"too_long": "drop"}, {"conv_template": "llama_2"})
    ):
        run, processor = make_run(StepConfig(1, 2), "llava", data_path=path, packing=True, **other)
        open_datasets(run, processor)
        assert len(calls) == number + 2
    assert len(list(tmp_path.glob(".x.json.*-lengths-*.npy"))) == 1
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "a.png", arcname="a.png")
    tarred = replace(run, data=replace(run.data, image_folder=str(tmp_path / "images.tar")))
    for changes in (1, 2):
        open_datasets(tarred, processor)
        open_datasets(tarred, processor)
        assert len(calls) == 4 + changes
        with tarfile.open(tmp_path / "images.tar", "a") as tar:
            tar.add(tmp_path / "a.png", arcname="b.png")


def test_no_pack_overflows_where_images_have_changed(make_run, tmp_path: Path) -> None:
    records = [text_record(n, 1, image=f"{n}.png") for n in range(6)]
    for record in records:
        record["conversations"][0]["value"] = "<image>"
    path = write(tmp_path / "x.json", records)
    for number in range(5):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
    kept = {"image_aspect_ratio": "keep", "conv_template": "plain"}
    run, processor = make_run(StepConfig(1, 6), "llava", data_path=path, packing=True, **kept)

    def read() -> tuple[list[int], list[Batch]]:
        dataset = open_datasets(run, processor).train
        (step,) = training_loader(dataset, layout(1, 1, 1), Share(0, 1), run, 1, 0)
        assert max(batch.tokens.shape[1] for batch in step) <= 64
        assert sorted(k for batch in step for k in batch.records.tolist() if k >= 0) == list(range(6))
        return dataset.lengths[:, 0].tolist(), step

    sizes, step = read()
    assert sizes == [sizes[0]] * 5 + [1] and 16 < sizes[0] <= 21  # three a pack
    assert [why.split(":")[0] for batch in step for _, why in batch.skipped] == ["missing_image"]
    Image.new("RGB", (32, 64)).save(tmp_path / "5.png")  # 16 tokens more
    sizes, step = read()
    assert sizes[5] == sizes[0] + 16 and not any(batch.skipped for batch in step)
    for number in range(5):
        Image.new("RGB", (32, 64)).save(tmp_path / f"{number}.png")
    planned, step = read()
    whys = [why for batch in step for _, why in batch.skipped]
    assert planned == sizes and whys and {why.split(":")[0] for why in whys} == {"stale_length"}
    (table,) = tmp_path.glob(".x.json.*-lengths-*.npy")
    assert all(why.endswith(f"{sizes[5]} tokens, {sizes[0]} when it was measured; remove {table}") for why in whys)
    table.unlink()
    sizes, step = read()
    assert len(set(sizes)) == 1 and not any(batch.skipped for batch in step)


def test_a_pack_holds_no_more_visual_tokens_than_it_may(make_run, tmp_path: Path) -> None:
    """Of images of 16 tokens; a sample of three is too much for a pack of 32, and so is one that has grown."""
    records = [text_record(n, 1, image=[f"{n}.png"] * (n % 4)) for n in range(12)]
    for number, record in enumerate(records):
        record["conversations"][0]["value"] = "<image>" * (number % 4)
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
    given = {"packing": True, "max_visual_tokens_per_micro_batch": 32, "conv_template": "plain"}
    given |= {"data_path": write(tmp_path / "x.json", records), "image_aspect_ratio": "keep"}
    run, processor = make_run(StepConfig(1, 12), "llava", **given)

    def read() -> list[tuple[int, str]]:
        dataset = open_datasets(run, processor).train
        (step,) = training_loader(dataset, layout(1, 1, 1), Share(0, 1), run, 1, 0)
        assert max(run.model.visual_tokens(batch.images.grids) for batch in step) <= 32
        return sorted((number, why.split(":")[0]) for batch in step for number, why in batch.skipped)

    too_many = [(number, "too_many_visual_tokens") for number in (3, 7, 11)]
    assert read() == too_many
    Image.new("RGB", (32, 64)).save(tmp_path / "5.png")
    assert read() == sorted([*too_many, (5, "stale_length")])


@pytest.mark.parametrize("key", ["balance_visual_tokens", "max_visual_tokens_per_micro_batch"])
def test_visual_tokens_are_for_models_that_see(key: str, make_run) -> None:
    run, _ = make_run(StepConfig(1, 4), packing=True, **{key: True if key.startswith("balance") else 9})
    with pytest.raises(ConfigError, match=f"model.data.{key}=(true|9): the gpt family reads text only"):
        options.check(run)


@pytest.mark.parametrize("pad_to", ["batch", 64])
@pytest.mark.parametrize("packs", [False, True])
def test_what_cannot_be_read_leaves_its_place_empty(pad_to, packs: bool, make_run, tmp_path: Path) -> None:
    records = [text_record(n, 4 + n) for n in range(6)]
    records[2]["conversations"], records[4]["conversations"] = [], conversation("", "")[:1]
    path = write(tmp_path / "x.json", records)
    run, processor = make_run(
        StepConfig(1 if packs else 2, 6), data_path=path, packing=packs, pad_to=pad_to, dataloader_type="single"
    )
    dataset = open_datasets(run, processor).train
    (step,) = training_loader(dataset, layout(1, run.step.micro_batch_size, 3), Share(0, 1), run, 1, 0)
    whys = dict(skip for batch in step for skip in batch.skipped)
    assert sorted(record for batch in step for record in batch.records.tolist()) == list(range(6))
    assert {number: why.partition(": ")[0] for number, why in whys.items()} == {2: "no_answer", 4: "no_answer"}
    assert sum(int(batch.counts()[-1]) for batch in step) == 2
    for record, tokens, labels in (sample for batch in step for sample in samples_of(batch)):
        assert (len(tokens) == 1 and labels == (IGNORE_INDEX,)) == (record in whys)
    if pad_to != "batch":
        assert {batch.tokens.shape[1] % 64 for batch in step} == {0}
    lines = skips.details(step, dataset)
    assert {(line["split"], line["record"], line["id"], line["file"], line["reason"]) for line in lines} == {
        ("training", number, f"r{number}", path, "no_answer") for number in (2, 4)
    }


def test_workers_change_nothing(make_run, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [text_record(n, 3 + n % 9) for n in range(30)])
    found = []
    for workers in (0, 2):
        run, processor = make_run(StepConfig(2, 8), data_path=path)
        run = replace(run, data=replace(run.data, num_workers=workers))
        loader = training_loader(open_datasets(run, processor).train, layout(1, 2, 4), Share(0, 1), run, 5, 24)
        found.append([[samples_of(batch) for batch in step] for step in loader])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["cyclic", "single", "modality"])
@pytest.mark.parametrize("packs", [False, True])
def test_every_loader_goes_on_anywhere_under_any_layout(kind: str, packs: bool, make_run, tmp_path: Path) -> None:
    """Two files with weights, a ramp-up, one record held out for validation."""
    paths = []
    for number in range(2):
        records = [text_record(n, 3 + n % 9, image="x.png" if n % 3 else None) for n in range(20 + number)]
        paths.append(write(tmp_path / f"{number}.json", records))
    step = StepConfig(1 if packs else 2, 8, rampup_batch_size=(4, 4, 16), mega_batch_mult=2)
    run, processor = make_run(
        step, data_path=(0.75, paths[0], 0.25, paths[1]), packing=packs, dataloader_type=kind, validation_split=0.05
    )
    dataset = open_datasets(run, processor).train
    sizes = [4, 4, 4, 4, 8, 8, 8, 8, 8, 8]

    def read(data: int, first: int) -> list[list[int]]:
        consumed, left = sum(sizes[:first]), len(sizes) - first
        steps = steps_of(dataset, run, data, left, consumed)
        return [sorted(k for batch in step for k in batch.records.tolist() if k >= 0) for step in steps]

    whole = read(1, 0)
    assert [len(step) for step in whole] == sizes
    assert read(2, 4) == whole[4:] and read(4, 7) == whole[7:]
    drawn = Counter(k < 20 for step in whole for k in step)
    assert drawn[True] / sum(drawn.values()) == pytest.approx(0.75, abs=0.12)
    held_out = open_datasets(run, processor).validation
    assert not {int(k) for part in held_out.parts for k in part} & {k for step in whole for k in step}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("data", [1, 3])
def test_validation_sees_every_sample_once(packs: bool, data: int, make_run, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [text_record(n, 3 + n % 9) for n in range(50)])
    step = StepConfig(1 if packs else 2, 12)
    run, processor = make_run(step, data_path=path, packing=packs, validation_split=0.5)
    datasets = open_datasets(run, processor)
    assert sorted(int(k) for half in (datasets.train, datasets.validation) for k in half.parts[0]) == list(range(50))
    where = layout(data, step.micro_batch_size, 12 // data // step.micro_batch_size)
    ranks = [list(validation_loader(datasets.validation, where, Share(r, data), run, 10)) for r in range(data)]
    assert len({tuple(len(batches) for batches in rank) for rank in ranks}) == 1
    seen = [k for rank in ranks for step in rank for batch in step for k in batch.records.tolist() if k >= 0]
    assert sorted(seen) == datasets.validation.parts[0].tolist()
    assert len(list(validation_loader(datasets.validation, where, Share(0, data), run, 1))) == 1


def test_a_fraction_too_small_for_a_record_holds_one_out(make_run, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [text_record(n, 3) for n in range(20)])
    run, processor = make_run(StepConfig(1, 4), data_path=path, validation_split=0.001)
    datasets = open_datasets(run, processor)
    assert (len(datasets.train), len(datasets.validation)) == (19, 1)


def test_a_limited_validation_looks_at_no_more_numbers(make_run, tmp_path: Path) -> None:
    class Numbers:
        def __iter__(self):
            yield from (0, 1, 2, 3)
            raise AssertionError

    run, processor = make_run(StepConfig(2, 4), data_path=write(tmp_path / "x.json", [text_record(0, 3)] * 4))
    dataset = open_datasets(run, processor).train
    dataset.parts = [Numbers()]
    (step,) = validation_loader(dataset, layout(1, 2, 2), Share(0, 1), run, 1)
    assert [batch.records.tolist() for batch in step] == [[0, 1], [2, 3]]


def test_samples_are_let_go_while_they_are_put_together(make_run, tmp_path: Path) -> None:
    """At no time are more of them held than one group of packs, or than are not yet in a micro-batch."""
    held = weakref.WeakSet()
    most = []

    def sample() -> Sample:
        made = Kept(torch.arange(3), torch.arange(3))
        held.add(made)
        return made

    class Kept(Sample):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    def counted(samples: list[Sample], pad_multiple: int) -> None:
        most.append(len(held))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "collate", counted)
        patch.setattr(loader, "pack", counted)
        loader.padded(([sample() for _ in range(4)] for _ in range(2)), 2, 1)
        assert most == [8, 6, 4, 2]
        most.clear()
        loader.packed(([sample() for _ in range(2)] for _ in range(3)), 1, 64, None)
        assert max(most) <= 4


def test_validation_from_files_of_their_own_and_excluded_records(make_run, tmp_path: Path) -> None:
    records = [text_record(n, 3, dataset="ocr" if n % 4 == 0 else "vqa") for n in range(12)]
    path, other = write(tmp_path / "x.json", records), write(tmp_path / "y.json", records[:5])
    run, processor = make_run(StepConfig(1, 4), data_path=path, validation_path=other, datasets_exclude=("ocr",))
    datasets = open_datasets(run, processor)
    assert datasets.train.parts[0].tolist() == [n for n in range(12) if n % 4]
    assert datasets.validation.parts[0].tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"datasets_exclude=\('ocr', 'vqa'\): leaves nothing of .*x.json"):
        open_datasets(replace(run, data=replace(run.data, datasets_exclude=("ocr", "vqa"))), processor)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data_path": (0.5, "a", "b")}, "model.data.data_path=.*a weight before each file"),
        ({"data_path": ("a", "b"), "concat_sampling_probabilities": (1.0,)}, "2 weights"),
        ({"data_path": (0.0, "a", 1, "b")}, r"model.data.data_path=\[0.0, 'a', 1, 'b'\]: must be 2 weights"),
        ({"data_path": ("a", "b"), "image_folder": ("x",)}, "one for each of 2 files"),
        ({"data_path": "a", "pad_to": 0}, "model.data.pad_to=0"),
        ({"validation_split": 0.1, "validation_path": "b"}, "give one of them"),
        ({"packed_sequence": True}, "model.data.packed_sequence=true: take model.data.packing=true"),
        ({"eod_mask_loss": True}, "model.data.eod_mask_loss=true"),
        ({"max_visual_tokens_per_micro_batch": 9}, "=9: goes with model.data.packing=true"),
    ],
)
def test_settings_that_cannot_be(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**settings)


def test_all_is_padded_to_no_less_than_the_longest_sample(make_run) -> None:
    with pytest.raises(ConfigError, match="model.data.pad_to=32: must be batch, or no less than .*seq_length=64"):
        options.check(make_run(StepConfig(2, 8), pad_to=32)[0])


def test_images_that_the_data_and_the_model_speak_of_are_the_same() -> None:
    facts = family("llava", "tiny").config().image_facts
    assert facts == {"image_token_len": 16, "crop_size": 32, "image_size": 32}


# What was left out


def test_skips_are_counted_cut_back_and_stop_the_run(tmp_path: Path) -> None:
    position = Position(consumed_samples=99)
    lines = [{"record": n, "reason": "missing_image" if n else "too_long"} for n in range(3)]
    skips.count(lines, position)
    skips.append(lines, tmp_path)
    skips.append(lines, tmp_path)  # of steps behind the checkpoint
    skips.cut_back(tmp_path, position)
    assert [json.loads(text) for text in (tmp_path / skips.FILE).read_text().splitlines()] == lines
    assert skips.report(position) == "3 of 99 samples were left out (2 missing_image, 1 too_long)"
    skips.check(position, 0.01, finished=False)  # too early to say
    with pytest.raises(RuntimeError, match=r"3 of 99 .* more than model.data.max_skip_fraction=0.01"):
        skips.check(position, 0.01, finished=True)
    position.consumed_samples = 100
    skips.check(position, 0.01, finished=False)  # chance
    skips.check(position, 0.03, finished=True)
    position.skipped_samples["too_long"] += 2
    with pytest.raises(RuntimeError, match="5 of 100 .*; too_long: raise model.encoder_seq_length"):
        skips.check(position, 0.01, finished=False)


def test_where_nothing_is_left_the_run_stops_at_once() -> None:
    none_left = Position(consumed_samples=8, skipped_samples={"too_long": 8})
    with pytest.raises(RuntimeError, match="8 of 8 samples"):
        skips.check(none_left, 0.01, finished=False)
    skips.check(none_left, 0.5, finished=False)  # chance
    skips.check(Position(consumed_samples=8, skipped_samples={"too_long": 7}), 0.01, finished=False)
    skips.check(Position(consumed_samples=4, skipped_samples={"too_long": 4}), 0.01, finished=False)


def test_chance_stops_no_run_whose_share_is_half_of_the_limit() -> None:
    drawn = numpy.arange(1, 1001)
    skipped = (numpy.random.default_rng(0).random((100, 1000)) < 0.005).cumsum(axis=1)
    stopped = 0
    for run in skipped:
        try:
            for samples, left_out in zip(drawn.tolist(), run.tolist(), strict=True):
                skips.check(Position(consumed_samples=samples, skipped_samples={"x": left_out}), 0.01, finished=False)
        except RuntimeError:
            stopped += 1
    assert stopped <= 3


def validated(run: RunConfig, path: str, tokenizer: object) -> None:
    where = resolve(replace(run, trainer=replace(run.trainer, devices=2)), 0, {})
    groups.initialize(where, seed=1)
    processor = family("gpt", "processor").Processor(run.model, run.data, tokenizer)
    dataset = RecordDataset([RecordFile(Path(path))], None, processor)
    validation = Validation(run, where, Share(groups.data_parallel_rank(), 2), dataset, epoch=100)
    engine = make_engine(run, where, build_all(run, where)[0])
    for _ in range(2):
        validation.loss(engine)
    groups.shut_down()


def test_what_a_validation_leaves_out_is_listed_by_all_ranks(make_run, tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [text_record(n, 3, system=5 if n in (0, 3) else None) for n in range(6)])
    run, _ = make_run(StepConfig(1, 4), data_path=path)
    trainer = TrainerConfig(precision="32", max_steps=1)
    run = replace(run, trainer=trainer, exp_manager=ExpManagerConfig(explicit_log_dir=str(tmp_path)))
    run_ranks(validated, 2, run, path, tokenizer)
    listed = [json.loads(text) for text in (tmp_path / skips.FILE).read_text().splitlines()]
    assert [(line["split"], line["record"], line["reason"]) for line in listed] == [
        ("validation", number, "broken_record") for number in (0, 3)
    ]


def test_what_the_validation_left_out_is_listed_once_and_kept(tmp_path: Path) -> None:
    position = Position(consumed_samples=8)
    train, held_out = ({"split": split, "reason": "missing_image"} for split in (skips.TRAINING, skips.VALIDATION))
    skips.count([train], position)
    skips.append([train], tmp_path)
    for again in (2, 1):
        skips.list_validation([held_out] * again, tmp_path)
        skips.append([{**train, "id": "ö\udc80"}], tmp_path)
    with open(tmp_path / skips.FILE, "a") as file:
        file.write('{"split": "trai')  # a process was killed
    skips.cut_back(tmp_path, position)
    assert [json.loads(text) for text in (tmp_path / skips.FILE).read_text().splitlines()] == [train, held_out]


def test_an_order_is_its_seeds_alone(make_run, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [text_record(n, 3) for n in range(30)])
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(orders))
        run, processor = make_run(StepConfig(1, 4, seed=seed), data_path=path)
        order = order_of(RecordDataset([RecordFile(Path(path))], None, processor), run)
        orders.append([order[k] for k in range(60)])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:30]) == sorted(orders[0][30:]) == list(range(30)) and orders[0][:30] != orders[0][30:]
