"""What a frozen vision tower costs: nothing for the backward pass, and nothing at all for what it has seen before."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from distributed import run_ranks
from PIL import Image
from test_families import LAYOUTS, TINY, assert_same_run, build, build_all, make_layout, one_rank
from torch.utils.flop_counter import FlopCounterMode

from nemo_vlm import options
from nemo_vlm.batch import IGNORE_INDEX, collate
from nemo_vlm.config import (
    DataConfig,
    ExpManagerConfig,
    LanguageConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StepConfig,
    TokenizerConfig,
    TrainerConfig,
)
from nemo_vlm.data.feature_store import FeatureStore, content, make_home
from nemo_vlm.data.loader import Share, training_loader
from nemo_vlm.data.opening import open_datasets
from nemo_vlm.data.tokenizer import train_chat_tokenizer, train_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import partial_of
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.models.dynamic_processor import TOKENS
from nemo_vlm.training.build import make_engine
from nemo_vlm.training.feature_cache import FeatureCache, in_bytes, of_first_stage

STEPS = 4  # of 4 records of 8: two epochs
WORDS = ["a", "cat", "and", "two", "dogs", "look", "at", "the", "sea", "while", "it", "rains"]


def frozen(config: Any, *parts: str) -> LanguageConfig:
    mm = config.mm_cfg
    for part in parts:
        mm = replace(mm, **{part: replace(getattr(mm, part), freeze=True)})
    return replace(config, mm_cfg=mm)


def noise(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> None:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), numpy.uint8)
    Image.fromarray(pixels).save(path)


def write_records(folder: Path) -> Path:
    """Of one, two and no images and of a video, which is given as its frames; some images are seen twice."""
    (folder / "film").mkdir()
    for number in range(3):
        noise(folder / f"{number}.png", number, (64 + 32 * number, 64))
        noise(folder / "film" / f"{number}.png", 9 + number)
    kinds = [{"image": ["0.png"]}, {"image": ["1.png", "0.png"]}, {}, {"video": ["film.mp4"]}, {"image": ["2.png"]}]
    records = []
    for number in range(8):
        kind = kinds[number % len(kinds)]
        tags = "".join(f"<{name}>" * len(files) for name, files in kind.items())
        said = [
            {"from": "human", "value": f"{tags} {WORDS[number]}"},
            {"from": "gpt", "value": " ".join(WORDS[number:])},
        ]
        records.append({"id": number, "conversations": said, **kind})
    (folder / "records.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("seen"))


def tokenizer_of(name: str) -> Any:
    mm: Any = TINY[name].media
    if name == "llava":
        return train_tokenizer(WORDS, 300)
    return train_chat_tokenizer(WORDS, 300, [getattr(mm, token) for token in TOKENS])


def run_on(data: Path, name: str, parallel: ParallelConfig = ParallelConfig(), **given: Any) -> RunConfig:
    config: Any = replace(frozen(TINY[name], "vision_encoder"), vocab_size=None, encoder_seq_length=256)
    unsettled = {field: None for field in vars(config.mm_cfg) if field.endswith("token_index")}
    config = replace(config, mm_cfg=replace(config.mm_cfg, **unsettled))
    given |= {"image_aspect_ratio": "keep"} if name == "llava" else {}
    return RunConfig(
        family=name,
        trainer=TrainerConfig(precision="32", gradient_clip_val=1.0),
        exp_manager=ExpManagerConfig(),
        model=family(name, "processor").settle(config, tokenizer_of(name)),
        parallel=parallel,
        step=StepConfig(1, 4),
        data=DataConfig(data_path=str(data / "records.json"), num_workers=0, **given),
        optim=OptimConfig(lr=1e-2, eps=1e-6),
        tokenizer=TokenizerConfig(),
    )


def cached(run: RunConfig, home: Path | str) -> RunConfig:
    data = replace(run.data, cache_vision_features=True, vision_cache_dir=str(home))
    make_home(data)
    return replace(run, data=data)


def count(calls: list[int], *unused: Any) -> None:
    calls.append(1)


def trained(runs: list[tuple[RunConfig, Layout]], scale: float = 1.0):
    """Of each: loss, gradient norm and tokens of steps; how often the tower ran in each; where its features are."""
    found = []
    for run, where in runs:
        groups.initialize(where, seed=1)
        processor = family(run.family, "processor").Processor(run.model, run.data, tokenizer_of(run.family))
        dataset, share = open_datasets(run, processor).train, Share(groups.data_parallel_rank(), where.data)
        chunks, parts = build_all(run, where)
        for part in parts:
            part.data.mul_(scale)
        engine, cache = make_engine(run, where, chunks), None
        calls: list[int] = []
        for model in of_first_stage(engine.updater.modules):
            model.vision_model.register_forward_hook(partial(count, calls))
        if run.data.cache_vision_features:
            cache = FeatureCache(engine, run, where, dataset)
            dataset = cache.reading(dataset)
        results, counts = [], []
        for micro_batches in training_loader(dataset, where, share, run, STEPS, 0):
            result = engine.step(micro_batches, 1e-2)
            results.append((result.loss, result.grad_norm, result.counts[0]))
            counts.append(len(calls))
            calls.clear()
            if cache is not None:
                cache.end()  # what the step has computed is there for the next one
                groups.barrier()
        found.append((results, counts, None if cache is None else cache.store.folder))
        groups.shut_down()
    return found


CASES = [
    ("llava", "pp2_vpp2", {}),
    ("llava", "tp2_sp", {"packing": True}),
    ("llava", "fsdp", {}),
    ("qwen2_vl", "ddp", {"packing": True}),
    ("qwen3_vl", "tp2_sp", {}),
]


def test_every_layout_trains_from_kept_features_as_from_pixels(data: Path, tmp_path: Path) -> None:
    runs = []
    for number, (name, layout, given) in enumerate(CASES):
        run = run_on(data, name, LAYOUTS[layout][1], **given)
        where = make_layout(run, 2)
        runs += [(run, where), (cached(run, tmp_path / str(number)), where)]
    by_rank = run_ranks(trained, 2, runs)
    for number, case in enumerate(CASES):
        pairs = [found[2 * number : 2 * number + 2] for found in by_rank]
        for (expected, _, _), (results, calls, _) in pairs:
            assert_same_run(results, expected, loss=1e-6, norm=1e-5)
            assert calls[2:] == [0, 0], case  # the second epoch
        assert any(sum(always[2:]) > 0 and calls[0] > 0 for (_, always, _), (_, calls, _) in pairs)


def test_sizes_have_digits_in_every_unit() -> None:
    told = [in_bytes(count) for count in (0, 999, 1000, 36_864, 1.2e6, 73.7e6, 3.25e9, 8e11, 4.5e12)]
    assert told == ["0 bytes", "999 bytes", "1.0 kB", "36.9 kB", "1.2 MB", "73.7 MB", "3.2 GB", "800.0 GB", "4.5 TB"]


def with_own_homes(run: RunConfig, where: Layout, homes: list[str]):
    """Each rank looks for features in a place of its own."""
    return trained([(run, where), (cached(run, homes[torch.distributed.get_rank()]), where)])


@pytest.mark.parametrize("layout", ["tp2_sp", "cp2"])
def test_ranks_that_share_a_batch_agree_on_what_is_known(layout: str, data: Path, tmp_path: Path) -> None:
    """As when a file appears between the looks of two of them; the second never finds any."""
    run = run_on(data, "llava", LAYOUTS[layout][1])
    homes = [str(tmp_path / "first"), str(tmp_path / "second")]
    for (expected, _, _), (results, calls, _) in run_ranks(with_own_homes, 2, run, make_layout(run, 2), homes):
        assert_same_run(results, expected, loss=1e-6, norm=1e-5)
        assert calls[0] > 0 and calls[2:] == [0, 0]


def logits(runs: list[RunConfig], where: Layout) -> list[torch.Tensor]:
    """Of a question about an image on the first rank, and of one about none on the others, as in val_answers."""
    found = []
    for run in runs:
        groups.initialize(where, seed=1)
        dataset = open_datasets(
            run, family(run.family, "processor").Processor(run.model, run.data, tokenizer_of(run.family))
        ).train
        engine = make_engine(run, where, build_all(run, where)[0])
        if run.data.cache_vision_features:
            FeatureCache(engine, run, where, dataset)
        asked = dataset.processor.prompt(dataset.record(2 * (torch.distributed.get_rank() > 0)))
        with engine.evaluation():
            found.append(engine.logits([collate([asked])]))
        groups.shut_down()
    return found


def test_questions_are_answered_whatever_other_ranks_see(data: Path, tmp_path: Path) -> None:
    run = run_on(data, "llava", LAYOUTS["fsdp"][1])
    for expected, found in run_ranks(logits, 2, [run, cached(run, tmp_path)], make_layout(run, 2)):
        assert torch.equal(found, expected)
    assert not [*tmp_path.rglob("*.safetensors")]


def test_other_images_and_other_weights_have_other_features(tmp_path: Path) -> None:
    run = cached(run_on(write_records(tmp_path), "llava"), tmp_path / "kept")
    where = make_layout(run, 1)

    def names(found) -> set[str]:
        return {file.name for file in found[0][0][2].rglob("*.safetensors")}

    first = run_ranks(trained, 1, [(run, where)])
    before = names(first)
    noise(tmp_path / "1.png", 77)
    second = run_ranks(trained, 1, [(run, where)])
    assert second[0][0][2] == first[0][0][2] and len(names(second) - before) == 1
    assert 0 < sum(second[0][0][1]) <= 2 and second[0][0][1][2:] == [0, 0]  # two records show it
    third = run_ranks(trained, 1, [(run, where)], 0.5)
    assert third[0][0][2] != first[0][0][2] and sum(third[0][0][1]) > 1
    smaller = replace(run, data=replace(run.data, image_aspect_ratio="pad"))
    assert run_ranks(trained, 1, [(smaller, where)])[0][0][2] not in (first[0][0][2], third[0][0][2])


def test_a_damaged_file_is_as_none(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    features, grids = torch.randn(6, 4).bfloat16(), torch.tensor([[1, 2, 3]])
    store.write("ab12", features, grids)
    found = store.read("ab12")
    assert found is not None and torch.equal(found[0], features) and torch.equal(found[1], grids)
    whole = store.path("ab12").read_bytes()
    store.path("ab12").write_bytes(whole[:-5])
    store.path("ab14").mkdir()  # as where the file system fails
    assert all(store.read(key) is None for key in ("ab12", "ab13", "ab14"))


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.write("ab12", torch.randn(6, 4), torch.tensor([[1, 2, 3]]))
    mine = partial_of(store.path("ab13"))
    mine.touch()
    others = mine.with_name(mine.name.rpartition("-")[0] + "-1")  # of a process that lives
    others.touch()
    store.remove_left()
    assert set(mine.parent.iterdir()) == {store.path("ab12"), others}


def test_a_place_that_cannot_be_written_to_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = DataConfig(cache_vision_features=True, vision_cache_dir=str(tmp_path / "file" / "kept"))
    with pytest.raises(ConfigError, match=r"model.data.vision_cache_dir=.*/file/kept: cannot be written to \("):
        make_home(given)


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 1)
    noise(tmp_path / "b.png", 1)
    noise(tmp_path / "c.png", 2)
    a, b, c = (content(tmp_path / f"{name}.png", "image") for name in "abc")
    assert a == b != c and content(tmp_path / "a.png", "video") != a


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gpt", {"cache_vision_features": True}, "model.data.cache_vision_features=true: the gpt family reads text"),
        ("llava", {"cache_vision_features": True}, "=true: the tower trains; give model.mm_cfg.vision_encoder.freeze"),
        ("llava", {"vision_cache_dir": "x"}, "model.data.vision_cache_dir=x: goes with"),
    ],
)
def test_only_what_stays_as_it_is_is_kept(name: str, given: dict, message: str, data: Path) -> None:
    run = replace(run_on(data, "llava"), family=name, model=TINY[name], data=DataConfig(**given))
    with pytest.raises(ConfigError, match=message):
        options.check_feature_cache(run)


def saved_bytes(name: str, config: LanguageConfig) -> tuple[int, int]:
    """Bytes that autograd keeps while the tower runs, and floating point operations of a backward pass."""
    kept = []
    with one_rank(config):
        model, _ = build(name, config, one_process(config))
        batch = collate(family(name, "tiny").samples(config, 4, torch.Generator().manual_seed(0)))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        model.vision_model.register_forward_pre_hook(lambda *unused: kept.clear())
        model.vision_model.register_forward_hook(lambda *unused: kept.append(-1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model(batch, batch.labels)
        with FlopCounterMode(display=False) as flops:
            (losses * (batch.labels != IGNORE_INDEX)).sum().backward()
    return sum(kept[: kept.index(-1)]), flops.get_total_flops()


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(name: str) -> None:
    trains, of_all = saved_bytes(name, TINY[name])
    nothing, without_tower = saved_bytes(name, frozen(TINY[name], "vision_encoder"))
    assert trains > 0 and nothing == 0 and without_tower < of_all
    _, without_weights = saved_bytes(name, frozen(TINY[name], "vision_encoder", "llm"))
    assert without_weights < 0.7 * without_tower  # gradients flow through the decoder, none of its weights has any
