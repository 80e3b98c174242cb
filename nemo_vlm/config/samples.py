"""`samples.*`."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vlm.config.checks import demand


@dataclass(frozen=True)
class SamplesConfig:
    """`samples.*`: what the model is asked when it has been trained, in one process; the results are printed."""

    prompts: tuple[str, ...] = ()  # texts to go on from; of a model that was trained on conversations, questions
    tokens_to_generate: int = 48  # of each answer, at most
    # records with answers, scored as by examples/neva_evaluation.py; images stand where the run's do, if in one folder
    questions: str | None = None

    def __post_init__(self) -> None:
        demand(self.tokens_to_generate > 0, "samples.tokens_to_generate", self.tokens_to_generate, "1 or more")
