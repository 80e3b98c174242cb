"""A conversation's segments as tokens, and which of them are trained on.

Segments are tokenized apart where trained and untrained text meet. So no token belongs to both, whatever the tokenizer;
and a prompt, which ends at such a place, has the ids that the same text had in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.batch import IGNORE_INDEX, IMAGE_TAG
from nemo_vlm.data.codec import Codec
from nemo_vlm.models.templates import PLACEHOLDERS, Segment

Piece = str | int | None  # text, the id of a special token, or a place where texts are not joined


@dataclass(frozen=True)
class PlaceholderRun:
    """Placeholders that stand together in the text: an image's, a video's, or those of a moment of a video.

    Attributes:
        count: one for each feature.
        before: text in front of them.
    """

    count: int
    before: str = ""


Runs = Sequence[PlaceholderRun]  # of an image or a video


@dataclass(frozen=True)
class MediaTokens:
    """What a run of placeholders is in the text: they themselves, one for each feature, and what stands around them.

    Attributes:
        video: a video's placeholder; None: it has an image's.
    """

    placeholder: int
    front: tuple[int, ...] = ()
    back: tuple[int, ...] = ()
    video: int | None = None

    @property
    def placeholders(self) -> tuple[int, ...]:
        return (self.placeholder,) if self.video is None else (self.placeholder, self.video)

    def placeholder_of(self, tag: str) -> int:
        return self.placeholder if tag == IMAGE_TAG or self.video is None else self.video

    def of_tag(self, tag: str) -> list[int]:
        """What stands for a tag of an image or a video, one placeholder for the whole run."""
        return self.around(self.placeholder_of(tag))

    def around(self, placeholder: int) -> list[int]:
        return [*self.front, placeholder, *self.back]

    def among(self, ids: Tensor) -> Tensor:
        """[s] bool: which ids [s] are placeholders."""
        return torch.isin(ids, torch.tensor(self.placeholders))


@dataclass(frozen=True)
class Encoded:
    """A conversation.

    Attributes:
        ids: [s] int64; a run of placeholders is one.
        trained: [s] bool.
        repeats: [s] int64, how often each id stands in the sample: a placeholder once for each feature.
    """

    ids: Tensor
    trained: Tensor
    repeats: Tensor

    def __len__(self) -> int:
        return int(self.repeats.sum())

    def cut(self, limit: int) -> Encoded:
        """What of it `limit` tokens hold. If that is not all: up to the last token that is trained on, so that no
        image or video is cut in two, nor stands at the end.
        """
        if len(self) <= limit:
            return self
        kept = (self.trained & (self.repeats.cumsum(0) <= limit)).nonzero()
        count = int(kept.max()) + 1 if len(kept) else 0
        return Encoded(self.ids[:count], self.trained[:count], self.repeats[:count])

    def tokens(self) -> Tensor:
        return self.ids.repeat_interleave(self.repeats)

    def shifted(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels, the token to be predicted at each position."""
        tokens = self.tokens()
        labels = torch.where(self.trained.repeat_interleave(self.repeats), tokens, IGNORE_INDEX)
        return tokens[:-1], labels[1:]


class SegmentEncoder:
    """Args:
    media: None: a tag of an image is a text like any other.
    """

    def __init__(self, tokenizer: Any, media: MediaTokens | None) -> None:
        self.codec, self.media = Codec(tokenizer), media
        self.front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        steering = sorted(self.codec.special, key=len, reverse=True)
        tags = [PLACEHOLDERS.pattern] if media else []
        self._pattern = re.compile("|".join([*tags, *map(re.escape, steering)]))

    def encode(self, segments: Iterable[Segment]) -> tuple[list[int], list[bool]]:
        """Ids with the tokenizer's BOS in front where it has one, and which of them are trained on."""
        ids, trained = list(self.front), [False] * len(self.front)
        for is_trained, group in groupby(segments, lambda segment: segment.trained):
            for piece in joined(inner for segment in group for inner in self._pieces(segment)):
                first = ids == self.front and not is_trained  # what is trained on decodes to itself, without a space
                found = self.codec.ids(piece, first) if isinstance(piece, str) else [piece]
                ids += found
                trained += [is_trained] * len(found)
        return ids, trained

    def _pieces(self, segment: Segment) -> Iterator[Piece]:
        """Text, and what is more than text: tags of media, and the template's own special tokens.

        A special token that somebody spells out is cut behind its first letter, and so is none.
        """
        text, start = segment.text, 0
        while match := self._pattern.search(text, start):
            media = self.media if PLACEHOLDERS.fullmatch(match[0]) else None
            is_spelled = segment.said and media is None
            yield text[start : match.start() + is_spelled]
            start = match.start() + 1 if is_spelled else match.end()
            yield from media.of_tag(match[0]) if media else [None if is_spelled else self.codec.special[match[0]]]
        yield text[start:]

    def repeats(self, ids: Sequence[int], counts: Sequence[int]) -> Tensor:
        """[s] int64: how often each id stands in the sample.

        Args:
            counts: features of each run of placeholders.
        Raises:
            ValueError: there are more or fewer runs.
        """
        found = torch.ones(len(ids), dtype=torch.int64)
        if self.media is not None:
            places = [number for number, one in enumerate(ids) if one in self.media.placeholders]
            if len(places) != len(counts):
                raise ValueError(f"{len(places)} placeholders in the text, {len(counts)} images and videos")
            found[places] = torch.tensor(counts, dtype=torch.int64)
        return found


def with_runs(segments: Sequence[Segment], media: Sequence[Runs]) -> Iterator[Segment]:
    """Segments in which each tag of an image or a video is its runs: a tag each, behind the text in front of it.

    None of that is trained on.

    Raises:
        ValueError: there are more or fewer tags.
    """
    count = sum(len(PLACEHOLDERS.findall(segment.text)) for segment in segments)
    if count != len(media):
        raise ValueError(f"{count} placeholders in the text, {len(media)} images and videos")
    left = iter(media)
    for segment in segments:
        start = 0
        for match in PLACEHOLDERS.finditer(segment.text):
            yield replace(segment, text=segment.text[start : match.start()])
            yield Segment("".join(run.before + match[0] for run in next(left)))
            start = match.end()
        yield replace(segment, text=segment.text[start:])


def joined(pieces: Iterable[Piece]) -> Iterator[str | int]:
    """Texts that follow each other as one; None parts them."""
    for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_text:
            yield "".join(piece for piece in group if isinstance(piece, str))
        else:
            yield from (piece for piece in group if isinstance(piece, int))


def trained_texts(labels: Tensor, codec: Codec) -> list[str]:
    """What a sample's labels [s] teach to say: the text of each run of them, in order."""
    runs = groupby(labels.tolist(), lambda label: label != IGNORE_INDEX)
    return [codec.text(list(run)) for trained, run in runs if trained]
