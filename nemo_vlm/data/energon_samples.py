"""What a sample of Megatron-Energon holds, as a conversation: by the class and field_map of its dataset.yaml.

Samples of Pai-Megatron-Patch (ChatML) hold pickles of images, which are read without executing anything. Its converter
stored them with red and blue swapped, and they stay so here: data that matter are better prepared again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_vlm.batch import IMAGE_TAG
from nemo_vlm.data.forms import parsed
from nemo_vlm.data.media import FPS, Frames, Held, Member, frames, is_image
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.formats.unpickle import unpickle

Media = dict[str, Any]  # what can be opened, and Frames, by the names that a record gives them
Read = tuple[dict[str, Any], Media]

ACCESS = re.compile(r"\[([^\[\]]+)\]")  # behind a part's name: a key or a number inside of its JSON


@dataclass(frozen=True)
class Parts:
    """The files of a sample, by what stands behind its key.

    Attributes:
        called: the sample, for messages.
    """

    called: str
    members: Mapping[str, Member]

    def broken(self, why: str) -> SampleError:
        return SampleError("broken_record", f"{self.called}: {why}")

    def field(self, expression: str) -> Any:
        """What a field_map names: a part (jpg), or what stands inside of one (json[0][value]); jpg,png: one of them.

        Raises:
            SampleError: the sample has none of that, or its JSON is broken.
        """
        for option in expression.split(","):
            name, *_ = option.strip().split("[")
            if name in self.members:
                keys, part = ACCESS.findall(option), self.members[name]
                found = self.json(part) if keys else part
                try:
                    return inside(found, keys)
                except (LookupError, TypeError, ValueError):
                    continue
        raise self.broken(f"has no {expression}, but {', '.join(self.members)}")

    def json(self, part: Member) -> Any:
        """Raises SampleError: the part is broken."""
        return parsed(part.open().read(), f"{self.called}: its {part.name}")

    def text(self, expression: str) -> Any:
        """As field; of a part its text, or what its JSON is."""
        found = self.field(expression)
        if not isinstance(found, Member):
            return found
        if found.name.endswith("json"):
            return self.json(found)
        try:
            return found.open().read().decode()
        except UnicodeDecodeError as error:
            raise self.broken(f"its {found.name} is not UTF-8 ({error})") from None

    def chosen(self, media: Media, name: str, kind: str) -> Any:
        """Raises SampleError: missing_image or missing_video."""
        if name not in media:
            raise SampleError(f"missing_{kind}", f"{self.called}: has no {name}, but {', '.join(self.members)}")
        return media[name]

    def image(self, expression: str) -> Member:
        found = self.field(expression)
        if not isinstance(found, Member):
            raise self.broken(f"its {expression} is no image")
        return found


@dataclass(frozen=True)
class Form:
    """How samples are read: a function for their class, and the field_map that it looks into."""

    reader: Callable[[Parts, Mapping[str, str]], Read]
    fields: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.reader.__name__} {sorted(self.fields.items())}"

    def read(self, parts: Parts) -> Read:
        """A record that names its images and videos, and these.

        Raises:
            SampleError: the sample is not as its class demands.
        """
        try:
            return self.reader(parts, self.fields)
        except SampleError as error:
            told = str(error)
            raise SampleError(error.reason, told if parts.called in told else f"{parts.called}: {told}") from None
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise parts.broken(f"is not as dataset.yaml says ({error!r})") from None


def inside(value: Any, keys: list[str]) -> Any:
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def vqa(parts: Parts, fields: Mapping[str, str]) -> Read:
    """VQASample: image, context, answers, answer_weights; of several answers the one of most weight, or the first.

    Where the context does not say at which place the image stands, it stands in front.
    """
    context, answers = (parts.text(fields[name]) for name in ("context", "answers"))
    if isinstance(answers, list) and answers:
        weights = parts.text(fields["answer_weights"]) if "answer_weights" in fields else [1] * len(answers)
        if not isinstance(weights, list) or len(weights) != len(answers):
            raise parts.broken("its answer_weights must be a list, one for each of its answers")
        answers = answers[weights.index(max(weights))]
    if not isinstance(context, str) or not isinstance(answers, str):
        raise parts.broken("its context and answers must be texts")
    asked = context if IMAGE_TAG in context else f"{IMAGE_TAG}\n{context}"
    return turns(asked, answers), {"image": parts.image(fields["image"])}


def captioning(parts: Parts, fields: Mapping[str, str]) -> Read:
    """CaptioningSample: image, caption."""
    caption = parts.text(fields["caption"])
    if not isinstance(caption, str):
        raise parts.broken("its caption must be a text")
    return turns(IMAGE_TAG, caption), {"image": parts.image(fields["image"])}


def turns(asked: str, answered: str) -> dict[str, Any]:
    said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return {"image": "image", "conversations": said}


def chatml(parts: Parts, fields: Mapping[str, str]) -> Read:
    """ChatML of Pai-Megatron-Patch: conversation, and pickles imgs (list of images) and videos (lists of frames).

    The conversation is a list of turns, or has them beside second_per_grid_ts, the seconds of a frame of each video.
    """
    said = parts.text(fields["conversation"])
    said = parsed(said, parts.called) if isinstance(said, str) else said
    said = said if isinstance(said, dict) else {"conversations": said}
    turns = said.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        said = {**said, "conversations": None, "messages": turns}
    images = pickled(parts, fields.get("imgs"))
    videos = pickled(parts, fields.get("videos"))
    seconds = said.get("second_per_grid_ts") or [1 / FPS] * len(videos)
    media: Media = {f"image {n}": held(parts, image, f"image {n}") for n, image in enumerate(images)}
    for n, (video, each) in enumerate(zip(videos, seconds, strict=True)):
        media[f"video {n}"] = Frames(tuple(held(parts, frame, f"video {n}") for frame in video), 1 / each)
    named = {kind: [name for name in media if name.startswith(kind)] for kind in ("image", "video")}
    return {**said, **named}, media


def pickled(parts: Parts, name: str | None) -> list[Any]:
    """What a pickle holds; a sample without the part has none."""
    if name not in parts.members:
        return []
    try:
        found = unpickle(parts.members[name].open().read(), f"{parts.called}: {name}")
    except ConfigError as error:
        raise SampleError("broken_record", str(error)) from None
    if not isinstance(found, list):
        raise parts.broken(f"its {name} must be the pickle of a list")
    return found


def held(parts: Parts, content: Any, called: str) -> Held:
    if not isinstance(content, bytes):
        raise parts.broken(f"its {called} must be the bytes of an image")
    return Held(content, f"{parts.called}: {called}")


def crude(parts: Parts, fields: Mapping[str, str]) -> Read:
    """As scripts/prepare_wds.py writes them: a record whose `images` and `videos` name parts of the sample.

    Frames are parts as video0.00017.jpg of a video that is called video0; video0.json tells their rate, see data.media.
    """
    record = parts.text("json")
    if not isinstance(record, dict):
        raise parts.broken("its json must be a record")
    media: Media = dict(parts.members)
    found: dict[str, list[Member]] = {}
    for name, part in parts.members.items():
        video, _, frame = name.partition(".")
        if "." in frame and is_image(frame):
            found.setdefault(video, []).append(part)
    for video, files in found.items():
        rate = parts.members.get(f"{video}.json")
        media[video] = frames(files, rate.open().read() if rate else None, f"{parts.called}: {video}.json")
    return record, media


READERS: dict[str, tuple[Callable[[Parts, Mapping[str, str]], Read], tuple[str, ...]]] = {  # with the fields they need
    **dict.fromkeys(("VQASample", "VQAWebdataset"), (vqa, ("image", "context", "answers"))),
    **dict.fromkeys(("CaptioningSample", "CaptioningWebdataset"), (captioning, ("image", "caption"))),
    **dict.fromkeys(("ChatMLSample", "ChatMLWebdataset"), (chatml, ("conversation",))),
    "CrudeWebdataset": (crude, ()),
}
