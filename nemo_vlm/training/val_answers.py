"""Answers to questions that a run does not train on: val_accuracy, and a table and a picture of them.

They are asked as examples/neva_evaluation.py asks a run's archive, and answered by the weights as they are.

<run>/  val_answers.jsonl  val_answers.png    of the last validation, as predictions.jsonl and predictions.png
        tensorboard/                          val_answers: the table, and the picture, of each
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any

import numpy
import torch
from PIL import Image
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor

from nemo_vlm import heartbeat
from nemo_vlm.batch import Sample
from nemo_vlm.checkpoints import run_folder
from nemo_vlm.config import RunConfig
from nemo_vlm.data.dataset import Samples
from nemo_vlm.data.loader import Share, joined
from nemo_vlm.data.orders import generator
from nemo_vlm.data.records import RecordDataset
from nemo_vlm.errors import SampleError
from nemo_vlm.files import written_whole
from nemo_vlm.inference.evaluate import asked_of, draw, prediction, shortened
from nemo_vlm.inference.generate import Ends, Heard, generate
from nemo_vlm.inference.restore import terminators
from nemo_vlm.inference.settings import DecodingConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.models.chat import ends_of_answers
from nemo_vlm.models.conversation import turns
from nemo_vlm.training.rereading import Rereader

log = logging.getLogger(__name__)
CHOICE = 2**33  # where an epoch would stand among the seeds
TABLE = 24  # rows of the table in TensorBoard
TAG = "val_answers"
WIDTH = 300  # letters of a text there
Rows = dict[int, dict[str, Any]]  # evaluate.prediction's, by the numbers of their records


@dataclass(frozen=True)
class Asked:
    """A question without its pixels: processor.asked of a record."""

    record: dict[str, Any]
    tokens: Tensor
    media: list[Any]

    def visual_tokens(self, placeholder_ids: tuple[int, ...]) -> int:
        return int(torch.isin(self.tokens, torch.tensor(placeholder_ids)).sum())


class Questions:
    """The first turns of model.data.eval_samples records of the validation data.

    Args:
        loggers: of which TensorBoard's are shown the answers.
    """

    def __init__(
        self, run: RunConfig, layout: Layout, share: Share, dataset: Samples, loggers: Iterable[Logger]
    ) -> None:
        assert isinstance(dataset, RecordDataset)
        self.run, self.layout, self.share, self.dataset = run, layout, share, dataset
        self.boards = [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
        self.folder, self.faults, self.tokenizer = run_folder(run.exp_manager), 0, dataset.processor.tokenizer
        self.numbers, wanted = chosen(dataset, run.data.eval_samples, run.step.seed), run.data.eval_samples
        if len(self.numbers) < wanted:
            log.warning("model.data.eval_samples=%d: the validation data gives %d questions", wanted, len(self.numbers))
        stops = {self.tokenizer.eos_token_id, *ends_of_answers(run.model, run.data, self.tokenizer)}
        # A placeholder that a model says itself would be taken for an image's when it is read again.
        stops |= set(run.model.placeholder_ids)
        self.ends = Ends(frozenset(stops), terminators(run.model, run.data), self.tokenizer)

    def accuracy(self, engine: Engine, step: int) -> float:
        """The share of exactly right answers, on every rank; NaN where nothing could be asked."""
        heartbeat.at("answering")
        mine, faults = self.answered(engine)
        found = groups.from_every_rank((mine, faults))
        rows = {number: row for some, _ in found for number, row in some.items()}
        self._complain({number: why for _, some in found for number, why in some.items()})
        rows = {number: {"global_step": step} | rows[number] for number in self.numbers if number in rows}
        if rows and torch.distributed.get_rank() == 0:
            self._show(rows, step)
        return sum(row["correct"] for row in rows.values()) / len(rows) if rows else math.nan

    def answered(self, engine: Engine) -> tuple[Rows, dict[int, str]]:
        """This rank's share of the answers, and why it has none of some; all ranks answer together."""
        reader, limit = Rereader(engine, self.run, self.layout), self.run.model.encoder_seq_length
        asked, faults = self._asked()
        ends = {number: min(len(one.tokens) + self.run.data.eval_tokens, limit) for number, one in asked.items()}
        visual = {number: one.visual_tokens(self.run.model.placeholder_ids) for number, one in asked.items()}
        total = sum(ends[number] - len(one.tokens) for number, one in asked.items())
        rows = {}
        with engine.evaluation(), self._bar(total) as bar:
            for group in reader.in_groups(ends, visual):
                prompts = self._with_pixels({number: asked[number] for number in group}, faults)
                for number, text in self._answers(reader, prompts, ends, counting(bar)).items():
                    rows[number] = prediction(asked[number].record, text)
            reader.wait()
        return rows, faults

    def _bar(self, total: int) -> Tqdm:
        """Of the tokens of this rank's answers, below that of the training and like it; rank 0 shows it."""
        shown = self.run.trainer.enable_progress_bar and torch.distributed.get_rank() == 0
        return Tqdm(total=total, desc="Answering", unit="token", leave=False, disable=not shown, file=sys.stdout)

    def _asked(self) -> tuple[dict[int, Asked], dict[int, str]]:
        """This rank's questions by number, without pixels; and why there are none of some."""
        asked, faults = {}, {}
        for number in self.numbers[self.share.rank :: self.share.of]:
            try:
                record = self.dataset.record(number)
                asked[number] = Asked(record, *self.dataset.processor.asked(record))
            except SampleError as error:
                faults[number] = str(error)
        return asked, faults

    def _with_pixels(self, asked: Mapping[int, Asked], faults: dict[int, str]) -> dict[int, Sample]:
        """Those that can be read; why others cannot is added to the faults."""
        prompts = {}
        for number, one in asked.items():
            try:
                images = self.dataset.processor.pixels(one.media)
                prompts[number] = Sample(one.tokens, torch.empty(0, dtype=torch.int64), images)
            except SampleError as error:
                faults[number] = str(error)
        return prompts

    def _answers(
        self, reader: Rereader, prompts: Mapping[int, Sample], ends: Mapping[int, int], heard: Heard
    ) -> dict[int, str]:
        if not prompts:
            return {}
        limits = [ends[number] - len(prompt.tokens) for number, prompt in prompts.items()]
        said = generate(reader, list(prompts.values()), limits, DecodingConfig(), self.ends, list(prompts), heard)
        texts = [answer.text(self.tokenizer).strip() for answer in said]
        return dict(zip(prompts, texts, strict=True))

    def _complain(self, faults: Mapping[int, str]) -> None:
        """Say what is left out, where it is not what was left out before."""
        if len(faults) != self.faults:
            self.faults = len(faults)
            told = "%d of the %d records of model.data.eval_samples are left out; the first: %s"
            log.warning(told, len(faults), len(self.numbers), next(iter(faults.values()), "none any more"))

    def _show(self, rows: Rows, step: int) -> None:
        with written_whole(self.folder / f"{TAG}.jsonl", "wb") as file:
            for row in rows.values():  # the name of a file may be no Unicode
                file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode(errors="replace"))
        picture = self.folder / f"{TAG}.png"
        with written_whole(picture, "wb") as file:
            draw(rows, {number: self.dataset.record(number) for number in rows}, file)
        for board in self.boards:
            board.experiment.add_text(TAG, table(rows.values()), step)
            pixels = numpy.asarray(Image.open(picture).convert("RGB"))
            board.experiment.add_image(TAG, pixels, step, dataformats="HWC")


