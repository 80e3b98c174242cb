"""What a model answers when it has just been trained: samples.prompts, printed by the process that started the run."""

from __future__ import annotations

import sys

from torch import Tensor

from nemo_vlm.config import RunConfig
from nemo_vlm.inference.answers import answer, sample_of
from nemo_vlm.inference.laid_out import lay_out
from nemo_vlm.inference.restore import Restored, restore
from nemo_vlm.inference.settings import DecodingConfig, GenerateConfig, MachineConfig
from nemo_vlm.training.exp_manager import archive_path


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
        found = answer(samples, restored, config.inference, () if plain else restored.terminators)
    for number, prompt in enumerate(prompts):
        text = found[number].text(restored.tokenizer)
        sys.stdout.write(f"\n--- {prompt!r}\n{text.strip()}\n")
    sys.stdout.flush()


def question(text: str, restored: Restored) -> Tensor:
    """Ids [s] of a question, as examples/neva_inference.py asks it."""
    turns = [{"from": "human", "value": text}]
    tokens, _ = restored.processor.asked({"conversations": turns, "image": [], "video": []})
    return tokens
