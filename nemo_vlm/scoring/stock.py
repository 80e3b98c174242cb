"""The --config of an unmodified VLMEvalKit: which of its own classes opens an export, and its datasets'."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from nemo_vlm.errors import ConfigError
from nemo_vlm.scoring import adapter
from nemo_vlm.scoring.vlmevalkit import Evaluation, load_run, subject
from nemo_vlm.sources.opening import open_source

STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLChat", {"do_sample": False}),
    "qwen3_vl": ("Qwen3VLChat", {"temperature": 0.0}),
}
LIMITS = ("min_pixels", "max_pixels", "video_total_pixels")
LACKS = (
    "stock VLMEvalKit cannot open this export: its LLaVA reads another format, and LLaVA_Next calls its processor as "
    f"transformers 4 did; this config names {adapter.NAME}, for scripts/evaluate_vlm.py --vlmevalkit {{}} --config FILE"
)


def print_config(asked: Evaluation) -> None:
    """Write the JSON to stdout, and nothing else there.

    Raises:
        ConfigError: as evaluate.
    """
    if asked.config is not None:
        raise ConfigError(f"--config={asked.config}: --print-config writes one; leave it out")
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        name, datasets = subject(asked)
        load_run(asked.vlmevalkit)
        found = {"model": {name: of_model(asked)}, "data": of_data(datasets)}
    sys.stdout.write(f"{json.dumps(found, indent=4)}\n")


def of_model(asked: Evaluation) -> dict[str, Any]:
    """A class of VLMEvalKit's and its arguments, greedy.

    Such a class sizes images by its own limits, whatever the export's processor says, unless it is given others; those
    of the images that are given here are then a video's frames' too.

    Raises:
        ConfigError: it has one, which takes the weights as they are stored, and another precision is asked for.
    """
    path = asked.export()
    source = open_source(path, "--model")
    family = source.family
    common = {"model_path": str(path), "max_new_tokens": asked.max_new_tokens}
    if family != "llava" and asked.precision != "auto":
        raise ConfigError(f"--precision={asked.precision}: VLMEvalKit's class takes the weights as they are; auto")
    if family in STOCK:
        name, greedy = STOCK[family]
        chosen = source.model.media_choices(source.settings["data"])
        limits = {"total_pixels" if "video" in key else key: chosen[key] for key in LIMITS}
        return {"class": name, **common, **limits, **greedy, "use_vllm": False}
    sys.stderr.write(f"{LACKS.format(asked.vlmevalkit)}\n")
    return {"class": adapter.NAME, **common, "dtype": asked.precision}


def of_data(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Each dataset's class; of one that VLMEvalKit does not know, by the columns of a TSV of one's own.

    Raises:
        ConfigError: there is no such TSV; or it is of videos, of which VLMEvalKit has names that say how many frames.
    """
    from vlmeval import dataset
    from vlmeval.dataset.video_dataset_config import supported_video_datasets

    found: dict[str, dict[str, str]] = {}
    for name in names:
        if name in supported_video_datasets:
            found[name] = {}
            continue
        known = (kind for kind in dataset.DATASET_CLASSES if name in kind.supported_datasets())
        kind = next(known, None) or type(dataset.build_dataset(name))
        if kind is type(None):
            raise ConfigError(f"--data={name}: neither VLMEvalKit's nor a TSV in $LMUData with questions")
        if kind.MODALITY == "VIDEO":
            alike = ", ".join(difflib.get_close_matches(name, supported_video_datasets, 3, 0.3))
            raise ConfigError(f"--data={name}: does not say how many frames of a video; {alike} do")
        found[name] = {"class": kind.__name__, "dataset": name}
    return found