def counting(bar: Tqdm) -> Heard:
    """Moves the bar on by the tokens of one more group; an answer that has ended has as many as it could have had."""
    before = bar.n
    return lambda rows: bar.update(before + sum(len(row.tokens) if row.running else row.limit for row in rows) - bar.n)


def chosen(dataset: RecordDataset, count: int, seed: int) -> list[int]:
    """Numbers of records that ask something and say what is right.

    One from anywhere in each of so many equal stretches of the data, whose order may be by kinds, or may repeat itself.
    """
    numbers = joined(dataset.parts)
    count = min(count, len(numbers))
    borders = pairwise(len(numbers) * part // count for part in range(count + 1))
    draws = torch.rand(count, generator=generator(seed, CHOICE), dtype=torch.float64).tolist()
    found: list[int] = []
    for (begin, end), drawn in zip(borders, draws, strict=True):
        first = begin + int(drawn * (end - begin))
        places = chain(range(first, end), range(begin, first))
        found += islice((int(numbers[place]) for place in places if asks(dataset, int(numbers[place]))), 1)
    return found


def asks(dataset: RecordDataset, number: int) -> bool:
    """Whether the first turn of a record has a question and an answer."""
    try:
        first = turns(dataset.record(number))[0]
    except SampleError as error:
        return error.of_media  # it is left out when it is asked, and counted
    return bool(first.question.strip() and (first.answer or "").strip())


def table(rows: Iterable[dict[str, Any]]) -> str:
    """In Markdown: question, answer, truth, and whether the answer is right."""
    told = [
        (asked_of(row), row["text"], row["expected"] or "", "right" if row["correct"] else "**wrong**") for row in rows
    ]
    cells = [["question", "answer", "truth", ""], ["---"] * 4]
    cells += [[cell(text) for text in row] for row in told[:TABLE]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def cell(text: str) -> str:
    return shortened(text, WIDTH).replace("|", "\\|")
