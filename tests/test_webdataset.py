"""Folders of tars that Megatron-Energon has prepared: written, read as Energon reads them, drawn as JSON is."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from braceexpand import braceexpand
from commands import Command, run
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SampleDecoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_val_dataset,
    stateless,
)
from PIL import Image
from test_cli import ROOT, metrics
from test_show_data import lines

from nemo_vlm.batch import Batch
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
from nemo_vlm.data import prepare_mllm, prepare_wds
from nemo_vlm.data.loader import Share, training_loader
from nemo_vlm.data.media import Frames
from nemo_vlm.data.opening import open_datasets
from nemo_vlm.data.prepare_wds import Sharding
from nemo_vlm.data.records import RecordFile
from nemo_vlm.data.tokenizer import VISION_TOKENS, train_chat_tokenizer
from nemo_vlm.data.webdataset import META, WebDataset, expanded
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.files import IDLE, remove_partial
from nemo_vlm.layout import resolve
from nemo_vlm.models.base import family
from nemo_vlm.models.images import load_image

COUNT = 24
TOKENIZER = train_chat_tokenizer(["Say. It is 1. Be brief. So? system user assistant"], 320, VISION_TOKENS)
ALL_TRAIN = Sharding(5, (1.0, 0.0, 0.0))


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, and JSON about them: captions of LLaVA, and ShareGPT records of all kinds."""
    found, pixels = tmp_path_factory.mktemp("media"), numpy.random.default_rng(0)
    for number in range(COUNT):
        size = (56 + 28 * (number % 3), 60, 3)
        image = Image.fromarray(pixels.integers(0, 256, size, dtype=numpy.uint8))
        image.save(found / f"{number}.{'png' if number % 3 else 'jpg'}")
    (found / "clip").mkdir()
    for number in range(4):
        shutil.copy(found / f"{3 * number}.jpg", found / f"clip/{number:05d}.jpg")
    (found / "clip.json").write_text('{"fps": "4.0"}')
    names = [f"{number}.{'png' if number % 3 else 'jpg'}" for number in range(COUNT)]
    captions = [
        {
            "id": f"c{n}",
            "image": name,
            "conversations": said("Say.\n<image>" if n % 2 else "<image>\nSay.", f"It is {n}."),
        }
        for n, name in enumerate(names)
    ]
    (found / "captions.json").write_text(json.dumps(captions))
    mixed = [
        {"id": f"m{n}", "images": [name, names[0]], "conversations": said("<image> or <image>?", f"It is {n}.")}
        for n, name in enumerate(names)
    ]
    mixed[2] = {"id": "text", "conversations": said("Say.", "Yes."), "images": []}
    mixed[3] = {"id": "clip", "videos": ["clip.mp4"], "conversations": said("<video>\nSay.", "It moves.")}
    mixed[4]["conversations"] = [
        {"from": "system", "value": "Be brief."},
        *mixed[4]["conversations"],
        *said("So?", "So."),
    ]
    (found / "mixed.json").write_text(json.dumps(mixed))
    return found


@pytest.fixture(scope="module")
def tars(folder: Path) -> Path:
    """Both, prepared; of the captions three, which would be all of a tar, have no image."""
    captions = json.loads((folder / "captions.json").read_text())
    captions[6:6] = [{**captions[6], "image": name} for name in ("gone.jpg", "n" * 300, "gone.jpg")]
    (folder / "with_gap.json").write_text(json.dumps(captions))
    done = prepare_wds.prepare(RecordFile(folder / "with_gap.json"), folder / "captions", Sharding(100, (8, 1, 1)), 0.2)
    assert "24 samples in 9 tars (train 7, val 1, test 1); 3 of 27 records are left out (2 missing_image, 1 b" in done
    prepare_wds.prepare(RecordFile(folder / "mixed.json"), folder / "mixed", ALL_TRAIN, 0.0)
    return folder


@edataclass
class Whole(Sample):
    """A sample as it lies in the tar."""

    parts: dict


