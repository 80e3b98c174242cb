"""A line of another system as ours, whichever it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting import mindspeed, mindspeed_converters, pai, pai_data
from nemo_vlm.porting.shell import Command


def translate(
    words: Sequence[str], given: Mapping[str, str], family: str | None = None, tokenizer: str = ""
) -> tuple[Command, list[str]]:
    """The command of ours that does what a line was to do, and what the user should know of it.

    Args:
        words: Pai's workflow or script with its arguments, MindSpeed's script, or mm-convert with its flags.
        given: variables; of Pai's, those of this process are read beside them, as its scripts do.
        family: as pai.translate's.
        tokenizer: its directory.
    Raises:
        ConfigError: nothing here does that.
    """
    script = mindspeed.script_in(words[0]) if words else None
    if script is not None:
        if len(words) > 1:
            raise ConfigError(f"{words[1]}: {words[0]} takes no arguments; its variables are given by --env")
        return mindspeed.translate(words[0], script, given, tokenizer)
    if converter := mindspeed_converters.named(words):
        return mindspeed_converters.translate(converter, words)
    if converter := pai_data.named(words):
        return pai_data.translate(converter, words)
    return pai.translate(words, os.environ | given, family, tokenizer)
