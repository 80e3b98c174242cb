"""What a family is: a folder with these modules, found by its name.

    config.py     Config, a frozen dataclass on LanguageConfig; STARTS, the settings that name checkpoints with first
                  weights, and the module that each is for (None: all); where two bring the same, the later one wins
    model.py      Model(config, build, stage), a torch module: forward(batch, labels) -> losses, logits, hidden states;
                  vision_language.py has what those that see have in common, which also tell their tower to the plan:
                  vision_shape(config.mm_cfg.vision_encoder)
    processor.py  settle(config, tokenizer); Processor(config, data, tokenizer): record -> Sample;
                  hf_processor(config, data), data_from_hf(files, config): Hugging Face's files of a processor that does
                  the same, written and read
    mapping.py    rules(config): its weights in Hugging Face's names; hf_config(config), from_hf(hf, names, path): the
                  config.json beside them, written and read; HF_TYPES, VISION_TYPES: model types that it reads;
                  HF_VARIANTS: beginnings of names in other files, and what they are in rules; MEGATRON_VARIANTS: how
                  each derivative of Megatron-LM writes it, by what that is called (mapping.Variant); the first is what
                  is written
    tiny.py       config(), samples(config, count, generator), hf_inputs(config, batch): a small one, to prove the
                  others on

All but model.py import neither Megatron nor a process group, so that conversion runs without them.
tests/test_families.py proves every family that it finds here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from nemo_vlm.errors import ConfigError

if TYPE_CHECKING:  # torch is not imported to print a config
    from PIL import Image
    from torch import Tensor

    from nemo_vlm.batch import Images, Sample
    from nemo_vlm.models.text import ConversationText

FAMILIES = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/config.py")))


class Processor(Protocol):
    """A family's way from a record to tokens and pixels."""

    config: Any
    tokenizer: Any
    text: ConversationText

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """A training sample of a LLaVA-style record, its images given as paths.

        Raises:
            SampleError: there is none to be made of it.
        """
        ...

    def length(self, record: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of that sample, and how many of them stand for images and videos; no pixels are loaded.

        Raises:
            SampleError: as sample.
        """
        ...

    def media(self, record: Mapping[str, Any]) -> list[Any]:
        """The images and videos that it sees, in the order of its text.

        Raises:
            SampleError: as length.
        """
        ...

    def seen(self, images: Images) -> list[list[Image.Image]]:
        """The pictures that the patches of each view were cut from: an image's one, or a video's frames."""
        ...

    def prompt(self, record: Mapping[str, Any]) -> Sample:
        """The record up to where the assistant's first answer would begin."""
        ...

    def asked(self, record: Mapping[str, Any]) -> tuple[Tensor, list[Any]]:
        """The tokens of that prompt, and what `pixels` is to be asked for it."""
        ...

    def tokens(self, text: str, media: Sequence[Any], add_special_tokens: bool = True) -> Tensor:
        """Ids [s] of a text that is not put into a template, <image> standing for as many tokens as the model sees."""
        ...

    def pixels(self, media: Sequence[Any]) -> Images:
        """What Sample.images is for these images and videos."""
        ...


def family(name: str, part: str) -> ModuleType:
    """One module of a family, `family("llava", "config")`.

    Raises:
        ConfigError: there is no such family.
    """
    if name not in FAMILIES:
        raise ConfigError(f"model.family={name}: must be one of {', '.join(FAMILIES)}")
    return importlib.import_module(f"nemo_vlm.models.{name}.{part}")


def starts(tree: Mapping[str, Any]) -> list[tuple[str, str | None, str]]:
    """The checkpoints that the branch `model` names: the key, the module it is for (None: all), the path."""
    found = []
    for key, module in family(str(tree.get("family")), "config").STARTS.items():
        value: Any = tree
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found.append((f"model.{key}", module, str(value)))
    return found
