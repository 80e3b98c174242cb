"""Images and videos of records: how records name them, and where they stand."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nemo_vlm.data import media
from nemo_vlm.data.media import Frames, Member
from nemo_vlm.data.records import RecordFile
from nemo_vlm.errors import ConfigError, SampleError

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("said", [{"conversations": TURNS}, {"messages": MESSAGES}], ids=["sharegpt", "mllm"])
def test_files_are_named_as_llava_or_as_sharegpt_does(said: dict[str, Any], tmp_path: Path) -> None:
    ways = [
        ({"image": "a.jpg"}, ["a.jpg"], []),
        ({"images": ["a.jpg", "b.jpg"], "videos": ["c.mp4"]}, ["a.jpg", "b.jpg"], ["c.mp4"]),
        ({"images": [], "videos": None}, [], []),
        ({}, [], []),
        ({"image": "", "images": ["a.jpg"]}, ["a.jpg"], []),
        ({"images": "a.jpg", "video": ["c.mp4", "d.mp4"]}, ["a.jpg"], ["c.mp4", "d.mp4"]),
    ]
    file = RecordFile(write(tmp_path / "x.json", [{**said, **named} for named, _, _ in ways]))
    for number, (_, images, videos) in enumerate(ways):
        record = file[number]
        assert record["image"] == [tmp_path / name for name in images]
        assert record["video"] == [tmp_path / name for name in videos]
        assert [turn["value"] for turn in record["conversations"]] == ["What?", "That."]
        assert not {"images", "videos"} & set(record)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"image": "a.jpg", "images": ["a.jpg"]}, "has both 'image' and 'images'"),
        ({"video": ["a.mp4"], "videos": ["a.mp4"]}, "has both 'video' and 'videos'"),
        ({"images": [{"path": "a.jpg"}]}, "'images' must be a file's name or a list of them"),
        ({"videos": 5}, "'videos' must be a file's name or a list of them"),
    ],
)
def test_files_that_are_named_in_no_known_way(named: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        RecordFile(write(tmp_path / "x.json", [{"conversations": TURNS, **named}]))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_video_may_stand_as_its_frames(kind: str, tmp_path: Path) -> None:
    files = {
        "a/one.mp4": "a video",
        "a/two.json": '{"fps": "4.0"}',
        "a/bad.json": '{"fps": "many"}',
        "a/odd.json": "{}",
    }
    for name in ("two", "three", "bad"):
        files |= {f"a/{name}/{number:05d}.jpg": f"{name} {number}" for number in (2, 0, 11, 1)}
    files |= {"a/three/notes.txt": "", "a/three/.hidden.jpg": "", "a/three.0/00000.jpg": "another", "a/none/x.txt": ""}
    for name, text in files.items():
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_text(text)
    if kind == "tar":
        with tarfile.open(tmp_path / "videos.tar", "w") as tar:
            tar.add(tmp_path / "videos", arcname=".")
    names = [*(f"a/{name}.mp4" for name in ("one", "two", "three", "bad", "gone", "none")), ".", "/"]
    data = write(tmp_path / "x.json", [{"conversations": TURNS, "videos": [name]} for name in names])
    file = RecordFile(data, video_folder=str(tmp_path / ("videos" if kind == "folder" else "videos.tar")))
    read = (lambda source: source.read_bytes()) if kind == "folder" else (lambda source: source.open().read())
    assert read(file[0]["video"][0]) == b"a video"
    for number, name, fps in ((1, "two", 4.0), (2, "three", 2.0)):
        (frames,) = file[number]["video"]
        assert isinstance(frames, Frames) and frames.fps == fps and "4 frames from " in str(frames)
        assert [read(frame).decode() for frame in frames.files] == [f"{name} {place}" for place in (0, 1, 2, 11)]
    with pytest.raises(SampleError, match="bad.json: must be as") as error:
        file[3]
    assert error.value.reason == "broken_video"
    if kind == "folder":
        assert file[4]["video"] == [tmp_path / "videos/a/gone.mp4"]  # missing where it is opened
    for number in (4, 5, 6, 7) if kind == "tar" else (5, 6, 7):
        with pytest.raises(SampleError, match="a/none|a/gone|frames") as error:
            file[number]
        assert error.value.reason == "missing_video"


def test_a_tar_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """tarfile takes the rest of a header, or a damaged one, for the end."""
    with tarfile.open(tmp_path / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            (tmp_path / name).write_bytes(b"x" * 700)
            tar.add(tmp_path / name, arcname=name)
    whole = (tmp_path / "images.tar").read_bytes()
    data = write(tmp_path / "x.json", [{"conversations": TURNS, "image": "c.jpg"}])
    for broken in (whole[:1600], whole[:3000], whole[:1546] + b"x" + whole[1547:]):
        (tmp_path / "images.tar").write_bytes(broken)
        with pytest.raises(ConfigError, match="images.tar: not an uncompressed tar with files"):
            RecordFile(data, str(tmp_path / "images.tar"))


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "descriptors", {})
    monkeypatch.setattr(media, "MOST_OPEN", 2)
    for number in range(3):
        (tmp_path / f"{number}").write_text(f"0{number}")
    for number in (0, 1, 2, 0, 1, 2, 2, 1):
        assert Member(tmp_path / f"{number}", "x", 1, 1).open().read() == b"%d" % number
        assert len(media.descriptors) <= 2
