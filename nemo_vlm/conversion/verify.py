"""Is the converted model the same model? Hugging Face's and ours answer the same prompts in fp32, and are compared."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import torch
from torch import Tensor, nn

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG, Batch, Sample, collate
from nemo_vlm.conversion.huggingface import misread
from nemo_vlm.conversion.stream import Cast, runs
from nemo_vlm.data.media import Frames
from nemo_vlm.data.tokenizer import open_tokenizer
from nemo_vlm.errors import ConfigError, Failure, RunError
from nemo_vlm.formats.reader import Reader
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.formats.store import Folder
from nemo_vlm.mapping import Theirs
from nemo_vlm.models.base import family
from nemo_vlm.sources.huggingface import open_weights
from nemo_vlm.sources.source import Source

log = logging.getLogger(__name__)

# Of the largest logit: sums of fp32 in another order differ by 1e-6 to 1e-5 of it, a wrong weight by more than this.
TOLERANCE = 1e-4
ROOM = 1.25  # memory for the parameters in fp32, and for what is computed with them
QUESTION = "What is in the picture, and why?"
TEXT, IMAGE, VIDEO = "a text prompt", "a prompt with an image", "a prompt with a video"
PROMPT_TOKENS = 8192  # more than any of them has
FRAMES = 4  # of that video: the least that processors take


@dataclass(frozen=True)
class Prompt:
    """What both models are asked."""

    called: str
    batch: Batch


def check_tensors(source: Reader, made: Reader, dtype: torch.dtype | None) -> None:
    """Whether what was written reads back as what was to be written, those tensors included that no prompt needs.

    Args:
        dtype: of the conversion.
    Raises:
        RunError: one does not.
    """
    wanted = Cast(source, dtype)
    for name in sorted(wanted.names()):
        if not same_tensor(wanted, made, name):
            raise RunError(Failure(f"verification failed: {made}: the tensor '{name}' is not that of {source}"))


def same_tensor(one: Reader, other: Reader, name: str) -> bool:
    """Whether two readers have the same, part by part: the experts of a layer may be gigabytes."""
    spec, found = (TensorSpec(name, reader.shape(name), reader.dtype(name)) for reader in (one, other))
    return spec == found and all(same_bits(one.read(name, part), other.read(name, part)) for part in runs(spec))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaNs included."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def verify(ours: Source, theirs: Path | None, dtype: torch.dtype | None) -> None:
    """Compare a model of ours with Hugging Face's, both rounded to the dtype of what was converted.

    Args:
        theirs: Hugging Face's directory; None: our tensors under Hugging Face's names.
    Raises:
        RunError: they are not the same.
    """
    if reason := left_out(ours, theirs):
        log.warning("the models are not run to compare them: %s", reason)
        return
    tokenizer = tokenizer_of(ours)
    prompts = make_prompts(ours, tokenizer)
    expected = their_logits(ours, theirs, prompts, dtype)
    found = our_logits(ours, prompts, dtype)
    wrong = [
        prompt.called
        for prompt, one, other in zip(prompts, expected, found, strict=True)
        if not compare(prompt.called, one, other, tokenizer)
    ]
    if wrong:
        raise RunError(
            Failure(f"verification failed on {' and '.join(wrong)}: the models differ; the output was not put in place")
        )


def left_out(source: Source, theirs: Path | None) -> str:
    """Why the models cannot be run here, if so.

    Raises:
        ConfigError: Megatron-Core is not installed.
    """
    if importlib.util.find_spec("megatron") is None:
        raise ConfigError("verification runs the model on Megatron-Core, which is not installed; add --no-verify")
    mapping = family(source.family, "mapping")
    parameters = sum(torch.Size(source.reader.shape(name)).numel() for name in source.reader.names())
    copies = 2 if theirs is None else 1  # the tensors for transformers, and its model
    needed, free = int(ROOM * 4 * copies * parameters), available_memory()
    if needed > free:
        return f"{parameters:,} parameters in fp32 need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    try:
        mapping.hf_config(source.model)
    except ConfigError as error:  # it has no place for the model, of which a .nemo can be made all the same
        return str(error)
    return misread(mapping.rules(source.model))


def available_memory() -> int:
    """Bytes, of the GPU where one is used."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


