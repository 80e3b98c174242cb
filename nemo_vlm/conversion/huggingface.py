"""What stands beside the weights in Hugging Face's and Megatron's directories: config.json, tokenizer, processor."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_vlm.data.tokenizer import open_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.mapping import Rule, Swapped
from nemo_vlm.models.base import family
from nemo_vlm.models.chat import chat_template, ends_of_answers
from nemo_vlm.sources.source import Source, save_files

log = logging.getLogger(__name__)

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def write_companions(source: Source, specs: list[TensorSpec], folder: Path) -> None:
    """Everything but the weights."""
    settings = source.settings
    model, data = settings["model"], settings["data"]
    config = family(source.family, "mapping").hf_config(model) | {"torch_dtype": main_dtype(specs)}
    processor = family(source.family, "processor").hf_processor(model, data)
    write_json(folder / CONFIG, config)  # for the tokenizer, which may ask what model it is of
    kept = {name: span for name, span in source.files.items() if not name.endswith("processor_config.json")}
    name_for_older(save_files(kept, folder) / TOKENIZER)
    for name, content in processor.items():
        write_json(folder / name, content)
    tokenizer = tokenizer_of(source, folder)
    write_json(folder / CONFIG, with_special_tokens(config, tokenizer, folder / GENERATION))
    if tokenizer is None:
        log.warning("%s holds no tokenizer: the export goes without tokenizer and chat template", source)
        return
    check_tokenizer(tokenizer, model, source)
    if not (folder / GENERATION).exists():
        ends = [tokenizer.eos_token_id, *ends_of_answers(model, data, tokenizer)]
        more = {"eos_token_id": ends} if len(ends) > 1 else {}  # generate would go on behind an answer
        write_json(folder / GENERATION, special_tokens(tokenizer) | more)
    if not has_template(folder, tokenizer, bool(processor)):
        with_bos = not processor or tokenizer("")["input_ids"] == []
        (folder / TEMPLATES[0]).write_text(chat_template(model, data, with_bos))
        (folder / TEMPLATES[1]).unlink(missing_ok=True)


def name_for_older(path: Path) -> None:
    """Let transformers 4.57 read a tokenizer_config.json that transformers 5 has written, which reads both names."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    named = dict(settings)
    if named.get("tokenizer_class") == "TokenizersBackend":
        named["tokenizer_class"] = "PreTrainedTokenizerFast"
        named.setdefault("model_input_names", ["input_ids", "attention_mask"])  # of 5; generate refuses 4's third
    if isinstance(named.get("extra_special_tokens"), list):
        named["additional_special_tokens"] = named.pop("extra_special_tokens")
    if named != settings:
        write_json(path, named)


def misread(rules: Iterable[Rule]) -> str:
    """What transformers 5 would take for something else in an export, if anything.

    It tells the hub's layout of experts from its own by their shape.
    """
    square = [rule.their_name for rule in rules if isinstance(rule, Swapped) and rule.shape[-1] == rule.shape[-2]]
    if not square:
        return ""
    return (
        f"transformers 5, which tells layouts by shape, reads square experts ('{square[0]}') the wrong way round; "
        "transformers 4.57 and nemo_vlm read them right"
    )


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main_dtype(specs: list[TensorSpec]) -> str:
    """The dtype of most parameters; `torch_dtype` is what all versions of transformers read."""
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[str(spec.dtype).removeprefix("torch.")] += spec.num_bytes // spec.dtype.itemsize
    return sizes.most_common(1)[0][0]


def tokenizer_of(source: Source, folder: Path) -> Any:
    """The tokenizer among the files that have been written, if there is one."""
    if not any(name.startswith("tokenizer") for name in source.files):
        return None
    return open_tokenizer(str(folder), str(source))


def special_tokens(tokenizer: Any) -> dict[str, int]:
    kinds = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {kind: getattr(tokenizer, kind) for kind in kinds if getattr(tokenizer, kind) is not None}


def with_special_tokens(config: dict[str, Any], tokenizer: Any, generation: Path) -> dict[str, Any]:
    """config.json with the ids that LlamaConfig would otherwise assume: the tokenizer's, else those of generation."""
    found: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        found |= special_tokens(tokenizer)
    elif generation.exists():
        found |= {key: value for key, value in json.loads(generation.read_text()).items() if key in found}
    if "text_config" in config:
        return config | {"text_config": config["text_config"] | found}
    return config | found


def check_tokenizer(tokenizer: Any, model: Any, source: Source) -> None:
    """Raises ConfigError where the tokenizer is another model's."""
    try:
        family(source.family, "processor").settle(model, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def has_template(folder: Path, tokenizer: Any, multimodal: bool) -> bool:
    """Whether the source brings a chat template that will do: with images, one that knows where they go."""
    if not multimodal:
        return tokenizer.chat_template is not None
    for name in TEMPLATES:
        if (folder / name).exists():
            if "image" in (folder / name).read_text():
                return True
            log.warning("%s: has no place for images; it is replaced by that of model.data.conv_template", name)
    return False