@stateless
def cook(sample: dict[str, Any]) -> Whole:
    return Whole(**basic_sample_keys(sample), parts=sample)


class Plain(DefaultTaskEncoder):
    decoder = SampleDecoder(image_decode="pil")
    cookers = [Cooker(cook)]


def by_energon(path: Path, part: str) -> list[Any]:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    found = get_val_dataset(path, split_part=part, batch_size=None, worker_config=config, task_encoder=Plain())
    return list(get_loader(found))


def test_captions_are_read_as_energon_reads_them(tars: Path) -> None:
    """As VQASample, in the form before Energon 7 too."""
    path, original = tars / "captions", RecordFile(tars / "captions.json")
    new = yaml.safe_load((path / META / "dataset.yaml").read_text())
    assert new["sample_type"]["__class__"] == "VQASample"
    old = {"__module__": "megatron.energon", "__class__": "VQAWebdataset", "field_map": new["field_map"]}
    seen = 0
    for part, form in (("train", new), ("val", old), ("test", new)):
        (path / META / "dataset.yaml").write_text(yaml.dump(form))
        ours = WebDataset(path, "data_path", part)
        for number, theirs in enumerate(by_energon(path, part)):
            record, expected = ours[number], original[seen]
            assert record["id"] == theirs.__key__
            assert [turn["value"] for turn in record["conversations"]] == [theirs.context, theirs.answers]
            assert [turn["value"] for turn in expected["conversations"]] == [theirs.context, theirs.answers]
            (image,) = record["image"]
            assert load_image(image).tobytes() == theirs.image.convert("RGB").tobytes()
            assert image.open().read() == expected["image"][0].read_bytes()  # not encoded again
            seen += 1
    assert seen == COUNT


def test_records_of_any_kind_are_read_as_energon_reads_them(tars: Path) -> None:
    ours, original, theirs = (
        WebDataset(tars / "mixed", "data_path"),
        RecordFile(tars / "mixed.json"),
        by_energon(tars / "mixed", "train"),
    )
    assert len(ours) == len(theirs) == COUNT and len(ours.shards) == 5
    for number, sample in enumerate(theirs):
        record, expected, parts = ours[number], original[number], sample.parts
        assert {key: record[key] for key in ("id", "system", "conversations")} == {
            key: expected[key] for key in ("id", "system", "conversations")
        }
        assert parts["json"]["conversations"] == expected["conversations"]
        named = [load_image(image).tobytes() for image in record["image"]]
        assert named == [parts[name].convert("RGB").tobytes() for name in parts["json"]["images"]]
        assert [image.open().read() for image in record["image"]] == [path.read_bytes() for path in expected["image"]]
    (frames,) = ours[3]["video"]
    assert isinstance(frames, Frames) and frames.fps == original[3]["video"][0].fps == 4.0
    assert [file.open().read() for file in frames.files] == [
        file.read_bytes() for file in original[3]["video"][0].files
    ]
    assert ours.name(3) == "clip"


# Drawn as JSON is


@pytest.fixture(scope="module")
def make_run():
    """A run of a small Qwen2-VL, or another of its kind, and its processor."""
    views = {
        "qwen2_vl": {"conv_template": "qwen2", "video_min_pixels": 3136},
        "qwen3_vl": {"conv_template": "chatml", "min_pixels": 4096, "video_total_min_pixels": 4096},
    }

    def make(name: str = "qwen2_vl", **data: Any) -> tuple[RunConfig, Any]:
        config, parts = family(name, "tiny").config(), family(name, "processor")
        names = ("image_token_index", "video_token_index", "vision_start_token_index", "vision_end_token_index")
        open_mm = replace(config.mm_cfg, **dict.fromkeys(names))
        config = replace(config, vocab_size=None, encoder_seq_length=256, mm_cfg=open_mm)
        made = RunConfig(
            family=name,
            trainer=TrainerConfig(),
            exp_manager=ExpManagerConfig(),
            model=parts.settle(config, TOKENIZER),
            parallel=ParallelConfig(),
            step=StepConfig(2, 4),
            data=DataConfig(num_workers=0, **views[name], **data),
            optim=OptimConfig(),
            tokenizer=TokenizerConfig(),
        )
        return made, parts.Processor(made.model, made.data, TOKENIZER)

    return make


