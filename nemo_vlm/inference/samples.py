"""What a model answers when it has just been trained, in the process that started the run: samples.prompts, which are
printed, and samples.questions, which are scored.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from nemo_vlm.checkpoints import archive_path, run_folder
from nemo_vlm.config import RunConfig
from nemo_vlm.data.records import RecordFile, look
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.inference import evaluate
from nemo_vlm.inference.answers import answer, sample_of
from nemo_vlm.inference.laid_out import lay_out
from nemo_vlm.inference.restore import Restored, restore, terminators
from nemo_vlm.inference.settings import DecodingConfig, EvaluateConfig, GenerateConfig, MachineConfig
from nemo_vlm.models.images import image_size
from nemo_vlm.models.video import Video, frame_size

QUESTIONS_AT_ONCE = 64


def show(run: RunConfig) -> None:
    """Open the archive that a run has written, in this process alone, and let it answer.

    A model of plain text goes on from the prompts, by draws, since the likeliest words alone go round in circles; one
    of conversations is asked them in the template that it was trained with, and answers greedily.

    Raises:
        ConfigError: a prompt is too long.
    """
    prompts, plain = run.samples.prompts, run.data.data_impl == "mmap"
    config = GenerateConfig(
        model_path=str(archive_path(run.exp_manager)),
        prompt="",
        trainer=MachineConfig(devices=1, accelerator=run.trainer.accelerator),
        inference=DecodingConfig(
            greedy=not plain, top_k=20, temperature=0.7, tokens_to_generate=run.samples.tokens_to_generate
        ),
    )
    model = lay_out(config, {})
    with restore(model.source, model.run.trainer.precision, model.layout) as restored:
        asked = [restored.processor.tokens(text, []) if plain else question(text, restored) for text in prompts]
        samples = {number: sample_of(tokens, [], restored) for number, tokens in enumerate(asked)}
        ends = () if plain else terminators(restored.config, restored.data)
        found = answer(samples, restored, config.inference, ends)
    for number, prompt in enumerate(prompts):
        text = found[number].text(restored.tokenizer)
        sys.stdout.write(f"\n--- {prompt!r}\n{text.strip()}\n")
    sys.stdout.flush()


def score(run: RunConfig) -> None:
    """Let the archive that a run has written answer samples.questions, in this process alone, and print the accuracies.

    predictions.jsonl and predictions.png stand in the run's folder.

    Raises:
        ConfigError: the questions cannot be read.
    """
    image_folder, video_folder = media_folders(run)
    config = EvaluateConfig(
        neva_model_file=str(archive_path(run.exp_manager)),
        data_path=run.samples.questions,
        image_folder=image_folder,
        video_folder=video_folder,
        output_folder=str(run_folder(run.exp_manager)),
        trainer=MachineConfig(devices=1, accelerator=run.trainer.accelerator),
        inference=DecodingConfig(tokens_to_generate=run.samples.tokens_to_generate, batch_size=QUESTIONS_AT_ONCE),
    )
    evaluate.prepare(config, {}).run()


def media_folders(run: RunConfig) -> tuple[str | None, str | None]:
    """Those of samples.questions are the run's, where these are one folder for all files; None: beside the file."""
    data = run.data
    image_folder = data.image_folder if isinstance(data.image_folder, str) else None
    return image_folder, data.video_folder if isinstance(data.video_folder, str) else None


def check(run: RunConfig) -> None:
    """Of a run with samples.questions, before it starts.

    Raises:
        ConfigError: they cannot be read, nor what the first of them is about, or the run trains no model of
            conversations.
    """
    setting = f"samples.questions={run.samples.questions}"
    if not run.data.has_records:
        impl = f"model.data.data_impl={run.data.data_impl}"
        raise ConfigError(f"{setting}: needs a model of conversations, not {impl}")
    path, reads_media = Path(str(run.samples.questions)), run.model.reads_media
    if not path.is_file():
        raise ConfigError(f"{setting}: cannot be read (no such file)")
    file = RecordFile(path, *media_folders(run), "samples.questions", reads_media)
    try:
        record = look(file, "samples.questions")
        for image in record["image"] if reads_media else ():
            image_size(image)
        for video in record["video"] if reads_media else ():
            frame_size(Video(video))
    except SampleError as error:
        where = "images and videos stand where model.data.image_folder and video_folder say, or beside the file"
        raise ConfigError(f"{setting}: {error}; {where}") from None


def question(text: str, restored: Restored) -> Tensor:
    """Ids [s] of a question, as examples/neva_inference.py asks it."""
    turns = [{"from": "human", "value": text}]
    tokens, _ = restored.processor.asked({"conversations": turns, "image": [], "video": []})
    return tokens
