"""What ends a run early, and how people are told: one line, without a traceback."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

MAX_LENGTH = 600  # of what a library says
OF_MEDIA = {"missing_image", "broken_image", "huge_image", "narrow_image", "missing_video", "broken_video"}


class ConfigError(ValueError):
    """A setting, file or environment that cannot work; the message names it, its value and what would be right."""


class SampleError(ConfigError):
    """A record of which no sample can be made; training leaves it out and counts it.

    Attributes:
        reason: a short name to count by: missing_image, broken_image, huge_image, narrow_image, missing_video,
            broken_video, broken_record, no_answer, too_long, too_many_visual_tokens, stale_length.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def of_media(self) -> bool:
        """Whether an image or a video is why, which another day may be there, and whole."""
        return self.reason in OF_MEDIA


@dataclass(frozen=True)
class Failure:
    """An error as it is told. The exit code is 2 for a user's mistake and 1 for a run that failed."""

    message: str
    code: int = 1
    trace: str = ""
    job: str = ""  # which one of a multirun


class RunError(RuntimeError):
    """A run of several ranks that failed, as its supervisor tells it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return self.failure.message


class Stopped(BaseException):
    """A signal has asked the run to end, and it has, in good order; no further job of a multirun is to start."""


def explain(error: BaseException) -> Failure:
    if isinstance(error, RunError):
        return error.failure
    trace = "".join(traceback.format_exception(error))
    text = str(error).strip()
    if "Original Traceback" in text:  # a worker of the loader puts its traceback in front
        text = text.splitlines()[-1].partition("Error: ")[2] or text
    text = " ".join(text.split())
    if isinstance(error, ConfigError):
        return Failure(text, 2, trace)
    return Failure(f"the run failed: {type(error).__name__}: {text[:MAX_LENGTH]} (debug=true shows where)", 1, trace)