def batches(made: tuple[RunConfig, Any], steps: int, consumed: int = 0) -> Iterator[list[Batch]]:
    settings, processor = made
    datasets = open_datasets(settings, processor)
    yield from training_loader(datasets.train, resolve(settings, 0, {}), Share(0, 1), settings, steps, consumed)


def same(ours: Iterator[list[Batch]], theirs: Iterator[list[Batch]]) -> int:
    count = 0
    for step, expected in zip(ours, theirs, strict=True):
        for mine, other in zip(step, expected, strict=True):
            for name in ("tokens", "labels", "lengths", "records"):
                assert getattr(mine, name).equal(getattr(other, name))
            assert mine.images.pixel_values.equal(other.images.pixel_values)
            assert mine.images.grids == other.images.grids
            count += len(mine.lengths)
    return count


@pytest.mark.parametrize(("name", "packing"), [("qwen2_vl", False), ("qwen2_vl", True), ("qwen3_vl", True)])
def test_any_format_is_drawn_alike_and_goes_on_in_the_middle(name: str, packing: bool, tars: Path, make_run) -> None:
    prepare_mllm.prepare(RecordFile(tars / "mixed.json"), tars / "mllm.json", 0.0)
    files = (str(tars / file) for file in ("mixed.json", "mllm.json"))
    sharegpt, mllm = (make_run(name, data_path=file, packing=packing) for file in files)
    energon = make_run(name, data_impl="energon", data_path=str(tars / "mixed"), packing=packing)
    assert same(batches(energon, 8), batches(sharegpt, 8)) == same(batches(mllm, 8), batches(sharegpt, 8)) >= 32
    for made in (sharegpt, mllm, energon):  # the second epoch has begun
        assert same(batches(made, 4, consumed=16), iter(list(batches(made, 8))[4:])) >= 16


def test_parts_of_the_split_train_and_validate(tars: Path, make_run) -> None:
    settings, processor = make_run(
        data_impl="energon", data_path=[0.7, str(tars / "captions"), 0.3, str(tars / "mixed")]
    )
    found = open_datasets(settings, processor)
    assert len(found.train.files) == 2 and found.train.parts[1].tolist() == [*range(19, 19 + COUNT)]
    assert [file.path for file in found.validation.files] == [tars / "captions"]
    apart = {"data_impl": "energon", "data_path": str(tars / "mixed")}
    assert open_datasets(*make_run(**apart)).validation is None
    assert len(open_datasets(*make_run(**apart, validation_split=0.25)).validation) == 6
    assert len(open_datasets(*make_run(**apart, validation_path=str(tars / "captions"))).validation) == 3
    with pytest.raises(ConfigError, match="validation_path=.*mixed.*: no split.yaml there has a val part"):
        open_datasets(*make_run(**apart, validation_path=str(tars / "mixed")))
    with pytest.raises(ConfigError, match="image_folder=x: goes with model.data.data_impl=json"):
        make_run(**apart, image_folder="x")


def test_what_the_split_excludes_is_not_drawn(tars: Path, tmp_path: Path, make_run) -> None:
    path = tmp_path / "mixed"
    shutil.copytree(tars / "mixed", path)
    split = yaml.safe_load((path / META / "split.yaml").read_text())
    split["exclude"] = ["shard-000001.tar", "shard-000003.tar/00000017"]
    (path / META / "split.yaml").write_text(yaml.dump(split))
    data = open_datasets(*make_run(data_impl="energon", data_path=str(path))).train
    drawn = [data.record(number)["id"] for number in data.parts[0]]
    assert drawn == [sample.parts["json"]["id"] for sample in by_energon(path, "train")] and len(drawn) == 18