def tokenizer_of(source: Source) -> Any:
    """None where there is none, or none that trains."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(ConfigError):
        if source.tokenizer:
            return open_tokenizer(str(source.save_files(Path(scratch))), str(source))
    return None


def make_prompts(source: Source, tokenizer: Any) -> list[Prompt]:
    """A text, and of noise an image and a video where the model sees them; random tokens where there is no tokenizer.

    A model that sees a video as a row of images, without a processor for videos, is shown none.
    """
    parts, settings = family(source.family, "processor"), source.settings
    files = parts.hf_processor(settings["model"], settings["data"])
    kinds = [TEXT] + [IMAGE] * bool(files) + [VIDEO] * any("video" in name for name in files)
    if tokenizer is None:
        drawn = family(source.family, "tiny").samples(settings["model"], 4, torch.Generator().manual_seed(0))
        samples = {kind_of(sample): sample for sample in reversed(drawn)}
    else:
        roomy = replace(settings["model"], encoder_seq_length=PROMPT_TOKENS)  # the samples' limit may be less
        processor = parts.Processor(parts.settle(roomy, tokenizer), settings["data"], tokenizer)
        with tempfile.TemporaryDirectory() as scratch:
            samples = {kind: processor.prompt(record(kind, noise(Path(scratch)))) for kind in kinds}
    return [Prompt(kind, batch_of(samples[kind])) for kind in kinds]


def kind_of(sample: Sample) -> str:
    """By its views; a video has more than one patch in time."""
    if not len(sample.images):
        return TEXT
    return VIDEO if any(time > 1 for time, _, _ in sample.images.grids) else IMAGE


def record(kind: str, pictures: tuple[Path, ...]) -> dict[str, Any]:
    """What is asked, of a picture or of a video of some."""
    tag = {TEXT: "", IMAGE: f"{IMAGE_TAG}\n", VIDEO: f"{VIDEO_TAG}\n"}[kind]
    shown = {"image": [pictures[0]] * (kind == IMAGE), "video": [Frames(pictures, fps=2.0)] * (kind == VIDEO)}
    return {"id": "verification", **shown, "conversations": [{"from": "human", "value": tag + QUESTION}]}


def noise(folder: Path) -> tuple[Path, ...]:
    """PNGs that are wider than high, as many as the video has frames."""
    files = tuple(folder / f"{number}.png" for number in range(FRAMES))
    drawn = numpy.random.default_rng(0).integers(0, 256, (FRAMES, 48, 64, 3), dtype=numpy.uint8)
    for file, pixels in zip(files, drawn, strict=True):
        PIL.Image.fromarray(pixels).save(file)
    return files


def batch_of(sample: Sample) -> Batch:
    return collate([Sample(sample.tokens, torch.zeros_like(sample.tokens), sample.images)])


@torch.no_grad()
def their_logits(source: Source, folder: Path | None, prompts: list[Prompt], dtype: torch.dtype | None) -> list[Tensor]:
    """[s, v] of each prompt, by stock transformers.

    Raises:
        RunError: it misses tensors, or does not know some.
    """
    # Other kernels than ours
    model, tiny = stock_model(source, folder, "float32", "eager"), family(source.family, "tiny")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounded(model, dtype).to(device)
    return [
        model(**tiny.hf_inputs(source.model, prompt.batch.to(device))).logits[0].float().cpu() for prompt in prompts
    ]


def stock_model(source: Source, folder: Path | None, dtype: str, attention: str, devices: str | None = None) -> Any:
    """The model of transformers' class, for inference.

    Args:
        folder: Hugging Face's directory with the weights; None: the source's own are taken.
        dtype: torch's name of one, or auto: as the folder's config.json says.
        attention: transformers' attn_implementation.
        devices: its device_map; None: the CPU.
    Raises:
        RunError: it misses tensors, or does not know some.
    """
    import transformers

    model_class = getattr(transformers, family(source.family, "mapping").hf_config(source.model)["architectures"][0])
    transformers.utils.logging.disable_progress_bar()
    model, info = model_class.from_pretrained(
        dtype=dtype,
        attn_implementation=attention,
        device_map=devices,
        output_loading_info=True,
        **reading(source, folder, model_class.config_class),
    )
    found = {kind: info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")}
    if lost := [f"{len(names)} {kind}, as {sorted(names)[0]}" for kind, names in found.items() if names]:
        version = transformers.__version__
        raise RunError(Failure(f"{folder or source}: to transformers {version} tensors are {'; '.join(lost)}"))
    return model.eval()


def reading(source: Source, folder: Path | None, config_class: Any) -> dict[str, Any]:
    """How transformers gets the weights: by itself, but pickles through our reader, which executes nothing."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if folder is not None and any(folder.glob("*.safetensors")):
        return {"pretrained_model_name_or_path": folder, "use_safetensors": True, **local}
    weights: Reader
    if folder is None:
        mapping = family(source.family, "mapping")
        weights = Theirs(mapping.rules(source.model), source.reader)
        config = config_class.from_dict(mapping.hf_config(source.model))
    else:
        weights, config = open_weights(Folder(folder)), config_class.from_pretrained(folder, **local)
    tensors = {name: weights.read(name) for name in weights.names()}
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}


@torch.no_grad()
def our_logits(source: Source, prompts: list[Prompt], dtype: torch.dtype | None) -> list[Tensor]:
    """[s, v] of each prompt, by the model that is trained here, in one process."""
    from nemo_vlm.inference.restore import build, megatron_groups, process_group
    from nemo_vlm.layout import one_process

    config = source.model
    layout = one_process(config)
    with process_group(layout), megatron_groups(layout):
        model = rounded(build(source, config, "32", layout), dtype).eval()
        device, width = next(model.parameters()).device, config.vocab_size
        return [model(prompt.batch.to(device))[0, :, :width].float().cpu() for prompt in prompts]


def rounded(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model with its weights as they are in that dtype."""
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.to(dtype))
    return model


def compare(called: str, expected: Tensor, found: Tensor, tokenizer: Any) -> bool:
    """Say how far two [s, v] logits are apart, and whether they are the same but for rounding."""
    difference = float((expected - found).abs().max())
    same = difference <= TOLERANCE * float(expected.abs().max())  # never true of NaN
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).max())
    tops = [int(logits[-1].argmax()) for logits in (expected, found)]
    names = [str(top) if tokenizer is None else f"{top} {tokenizer.decode([top])!r}" for top in tops]
    log.info(
        "%s: largest logit difference %.2e, KL divergence %.2e, top token %s (transformers), %s (nemo_vlm)",
        called,
        difference,
        divergence,
        *names,
    )
    return same
