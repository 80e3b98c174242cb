"""Hugging Face -> .nemo -> Hugging Face: bit-equal, verified, whole or not at all, understood by stock transformers."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_hf import make_qwen
from transformers import AutoModelForImageTextToText, AutoProcessor

from nemo_vlm.archive import Archive
from nemo_vlm.config import DataConfig, TokenizerConfig
from nemo_vlm.conversion.convert import Target, to_huggingface, to_nemo
from nemo_vlm.conversion.jobs import Run, export_huggingface, import_huggingface, with_tower
from nemo_vlm.conversion.settings import merged, with_settings
from nemo_vlm.data import digits
from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import partial_of
from nemo_vlm.formats import safetensors
from nemo_vlm.formats.reader import InMemory, chosen
from nemo_vlm.formats.store import Folder
from nemo_vlm.models.base import family
from nemo_vlm.models.images import unpatchify
from nemo_vlm.models.llava.config import Config as LlavaConfig
from nemo_vlm.script import run_command
from nemo_vlm.sources.huggingface import companions
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source
from nemo_vlm.sources.tokenizers import load_tokenizer
from nemo_vlm.typed import plain, plain_defaults, read

SCRIPTS = Path(__file__).parents[1] / "scripts"
UNVERIFIED, VERIFIED = Run("auto", "cpu", False), Run("auto", "cpu", True)
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 307,
}
TOWER = {
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": 28,
    "patch_size": 7,
}
TEXTS = ["USER: What is in the picture? ASSISTANT: A red square. A chat between a curious user and an assistant."]


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def make_llama(folder: Path, **settings) -> Path:
    drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | settings))).save_pretrained(folder)
    return folder


def make_llava(folder: Path, kind: str = "clip", **llava) -> Path:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(folder)
    towers = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}
    config = transformers.LlavaConfig(
        vision_config=towers[kind](**TOWER),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default" if kind == "clip" else "full",
        **llava,
    )
    drawn(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def with_hub_names(folder: Path) -> Path:
    """As the LLaVAs on the hub were written, by transformers 4."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}
    save_file(renamed, file, {"format": "pt"})
    return folder