@pytest.mark.parametrize(
    "pattern",
    ["a/{00..02}/x-{8..10}.{tar,tgz}", "s-{3..1}.tar", "{9..1..-3}", "{1..9..3}", "{-2..2}", "{-02..1}", "{0..0}"]
    + ["{098..101}", "{1..3..0}", "{1,1}{,x}", "plain.tar"],
)
def test_braces_stand_for_what_they_do_to_energon(pattern: str) -> None:
    assert list(expanded(pattern)) == list(braceexpand(pattern))


@pytest.mark.parametrize("pattern", ["{a..c}", "{1{2,3}", "{a,b{c,d}}", "a}", "{}", "\\{1,2\\}", "{1..2..3..4}"])
def test_other_braces_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        list(expanded(pattern))


def test_they_are_shown_as_they_are_trained_on(tars: Path, capsys: pytest.CaptureFixture) -> None:
    TOKENIZER.save_pretrained(tars / "tokenizer")
    choices = ("model=qwen2_vl_tiny", "data=energon", f"model.tokenizer.type={tars / 'tokenizer'}")
    shown = lines(capsys, *choices, f"model.data.data_path={tars / 'mixed'}", "n=24", "model.global_batch_size=24")
    original = {record["id"]: record for record in map(RecordFile(tars / "mixed.json").__getitem__, range(COUNT))}
    for line in shown:
        answers = [turn["value"] for turn in original[line["id"]]["conversations"][1::2]]
        assert line["trained_text"] == [f"{answer}<|im_end|>" for answer in answers] and line["skipped"] is None
    assert len({line["id"] for line in shown}) == COUNT


# Of others


def jpegs(count: int) -> list[bytes]:
    found = []
    for number in range(count):
        file = BytesIO()
        Image.new("RGB", (56, 56), (40 * number, 0, 0)).save(file, "JPEG")
        found.append(file.getvalue())
    return found


