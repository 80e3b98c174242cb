"""The text part of every family's processor: a record's conversation as tokens and labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.config import DataConfig, LanguageConfig
from nemo_vlm.data.codec import CONTROL
from nemo_vlm.errors import SampleError
from nemo_vlm.models.conversation import turns
from nemo_vlm.models.templates import PLACEHOLDERS, Segment, Turn, segments, template_of
from nemo_vlm.models.tokens import Encoded, MediaTokens, Runs, SegmentEncoder, with_runs

log = logging.getLogger(__name__)


class ConversationText:
    """Args:
    media: None: images and videos are left out.
    """

    def __init__(
        self, model: LanguageConfig, data: DataConfig, tokenizer: Any, media: MediaTokens | None = None
    ) -> None:
        self.data, self.tokenizer, self.limit, self.media = data, tokenizer, model.encoder_seq_length, media
        self.called, self.template = data.conv_template or model.conv_template, template_of(model, data)
        self.encoder = SegmentEncoder(tokenizer, media)
        missing = set(CONTROL.findall(str(self.template))) - self.encoder.codec.special.keys()
        if missing:
            log.warning(
                "model.data.conv_template=%s: %s is ordinary text to the tokenizer %s; "
                "model.tokenizer.additional_special_tokens or scripts/add_special_tokens.py makes it a token",
                *(self.called, ", ".join(sorted(missing)), tokenizer.name_or_path),
            )

    def turns(self, record: Mapping[str, Any]) -> list[Turn]:
        """A record's turns, with images and videos where the model is to see them.

        Raises:
            SampleError: broken_record.
        """
        found = turns(record)
        if self.template.captions and len(found) != 1:
            problem = f"{len(found)} turns; model.data.conv_template={self.called} is for one caption"
            raise SampleError("broken_record", f"record {record.get('id')}: {problem}")
        if self.media is None:
            named = record.get("image") or record.get("video")  # else <image> is what somebody wrote
            return [replace(turn, question=without_media(turn.question)) for turn in found] if named else found
        if self.data.sep_image_conv_front:
            return [replace(found[0], question=in_front(found[0].question)), *found[1:]]
        return found

    def train(self, record: Mapping[str, Any], turns: Sequence[Turn], media: Sequence[Runs]) -> Encoded:
        """A training sample, before the shift.

        Args:
            media: the runs of each image and video, in the order in which the turns speak of them.
        Raises:
            SampleError: broken_record, no_answer or too_long.
        """
        called = f"record {record.get('id')}"
        if all(turn.answer is None for turn in turns):
            raise SampleError("no_answer", f"{called}: has no answer")
        whole = self._encode(record, turns, media)
        encoded = whole.cut(self.limit + 1)  # the last token is only a label
        if len(encoded) < len(whole) and self.data.too_long == "drop" or not len(encoded):
            long = f"{len(whole) - 1} tokens do not fit model.encoder_seq_length={self.limit}"
            raise SampleError("too_long", f"{called}: {long}" + ("" if len(encoded) else ", nor does any answer"))
        return encoded

    def num_runs(self, encoded: Encoded) -> int:
        """Runs of placeholders that a sample still has."""
        return 0 if self.media is None else int(self.media.among(encoded.ids).sum())

    def num_media_tokens(self, encoded: Encoded) -> int:
        """Tokens that stand for them."""
        return 0 if self.media is None else int(encoded.repeats[self.media.among(encoded.ids)].sum())

    def prompt(self, record: Mapping[str, Any], turn: Turn, media: Sequence[Runs]) -> Tensor:
        """Tokens [s] of one question, up to where its answer begins.

        Raises:
            SampleError: too_long, or broken_record: it speaks of other images.
        """
        return self.roomy(self._encode(record, [replace(turn, answer=None)], media).tokens())

    def prompt_text(self, record: Mapping[str, Any]) -> str:
        """What the prompt of a record's first question says, the BOS in front left out.

        Raises:
            SampleError: broken_record.
        """
        first = replace(self.turns(record)[0], answer=None)
        return "".join(part.text for part in self._segments(record, [first]))

    def raw(self, text: str, media: Sequence[Runs], add_special_tokens: bool) -> Tensor:
        """Tokens [s] of a text as it is; special tokens are what the tokenizer puts around every text, BOS as a rule.

        Raises:
            SampleError: as prompt.
        """
        ids = self.tokenizer(self._placed(text, media), add_special_tokens=add_special_tokens)["input_ids"]
        if (marks := self.media) is not None:
            ids = [inner for one in ids for inner in (marks.around(one) if one in marks.placeholders else [one])]
        repeats = self._repeats(ids, media, "the prompt")
        return self.roomy(torch.tensor(ids, dtype=torch.int64).repeat_interleave(repeats))

    def _placed(self, text: str, media: Sequence[Runs]) -> str:
        """With the tokenizer's own placeholder for each run in place of the tags."""
        if (marks := self.media) is None:
            return text
        parts, named = self._with_runs([Segment(text)], media, "the prompt"), self.tokenizer.convert_ids_to_tokens
        whole = "".join(part.text for part in parts)
        return PLACEHOLDERS.sub(lambda tag: named(marks.placeholder_of(tag[0])), whole)

    def _encode(self, record: Mapping[str, Any], turns: Sequence[Turn], media: Sequence[Runs]) -> Encoded:
        called = f"record {record.get('id')}"
        ids, trained = self.encoder.encode(self._with_runs(self._segments(record, turns), media, called))
        return Encoded(torch.tensor(ids), torch.tensor(trained), self._repeats(ids, media, called))

    def _segments(self, record: Mapping[str, Any], turns: Sequence[Turn]) -> list[Segment]:
        system = record.get("system") or self.data.system_message
        return segments(self.template, turns, system, self.tokenizer.bos_token or "", self.tokenizer.eos_token)

    def _with_runs(self, segments: list[Segment], media: Sequence[Runs], called: str) -> list[Segment]:
        if self.media is None:
            return segments
        try:
            return list(with_runs(segments, media))
        except ValueError as error:
            raise SampleError("broken_record", f"{called}: {error}") from None

    def _repeats(self, ids: Sequence[int], media: Sequence[Runs], called: str) -> Tensor:
        try:
            return self.encoder.repeats(ids, [run.count for runs in media for run in runs])
        except ValueError as error:
            raise SampleError("broken_record", f"{called}: {error}") from None

    def roomy(self, prompt: Tensor) -> Tensor:
        """The prompt's tokens [s].

        Raises:
            SampleError: too_long: there is no room for an answer.
        """
        if len(prompt) >= self.limit:
            message = f"{len(prompt)} tokens leave no room for an answer in model.encoder_seq_length={self.limit}"
            raise SampleError("too_long", message)
        return prompt


def without_media(question: str) -> str:
    """A question for a model that reads text only; one that speaks of no image stays as it is."""
    return PLACEHOLDERS.sub("", question).lstrip("\n") if PLACEHOLDERS.search(question) else question


def in_front(question: str) -> str:
    """A question with its images before its text, each on a line of its own, as the guide's fork has it."""
    tags = "".join(f"{tag}\n" for tag in PLACEHOLDERS.findall(question))
    return f"{tags}{PLACEHOLDERS.sub('', question).strip()}".strip() if tags else question