MODELS = {
    "llama": make_llama,
    "llama_tied": lambda folder: make_llama(folder, tie_word_embeddings=True),
    "qwen2": make_qwen,
    "qwen3": lambda folder: make_qwen(folder, "qwen3"),
    "clip": make_llava,
    "siglip": lambda folder: make_llava(folder, "siglip"),
    "clip_hub": lambda folder: with_hub_names(make_llava(folder)),
    "siglip_hub": lambda folder: with_hub_names(make_llava(folder, "siglip")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def archive(models, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "clip.nemo"
    import_huggingface(open_source(models["clip"], "input"), path, UNVERIFIED)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def there_and_back(folder: Path, scratch: Path, run: Run = UNVERIFIED) -> Path:
    import_huggingface(open_source(folder, "input"), scratch / "x.nemo", run)
    export_huggingface(open_source(scratch / "x.nemo", "input"), scratch / "back", run)
    return scratch / "back"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("limit", [5 * 10**9, 50_000], ids=["one file", "shards"])
def test_there_and_back_is_bit_equal(name: str, limit: int, models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_SHARD_BYTES", limit)
    back = there_and_back(models[name], tmp_path)
    assert same(weights(models[name]), weights(back))
    assert (back / "model.safetensors.index.json").exists() == (limit < 10**9)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("x.nemo", "back")] == []


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "clip", "siglip_hub"])
def test_stock_transformers_gives_the_same_logits(name: str, models, tmp_path: Path) -> None:
    back = there_and_back(models[name], tmp_path)
    sees = name not in ("llama", "llama_tied", "qwen2", "qwen3")
    auto = AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    inputs = {"input_ids": torch.randint(5, 250, (1, 12), generator=torch.Generator().manual_seed(1))}
    if sees:
        image = torch.full((1, 16), 4)
        inputs = {"input_ids": torch.cat([inputs["input_ids"], image], 1), "pixel_values": torch.randn(1, 3, 28, 28)}
    logits = []
    for folder in (models[name], back):
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert model.dtype is torch.float32
        logits.append(model(**inputs).logits)
    assert torch.equal(*logits)


def test_config_has_what_llama_config_would_assume(models, archive: Path, tmp_path: Path) -> None:
    export_huggingface(open_source(archive, "input"), tmp_path / "back", UNVERIFIED)
    text = transformers.AutoConfig.from_pretrained(tmp_path / "back").text_config
    original = transformers.AutoConfig.from_pretrained(models["clip"]).text_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = (text.bos_token_id, text.eos_token_id, text.pad_token_id)
    assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    changed = ("bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype")
    assert {key: value for key, value in text.to_dict().items() if key not in changed} == {
        key: value for key, value in original.to_dict().items() if key not in changed
    }
    assert "<image>" in tokenizer.get_vocab()


def test_a_qwens_export_is_what_the_hub_has(models, tmp_path: Path) -> None:
    """Tokenizer files and chat template as they were; config.json in transformers 4's form with Qwen2's fields."""
    back = there_and_back(models["qwen2"], tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (models["qwen2"] / name).read_bytes()
    mine, theirs = (json.loads((path / "tokenizer_config.json").read_text()) for path in (back, models["qwen2"]))
    # 4.57's name for them; under the other it wants a mapping
    assert mine.pop("additional_special_tokens") == theirs.pop("extra_special_tokens") and mine == theirs
    config = json.loads((back / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "lm_head.weight" not in weights(back)
    assert (config["use_sliding_window"], config["max_window_layers"], config["torch_dtype"]) == (False, 3, "float32")
    assert (config["rope_theta"], config["tie_word_embeddings"], "head_dim" in config) == (1e6, True, False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    assert config["vocab_size"] == len(tokenizer) + 17  # rows beyond the tokenizer stay
    assert config["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_generation_config_is_kept_without_tokenizer(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "hf", bos_token_id=7, eos_token_id=[8, 9])
    back = there_and_back(folder, tmp_path)
    config = json.loads((back / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, [8, 9])
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [8, 9]


def test_precision(models, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    make_llama(mixed)
    tensors = {
        name: t if "norm" in name else t.bfloat16() for name, t in load_file(mixed / "model.safetensors").items()
    }
    save_file(tensors, mixed / "model.safetensors", {"format": "pt"})
    assert same(tensors, weights(there_and_back(mixed, tmp_path)))
    import_huggingface(
        open_source(models["llama"], "input"), tmp_path / "half.nemo", replace(UNVERIFIED, precision="bf16")
    )
    half, full = Archive(tmp_path / "half.nemo"), open_source(models["llama"], "input").reader
    assert all(torch.equal(half.read(name), full.read(name).bfloat16()) for name in full.names())
    source = open_source(make_llama(tmp_path / "large"), "input")
    huge = replace(source, reader=Changed(source.reader, "language_model.output_layer.weight", 1e6))
    with pytest.raises(ConfigError, match="values beyond fp16"):
        to_nemo(huge, Target(tmp_path / "y.nemo", torch.float16))
    assert not (tmp_path / "y.nemo").exists()


class Changed:
    """A reader with one tensor multiplied."""

    def __init__(self, reader, name: str, factor: float) -> None:
        self.reader, self.name, self.factor = reader, name, factor
        self.names, self.shape, self.dtype = reader.names, reader.shape, reader.dtype

    def read(self, name: str, slices=()) -> torch.Tensor:
        tensor = self.reader.read(name, slices)
        return tensor * self.factor if name == self.name else tensor


def processors(kind: str, aspect: str, scratch: Path, **data):
    """Ours as it trains, and stock AutoProcessor of the export."""
    source = open_source(make_llava(scratch / "hf", kind), "input")
    source = with_settings(source, {"data": {"image_aspect_ratio": aspect, **data}}, "test")
    to_nemo(source, Target(scratch / "x.nemo"))
    made = open_source(scratch / "x.nemo", "input")
    to_huggingface(made, Target(scratch / "back"))
    settings, parts = made.settings, family("llava", "processor")
    tokenizer = load_tokenizer(replace(settings["tokenizer"], type=str(scratch / "x.nemo")))
    ours = parts.Processor(parts.settle(settings["model"], tokenizer), settings["data"], tokenizer)
    return ours, AutoProcessor.from_pretrained(scratch / "back")


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_stock_processor_makes_the_pixels_of_training(kind: str, aspect: str, tmp_path: Path) -> None:
    ours, theirs = processors(kind, aspect, tmp_path)
    random = numpy.random.default_rng(0)
    for shape in [(28, 28), (64, 48), (31, 97), (200, 53), (9, 8), (29, 28)]:
        path = tmp_path / "image.png"
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=numpy.uint8)).save(path)
        conversation = [{"from": "human", "value": "<image>\nWhat is in the picture?"}]
        sample = ours.prompt({"image": [path], "conversations": conversation})
        content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "What is in the picture?"}]
        found = theirs.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        views = torch.stack(unpatchify(sample.images.normalised()))
        torch.testing.assert_close(found["pixel_values"], views, atol=1e-6, rtol=0)
        assert found["input_ids"][0].tolist() == sample.tokens.tolist()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert model.generate(**found, max_new_tokens=3, do_sample=False).shape[1] > found["input_ids"].shape[1]


@pytest.mark.parametrize("system", [None, "", 'Say "yes"\nor \U0001f600.'])
@pytest.mark.parametrize("template", ["plain", "v1", "v1_fork", "llama_2"])
def test_chat_template_is_the_one_of_training(template: str, system: str | None, tmp_path: Path) -> None:
    ours, theirs = processors("clip", "square", tmp_path, conv_template=template, system_message=system)
    path = tmp_path / "image.png"
    Image.new("RGB", (28, 28)).save(path)
    said = ["What is <image>\nin it?", "A red square.", "And why?", "It's so."][: 2 if template == "plain" else 4]
    record = {
        "image": [path],
        "conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)],
    }
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    sample = ours.sample(record)
    text = theirs.apply_chat_template(messages)
    found = theirs(text=text, images=Image.open(path), return_tensors="pt", add_special_tokens=False)
    assert found["input_ids"][0, :-1].tolist() == sample.tokens.tolist()  # the last token is only a label


def test_a_directory_that_pads_is_known_to_pad(tmp_path: Path) -> None:
    processors("clip", "pad", tmp_path)
    assert open_source(tmp_path / "back", "input").settings["data"].image_aspect_ratio == "pad"


def test_the_demos_model_exports(tmp_path: Path) -> None:
    """conf/model/llava_tiny.yaml with the digits' tokenizer, which adds no BOS: the template must."""
    digits.write(tmp_path / "digits")
    preset = yaml.safe_load((SCRIPTS.parent / "conf/model/llava_tiny.yaml").read_text())
    del preset["defaults"], preset["micro_batch_size"]
    tokenizer = load_tokenizer(TokenizerConfig(str(tmp_path / "digits/tokenizer")))
    parts, data = family("llava", "processor"), {"system_message": ""}
    model = parts.settle(read(LlavaConfig, merged(plain_defaults(LlavaConfig), preset), "model"), tokenizer)
    generator = torch.Generator().manual_seed(0)
    rules = family("llava", "mapping").rules(model)
    tensors = {rule.ours: torch.randn(rule.shape, generator=generator) * 0.1 for rule in rules}
    tree = {"family": "llava", **plain(model), "data": data}
    files = companions(Folder(tmp_path / "digits/tokenizer"))
    export_huggingface(Source(tmp_path / "run", tree, InMemory(tensors), files), tmp_path / "out", VERIFIED)

    saved = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4.57 has no TokenizersBackend
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")
    record = json.loads((tmp_path / "digits/heldout.json").read_text())[0]
    record["image"] = [tmp_path / "digits" / record["image"]]
    sample = parts.Processor(model, DataConfig(**data), tokenizer).prompt(record)
    question = record["conversations"][0]["value"].removeprefix("<image>\n")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    found = theirs(text=text, images=Image.open(record["image"][0]), return_tensors="pt")
    assert found["input_ids"][0].tolist() == sample.tokens.tolist()
    views = torch.stack(unpatchify(sample.images.normalised()))
    torch.testing.assert_close(found["pixel_values"], views, atol=1e-6, rtol=0)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert stock.generate(**found, max_new_tokens=3).shape[1] > len(sample.tokens)


def test_verification_passes_what_is_right(models, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    there_and_back(models["clip"], tmp_path, VERIFIED)
    said = [message for message in caplog.messages if "logit difference" in message]
    assert len(said) == 4 and all("transformers" in message for message in said)
    there_and_back(models["llama"], tmp_path / "b", replace(VERIFIED, precision="bf16"))  # without tokenizer, rounded


def exit_code(function) -> int:
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_command(function)
    except SystemExit as error:
        return error.code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


@pytest.mark.parametrize("name", ["vision_model.class_token", "language_model.decoder.layers.1.mlp.linear_fc1.weight"])
def test_verification_catches_a_wrong_weight(name: str, models, archive: Path, tmp_path: Path, capsys) -> None:
    def tampered(path: Path):
        source = open_source(path, "input")
        return replace(source, reader=Changed(source.reader, name, 1.05))

    (tmp_path / "x.nemo").write_text("old")
    assert exit_code(lambda: import_huggingface(tampered(models["clip"]), tmp_path / "x.nemo", VERIFIED)) == 1
    error = capsys.readouterr().err
    assert "verification failed" in error and error.count("\n") == 1
    assert (tmp_path / "x.nemo").read_text() == "old"

    source = tampered(archive)  # its export is wrong, the archive itself is read as it is
    right = open_source(archive, "input")

    def check(folder: Path) -> None:
        from nemo_vlm.conversion.verify import verify

        verify(right, folder, None)

    assert exit_code(lambda: to_huggingface(source, Target(tmp_path / "hf", None, check))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.nemo"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interruption_leaves_what_was_there(error: type, models, archive: Path, tmp_path: Path) -> None:
    class Breaking(Changed):
        def read(self, name: str, slices=()) -> torch.Tensor:
            if name == "language_model.output_layer.weight":
                raise error("stop")
            return super().read(name, slices)

    source = open_source(archive, "input")
    broken = replace(source, reader=Breaking(source.reader, "", 1.0))
    (tmp_path / "x.nemo").write_text("old")
    for write, output in ((to_nemo, tmp_path / "x.nemo"), (to_huggingface, tmp_path / "new")):
        with pytest.raises(error):
            write(broken, Target(output))
    assert (tmp_path / "x.nemo").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.nemo"]


def test_nothing_of_a_user_is_replaced(archive: Path, tmp_path: Path) -> None:
    source = open_source(archive, "input")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="not empty"):
        to_huggingface(source, Target(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="is a directory"):
        to_nemo(source, Target(tmp_path / "mine"))
    partial_of(tmp_path / "out").mkdir()  # of a conversion that was killed
    (tmp_path / "out").mkdir()
    to_huggingface(source, Target(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    with pytest.raises(ConfigError, match="out: is not empty"):
        to_huggingface(source, Target(tmp_path / "out"))
    with pytest.raises(ConfigError, match="is the source itself"):
        to_nemo(source, Target(archive))


def test_a_part_is_not_a_model(archive: Path, models, tmp_path: Path) -> None:
    source = open_source(archive, "input")
    frozen = replace(source, reader=chosen(source.reader, ["language_model.", "vision_projection."]))
    with pytest.raises(ConfigError, match="but no vision_model"):
        to_huggingface(frozen, Target(tmp_path / "out"))
    to_huggingface(with_tower(frozen, str(models["clip"])), Target(tmp_path / "out"))
    assert same(weights(tmp_path / "out"), weights(models["clip"]))
    with pytest.raises(ConfigError, match="trained vision tower"):
        with_tower(source, str(make_other_tower(models["clip"], tmp_path / "other")))


def make_other_tower(folder: Path, other: Path) -> Path:
    other.mkdir()
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    return other


def call(monkeypatch, capsys, script: str, *flags: object) -> tuple[int, str]:
    """A script in this process: exit code and stderr."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # the script may set it; this puts it back
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    code = exit_code(lambda: runpy.run_path(str(SCRIPTS / script), run_name="called")["main"]())
    return code, capsys.readouterr().err


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def changed_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def changed_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


WRONG = {
    "truncated shard": (truncated, "cut short in the tensor|damaged"),
    "missing tensor": (
        lambda f: changed_tensors(f, lambda t: t.pop("model.norm.weight")),
        "tensors are missing: model.norm.weight",
    ),
    "wrong shape": (
        lambda f: changed_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        r"'model.norm.weight' has shape \(3,\), the configuration needs \(48,\)",
    ),
    "left over": (
        lambda f: changed_tensors(f, lambda t: t.update({"extra": torch.zeros(3)})),
        "no place for these tensors: extra",
    ),
    "unknown architecture": (lambda f: changed_config(f, model_type="mamba9"), "model_type=mamba9 is not known"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json: not a configuration"),
    "wrong type": (lambda f: changed_config(f, hidden_size="wide"), "config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_directory_is_one_line(case: str, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = make_llama(tmp_path / "hf")
    flags = ("--input", folder, "--output", tmp_path / "out" / "x.nemo", "--no-verify")
    change, message = WRONG[case]
    change(folder)
    code, error = call(monkeypatch, capsys, "convert_hf_to_nemo.py", *flags)
    assert code == 2 and error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def repacked(archive: Path, output: Path, change) -> Path:
    """The archive's members, changed, under Python's own tarfile."""
    with tarfile.open(archive) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    added = change(members) or []
    with tarfile.open(output, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in added:
            tar.addfile(info, io.BytesIO(b"bad"[: info.size]))
    return output


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 3 if kind == tarfile.REGTYPE else 0
    return info


def yaml_tag(members: dict[str, bytes]) -> None:
    members["model_config.yaml"] += b"bomb: !!python/object/apply:os.system ['touch executed']\n"


def cut_weights(members: dict[str, bytes]) -> None:
    members["model_weights/model.safetensors"] = members["model_weights/model.safetensors"][:-64]


def unknown_family(members: dict[str, bytes]) -> None:
    members["model_config.yaml"] = members["model_config.yaml"].replace(b"family: llava", b"family: lava")


WRONG_ARCHIVES = {
    "outside": (lambda m: [member("../../x")], "refuses the member"),
    "absolute": (lambda m: [member("/tmp/x")], "refuses the member"),
    "link": (lambda m: [member("tokenizer/link", tarfile.SYMTYPE, "/etc/passwd")], "refuses the member"),
    "hard link": (lambda m: [member("tokenizer/link", tarfile.LNKTYPE, "model_config.yaml")], "refuses the member"),
    "device": (lambda m: [member("tokenizer/device", tarfile.CHRTYPE)], "refuses the member"),
    "yaml tag": (yaml_tag, "not plain YAML"),
    "truncated shard": (cut_weights, "cut short in the tensor"),
    "unknown family": (unknown_family, "lava"),
}


@pytest.mark.parametrize("case", WRONG_ARCHIVES)
def test_a_wrong_archive_is_one_line(case: str, archive: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--output", tmp_path / "out", "--no-verify")
    valid = repacked(archive, tmp_path / "valid.nemo", lambda members: None)
    assert call(monkeypatch, capsys, "convert_nemo_to_hf.py", "--input", valid, *flags) == (0, "")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    change, message = WRONG_ARCHIVES[case]
    wrong = repacked(archive, tmp_path / "wrong.nemo", change)
    again = ("--output", tmp_path / "again", "--no-verify")
    code, error = call(monkeypatch, capsys, "convert_nemo_to_hf.py", "--input", wrong, *again)
    assert code == 2 and error.count("\n") == 1 and message in error, error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "valid.nemo", "wrong.nemo"]


def test_nemos_flags(models, archive: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def convert(script: str, *flags: object) -> tuple[int, str]:
        return call(monkeypatch, capsys, script, *flags, "--no-verify")

    hparams = tmp_path / "hparams.yaml"
    hparams.write_text("model: {encoder_seq_length: 64, hidden_size: 48}\n")
    llama = ("--input_name_or_path", models["llama"], "--output_path", tmp_path / "a.nemo", "--hparams_file", hparams)
    assert convert("convert_llama_hf_to_nemo.py", *llama, "--precision", "bf16-mixed") == (0, "")
    made = Archive(tmp_path / "a.nemo")
    assert (
        made.config["encoder_seq_length"] == 64 and made.dtype("language_model.output_layer.weight") is torch.bfloat16
    )
    hparams.write_text("hidden_size: 64\n")
    code, error = convert("convert_llama_hf_to_nemo.py", *llama)
    assert code == 2 and "model.hidden_size=64" in error and "48" in error

    llava = ("--input_name_or_path", models["clip"], "--output_path", tmp_path / "b.nemo", "--skip_verification")
    tokenizer = ("--tokenizer_path", models["siglip"], "--conv_template", "plain")
    assert convert("convert_llava_hf_to_nemo.py", *llava, *tokenizer) == (0, "")
    assert Archive(tmp_path / "b.nemo").config["data"]["conv_template"] == "plain"
    code, error = convert("convert_llava_hf_to_nemo.py", *llava, "--conv_template", "vicuna")
    assert code == 2 and "conv_template=vicuna" in error

    export = ("--input_name_or_path", archive, "--input_tokenizer", models["clip"], "--cpu-only")
    types = ("--processor_type", "clip", "--vision_tower_type", "clip", "--vision_encoder_path", models["clip"])
    assert convert("convert_llava_nemo_to_hf.py", *export, *types, "--output_path", tmp_path / "hf") == (0, "")
    assert same(weights(tmp_path / "hf"), weights(models["clip"]))
    code, error = convert("convert_llava_nemo_to_hf.py", *export, "--processor_type", "siglip", "--hf_output_path", "x")
    assert code == 2 and "--processor_type=siglip" in error and "is clip" in error


def test_scripts_start_quickly_and_anywhere(models, tmp_path: Path) -> None:
    """--help imports no torch; a folder `datasets` where one stands does not take the place of a library."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "help.py").write_text(
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = [path, '--help']\n"
        "    try: runpy.run_path(path, run_name='__main__')\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'yaml'} & sys.modules.keys()\n"
    )
    scripts = [str(path) for path in sorted(SCRIPTS.glob("convert_*hf*.py"))]
    assert len(scripts) == 5
    assert subprocess.run([sys.executable, "help.py", *scripts], cwd=tmp_path, capture_output=True).returncode == 0
    command = [sys.executable, str(SCRIPTS / "convert_hf_to_nemo.py"), "--input", str(models["clip"]), "--no-verify"]
    done = subprocess.run([*command, "--output", "x.nemo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "68 tensors" in done.stdout and "MB/s" in done.stdout, done
    wrong = subprocess.run([*command, "--precision", "fp8", "--output", "x"], cwd=tmp_path, capture_output=True)
    assert wrong.returncode == 2 and not os.path.exists(tmp_path / "x")