class Dangerous:
    """What must not be executed."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def by_hand(path: Path, samples: list[dict[str, bytes]], definition: dict[str, Any]) -> Path:
    """A tar of these samples, as Pai-Megatron-Patch names it, and what belongs to it."""
    import tarfile

    (path / META).mkdir(parents=True)
    with tarfile.open(path / "pretrain-0.tar", "w") as tar:
        for number, parts in enumerate(samples):
            prepare_wds.add(tar, str(number), list(parts.items()))
    (path / META / "dataset.yaml").write_text(yaml.dump(definition))
    (path / META / "split.yaml").write_text(yaml.dump({"exclude": [], "split_parts": {"train": ["pretrain-0.tar"]}}))
    return path


PAIS = {
    "__class__": "ChatMLWebdataset",
    "__module__": "megatron_patch.data.energon.chatml",
    "field_map": {"imgs": "jpgs", "videos": "videos", "conversation": "json"},
}


def test_samples_of_pai_are_read_and_their_pickles_run_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns, messages = said("<image><video><image>?", "Yes."), [{"role": "user", "content": "?"}]
    messages.append({"role": "assistant", "content": "Text."})
    content = {"jpgs": pickle.dumps(jpegs(2)), "videos": pickle.dumps([jpegs(3)])}
    new = {**content, "json": json.dumps({"conversations": turns, "second_per_grid_ts": [0.25]}).encode()}
    old = {**content, "json": json.dumps(turns).encode()}
    text = {"jpgs": pickle.dumps([]), "json": json.dumps(messages).encode()}
    evil = {**new, "jpgs": pickle.dumps([Dangerous()])}
    odd = {**new, "json": json.dumps({"conversations": turns, "second_per_grid_ts": [0.25, 1]}).encode()}
    texts = [json.dumps({"conversations": turns, "second_per_grid_ts": [one]}) for one in (float("nan"), -0.5, 1e-320)]
    rates = [{**new, "json": text.encode()} for text in texts]
    empty, half = {**new, "videos": pickle.dumps([[]])}, {**new, "json": json.dumps(said("\ud83d", "Yes.")).encode()}
    samples = [new, old, text, evil, odd, half, {**new, "json": b"[" * 100_000}, empty, *rates]
    file = WebDataset(by_hand(tmp_path / "wds", samples, PAIS), "data_path")
    for number, fps in ((0, 4.0), (1, 2.0)):
        record = file[number]
        assert [image.open().read() for image in record["image"]] == jpegs(2)
        (video,) = record["video"]
        assert [frame.open().read() for frame in video.files] == jpegs(3) and video.fps == fps
        assert record["conversations"] == turns
    assert file[2]["image"] == file[2]["video"] == [] and file[2]["conversations"][1]["value"] == "Text."
    broken = [
        "refused, nothing of it was executed",
        "not as dataset.yaml says",
        "half of a surrogate pair",
        "too deeply",
    ]
    broken += ["0 frames", "fps=nan", "fps=-2.0", "fps=inf"]
    for number, says in enumerate(broken, start=3):
        with pytest.raises(SampleError, match=says) as error:
            file[number]
        assert error.value.reason == ("broken_record" if number < 7 else "broken_video")
        assert f"sample {number}" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_captions_and_questions_of_others(tmp_path: Path) -> None:
    definition = {"sample_type": {"__class__": "CaptioningSample"}, "field_map": {"image": "png,jpg", "caption": "txt"}}
    (image,) = jpegs(1)
    samples = [{"jpg": image, "txt": b"A cat."}, {"jpg": image}, {"txt": b"A dog."}, {"jpg": image, "txt": b"caf\xe9"}]
    file = WebDataset(by_hand(tmp_path / "captions", samples, definition), "data_path")
    assert [turn["value"] for turn in file[0]["conversations"]] == ["<image>", "A cat."]
    for number, says in ((1, "has no txt, but jpg"), (2, "has no png,jpg, but txt"), (3, "3.txt is not UTF-8")):
        with pytest.raises(SampleError, match=says):
            file[number]
    fields = {"image": "jpg", "context": "json[0][q]", "answers": "json[0][a]", "answer_weights": "json[0][w]"}
    about = [{"q": "Is it?", "a": ["no", "yes", "maybe"], "w": [0.2, 0.5, 0.3]}]
    definition = {"sample_type": {"__class__": "VQASample"}, "field_map": fields}
    weights = [about[0]["w"], 0.5, {"yes": 1}, None, [0.5]]
    samples = [{"jpg": image, "json": json.dumps([{**about[0], "w": some}]).encode()} for some in weights]
    file = WebDataset(by_hand(tmp_path / "vqa", samples, definition), "data_path")
    assert [turn["value"] for turn in file[0]["conversations"]] == ["<image>\nIs it?", "yes"]
    for number in range(1, len(samples)):
        with pytest.raises(SampleError, match="answer_weights must be a list, one for each") as error:
            file[number]
        assert error.value.reason == "broken_record"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("dataset.yaml", None, r"its .nv-meta/dataset.yaml cannot be read \(No such file"),
        ("dataset.yaml", "a: [", "is no YAML"),
        ("dataset.yaml", "- a", "must be a mapping"),
        (
            "dataset.yaml",
            "{sample_type: {__class__: OCRSample}, field_map: {}}",
            "samples of the class OCRSample; known",
        ),
        (
            "dataset.yaml",
            "{sample_type: {__class__: VQASample}, field_map: {image: jpg}}",
            "no field_map of context, ans",
        ),
        ("dataset.yaml", "{sample_type: {}, sample_loader: x.py:f}", "code that is not run here"),
        ("split.yaml", "{split_parts: {val: [pretrain-0.tar]}}", "leaves nothing to train on"),
        ("split.yaml", "{split_parts: {train: [gone.tar]}}", "gone.tar is not an uncompressed tar of samples"),
        ("split.yaml", "{}", "must have split_parts"),
        ("split.yaml", "{split_parts: {train: ['{a..c}.tar']}}", "{a..c} is not understood"),
        ("../pretrain-0.tar", "gzip", "pretrain-0.tar is not an uncompressed tar of samples"),
        ("../pretrain-0.tar", "half", "pretrain-0.tar is not an uncompressed tar of samples"),
        ("../pretrain-0.tar", "nested", "has no json"),
    ],
)
def test_what_cannot_be_read_is_one_line_at_the_door(file: str, content: str | None, says: str, tmp_path: Path) -> None:
    path = by_hand(tmp_path / "wds", [{"json": b"{}" * 2000, "jpg": b"1" * 9000}], PAIS)
    place = path / META / file
    held = place.read_bytes()
    place.unlink()
    if content == "nested":
        (tmp_path / "a.tar").write_bytes(held)
        shutil.rmtree(path)
        by_hand(path, [{"tar": held}], PAIS)
    elif content is not None:
        place.write_bytes({"gzip": gzip.compress(held), "half": held[:5000]}.get(content, content.encode()))
    with pytest.raises(ConfigError, match=says) as error:
        WebDataset(path, "model.data.data_path")
    assert str(error.value).startswith("model.data.data_path=") and "\n" not in str(error.value)


# Prepared


@pytest.mark.parametrize(
    "split", [(9.0, 1.0, 0.0), (8.0, 1.0, 1.0), (1.0, 0.0, 0.0), (98.0, 1.0, 1.0), (1.0, 1.0, 1.0)]
)
def test_no_part_that_has_a_share_is_empty(split: tuple[float, ...]) -> None:
    for most in (1, 3, 10_000):
        how = Sharding(most, split)
        for count in (100, 101, 2000, 558_128):
            tars = how.num_tars(count)
            parts = how.tars(tars)
            assert [number for tars_of in parts.values() for number in tars_of] == list(range(tars))
            assert set(parts) == {part for part, share in zip(prepare_wds.PARTS, split, strict=True) if share}
            assert count / tars <= most
            for part, share in zip(prepare_wds.PARTS, split, strict=True):  # as Energon's own rule, but for a tar
                assert abs(len(parts.get(part, ())) - tars * share / sum(split)) <= 1


def test_nothing_is_left_of_what_fails(folder: Path, tmp_path: Path, monkeypatch) -> None:
    file = RecordFile(folder / "captions.json")
    with pytest.raises(ConfigError, match="--split-ratio=98,1,1: needs 100 records or more, and there are 24"):
        prepare_wds.prepare(file, tmp_path / "few", Sharding(5, (98, 1, 1)), 0.0)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/x").touch()
    with pytest.raises(ConfigError, match="--output=.*there: is there already"):
        prepare_wds.prepare(file, tmp_path / "there", ALL_TRAIN, 0.0)
    records = json.loads((folder / "mixed.json").read_text())
    records[5]["images"] = ["gone.jpg"]
    (folder / "gone.json").write_text(json.dumps(records))
    file = RecordFile(folder / "gone.json")
    for prepare in (prepare_wds.prepare, prepare_mllm.prepare):
        how = (ALL_TRAIN, 0.0) if prepare is prepare_wds.prepare else (0.0,)
        with pytest.raises(RuntimeError, match="1 of 24 records are left out .1 missing_image., .*nothing was written"):
            prepare(file, tmp_path / "gone", *how)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "6.0.1")
    with pytest.raises(ConfigError, match="Megatron-Energon 6.0.1 is too old"):
        prepare_wds.prepare(file, tmp_path / "old", ALL_TRAIN, 1.0)
    assert os.listdir(tmp_path) == ["there"]


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    here = [f"{socket.gethostname()}-{process}" for process in (os.getppid(), os.getpid(), 2**22)]  # which is nobody's
    for writer in (*here, "elsewhere-1", "elsewhere-2"):
        (tmp_path / f".wds.partial-{writer}").mkdir()
    long_ago = time.time() - 2 * IDLE
    os.utime(tmp_path / ".wds.partial-elsewhere-2", (long_ago, long_ago))
    remove_partial(tmp_path / "wds")
    assert set(os.listdir(tmp_path)) == {f".wds.partial-{writer}" for writer in (here[0], "elsewhere-1")}


def test_mllm_is_what_mindspeed_reads(folder: Path, tmp_path: Path) -> None:
    records = json.loads((folder / "mixed.json").read_text())
    (folder / "long.json").write_text(json.dumps([*records, {**records[0], "images": ["n" * 300] * 2}]))
    done = prepare_mllm.prepare(RecordFile(folder / "long.json"), folder / "below.json", 0.05)
    assert "24 records; 1 of 25 records are left out (1 broken_record)" in done
    below = json.loads((folder / "below.json").read_text())
    assert below[0] == {
        "images": ["0.jpg", "0.jpg"],
        "messages": [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "It is 0."}],
    }
    assert set(below[2]) == {"messages"} and below[3]["videos"] == ["clip"]
    assert [turn["role"] for turn in below[4]["messages"]] == ["system", *("user", "assistant") * 2]
    prepare_mllm.prepare(RecordFile(folder / "mixed.json"), tmp_path / "apart.json", 0.0)
    assert json.loads((tmp_path / "apart.json").read_text())[0]["images"] == [str(folder / "0.jpg")] * 2
    original, again = RecordFile(folder / "mixed.json"), RecordFile(tmp_path / "apart.json")
    for number in range(COUNT):
        for key in ("image", "system"):
            assert again[number][key] == original[number][key]
    assert again[3]["video"] == original[3]["video"]


def test_killed_in_the_middle_a_run_on_tars_goes_on_in_their_order(folder: Path, tmp_path: Path) -> None:
    """From LLaVA JSON on, by the commands that a user types."""
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    captions = json.loads((folder / "captions.json").read_text())
    (tmp_path / "llava.json").write_text(json.dumps([{**record, "id": n} for n in range(3) for record in captions]))
    prepare = (str(ROOT / "scripts/prepare_wds.py"), "--input", "llava.json", "--image-folder", str(folder))
    made = run(*prepare, "--output", "wds", cwd=tmp_path, forked=False)
    assert made.returncode == 0 and "72 samples in 10 tars (train 9, val 1)" in made.stdout, made.stderr
    command = (str(ROOT / "examples/qwen2_vl_finetune.py"), "data=energon", "model.data.data_path=wds")
    command += ("model.tokenizer.type=tokenizer", "model.data.packing=false", "model.global_batch_size=4")
    command += ("model.micro_batch_size=4", "trainer.precision=32", "trainer.max_steps=24", "model.data.num_workers=1")
    command += (
        "trainer.enable_progress_bar=false",
        "exp_manager.resume_if_exists=true",
    )
    command += ("exp_manager.checkpoint_callback_params.every_n_train_steps=3", "trainer.val_check_interval=8")
    calm = run(*command, "exp_manager.name=calm", cwd=tmp_path)
    assert calm.returncode == 0, calm.stderr
    process = Command(*command, "exp_manager.name=killed", cwd=tmp_path)
    file, until = tmp_path / "nemo_experiments/killed/metrics.csv", time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") > 5) and time.monotonic() < until:
        time.sleep(0.002)
    for number in set(process.processes()):
        os.kill(number, signal.SIGKILL)
    process.wait()
    assert 5 <= len(metrics(tmp_path, "killed")) < 24
    resumed = run(*command, "exp_manager.name=killed", cwd=tmp_path)
    assert resumed.returncode == 0 and "going on from step" in resumed.stdout, resumed.stderr
    for ours, theirs in zip(metrics(tmp_path, "killed"), metrics(tmp_path, "calm"), strict=True):
        for name in ("global_step", "consumed_samples", "reduced_train_loss", "grad_norm", "lr"):
            assert ours[name] == theirs[name]
