"""inspect_nemo and add_special_tokens: what they say is true, what they add is found, and the rest stays as it was."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import run as run_command
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from transformers import AutoTokenizer

from nemo_vlm.archive import TOKENIZER, Archive, self_contained, write_archive
from nemo_vlm.conversion import inspect
from nemo_vlm.conversion.special_tokens import EXTRA, add_special_tokens, resize
from nemo_vlm.conversion.tokenizer_files import read_tokenizer
from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import InMemory, Slices
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.formats.store import Folder
from nemo_vlm.models.base import family
from nemo_vlm.sources.huggingface import companions
from nemo_vlm.sources.opening import open_source
from nemo_vlm.typed import plain

SCRIPTS = Path(__file__).parents[1] / "scripts"
TEXTS = [f"the quick brown fox jumps over {number} lazy dogs, and the picture shows it" for number in range(100)]
OTHERS = ["the fox  jumps", " lazy 東京 dogs\n", "<s> picture </s>", ""]


class Untouched(InMemory):
    """Has tensors, but does not give them."""

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        raise AssertionError(f"{name} was read")


def tensors_of(name: str, config: Any) -> dict[str, Tensor]:
    rules = family(name, "mapping").rules(config)
    generator = torch.Generator().manual_seed(0)
    return {rule.ours: torch.randn(rule.shape, generator=generator).bfloat16() for rule in rules}


def make_archive(path: Path, name: str, config: Any, tokenizer: Path | None = None) -> Path:
    tensors = tensors_of(name, config)
    specs = [TensorSpec(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    tree = self_contained({"family": name, **plain(config)}, tokenizer is not None)
    write_archive(path, tree, {TOKENIZER: tokenizer} if tokenizer else {}, specs, tensors.items())
    return path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A SentencePiece model as Llama's: BPE, bytes for what is unknown."""
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    with open(path, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory, pieces: Path) -> Path:
    """A directory as Vicuna's, without tokenizer.json."""
    folder = tmp_path_factory.mktemp("vicuna")
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    """A directory with a tokenizer.json."""
    folder = tmp_path_factory.mktemp("fast")
    train_tokenizer(TEXTS, 300).save_pretrained(folder)
    return folder


def with_decoder(vicuna: Path, folder: Path) -> Path:
    """A directory as transformers 4 wrote it, with a token beside the SentencePiece model."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((vicuna / "tokenizer.model").read_bytes())
    size = len(AutoTokenizer.from_pretrained(vicuna))
    config = json.loads((vicuna / "tokenizer_config.json").read_text())
    token = {"content": "<image>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
    config["added_tokens_decoder"] = {str(size): token | {"single_word": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": size}))
    return folder


def facts_of(folder: Path):
    return read_tokenizer(companions(Folder(folder)))


def run(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return run_command(str(SCRIPTS / script), *map(str, arguments), cwd=SCRIPTS, ranks=0)


@pytest.mark.parametrize("name", ["gpt", "llava"])
def test_describing_reads_no_tensor(tmp_path: Path, name: str, fast: Path) -> None:
    config = family(name, "tiny").config()
    archive = make_archive(tmp_path / "x.nemo", name, config, fast)
    source, tensors = open_source(archive, "path"), tensors_of(name, config)
    found = inspect.describe(replace(source, reader=Untouched(tensors)))
    assert {key: (tuple(info["shape"]), info["dtype"]) for key, info in found["tensors"].items()} == {
        key: (tuple(tensor.shape), "bfloat16") for key, tensor in tensors.items()
    }
    count = sum(tensor.numel() for tensor in tensors.values())
    assert found["parameters"]["total"] == sum(found["parameters"]["by_part"].values()) == count
    assert found["bytes"] == {"total": 2 * count, "by_dtype": {"bfloat16": 2 * count}}
    tower = [tensor.numel() for key, tensor in tensors.items() if key.startswith("vision_model.")]
    assert found["parameters"]["by_part"].get("vision_model", 0) == sum(tower)
    assert found["configuration"]["num_layers"] == config.num_layers
    assert found["files"]["tokenizer/tokenizer.json"] == (fast / "tokenizer.json").stat().st_size


def test_layers_fold_and_unfold(tmp_path: Path) -> None:
    config = family("llava", "tiny").config()
    found = inspect.describe(open_source(make_archive(tmp_path / "x.nemo", "llava", config), "path"))
    text = inspect.plain_text(inspect.sections(found, every_tensor=False))
    lines = [line.split() for line in text.splitlines()]
    qkv = "language_model.decoder.layers.{}.self_attention.linear_qkv.weight"
    assert [qkv.format("0-3"), "[96,", "48]", "bfloat16", "4"] in lines
    assert text.count("linear_qkv.weight") == 2  # the tower's, too
    whole = inspect.plain_text(inspect.sections(found, every_tensor=True))
    assert all(name in whole for name in found["tensors"])
    assert "hidden_size: 48" in text and "image_size: 32" in text and "Tokenizer" in text
    assert inspect.ranges([5, 0, 2, 1]) == "0-2,5"


@pytest.mark.parametrize("kind", ["vicuna", "fast", "decoder"])
def test_tokenizer_facts_are_transformers(tmp_path: Path, vicuna: Path, fast: Path, kind: str) -> None:
    folder = with_decoder(vicuna, tmp_path / "x") if kind == "decoder" else {"vicuna": vicuna, "fast": fast}[kind]
    theirs, facts = AutoTokenizer.from_pretrained(folder), facts_of(folder)
    assert facts.ids == theirs.get_vocab()
    assert facts.size == len(theirs)
    assert facts.roles["eos_token"] == theirs.eos_token
    assert facts.special["</s>"] == theirs.eos_token_id
    if kind != "vicuna":
        assert facts.special["<image>"] == theirs.convert_tokens_to_ids("<image>")


def test_script_says_it(tmp_path: Path, fast: Path, capsys) -> None:
    archive = make_archive(tmp_path / "x.nemo", "llava", family("llava", "tiny").config(), fast)
    image = facts_of(fast).ids["<image>"]
    done = run("inspect_nemo.py", archive)
    assert done.returncode == 0, done.stderr
    assert ["<image>", str(image)] in [line.split() for line in done.stdout.splitlines()]
    inspect.show(open_source(archive, "path"), every_tensor=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["tokenizer"]["special_tokens"]["<image>"] == image


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.nemo").write_bytes(b"x" * 2000)
    done = run("inspect_nemo.py", tmp_path / "x.nemo")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "x.nemo" in done.stderr


def test_hugging_faces_directory_can_be_inspected(tmp_path: Path, fast: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes))
    model.save_pretrained(tmp_path)
    found = inspect.describe(open_source(tmp_path, "path"))
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert found["tokenizer"] is None and "model.safetensors" in found["files"]
    inspect.sections(found, every_tensor=False)


@pytest.mark.parametrize("tokens", [EXTRA, ["<image>"]])
def test_sentencepiece_model_grows(tmp_path: Path, pieces: Path, tokens: Any) -> None:
    output = tmp_path / "new" / "out.model"
    facts = add_special_tokens(pieces, output, tokens)
    old, new = (SentencePieceProcessor(model_file=str(path)) for path in (pieces, output))
    assert new.vocab_size() == old.vocab_size() + len(tokens) == facts.size
    for text in OTHERS:
        assert new.encode(text) == old.encode(text)
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    for number, token in enumerate(tokens):
        assert new.piece_to_id(token) == facts.special[token] == old.vocab_size() + number
        assert new.encode(f"fox{token}dogs").count(new.piece_to_id(token)) == 1
        assert new.decode(new.encode(f"fox{token}dogs")) == f"fox{token}dogs"


@pytest.mark.parametrize("kind", ["vicuna", "fast", "decoder"])
def test_hugging_face_tokenizer_grows(tmp_path: Path, vicuna: Path, fast: Path, kind: str) -> None:
    folder = with_decoder(vicuna, tmp_path / "x") if kind == "decoder" else {"vicuna": vicuna, "fast": fast}[kind]
    tokens = ["<image>", "<extra_id_0>"]
    facts = add_special_tokens(folder, tmp_path / "out", tokens)
    old, new = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert old.get_vocab().items() <= new.get_vocab().items() == facts.ids.items()
    assert len(new) == len(old) + (2 if kind == "vicuna" else 1)  # the others have <image>
    for text in OTHERS:
        assert new(text)["input_ids"] == old(text)["input_ids"]
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    for token in tokens:
        ids = new(f"fox {token} dogs", add_special_tokens=False)["input_ids"]
        assert ids.count(facts.special[token]) == 1
        assert token in new.decode(ids)
    assert type(new) is type(old) and new.eos_token_id == old.eos_token_id


def test_tokens_that_are_there_are_kept(tmp_path: Path, fast: Path, caplog) -> None:
    caplog.set_level("INFO")
    facts = add_special_tokens(fast, tmp_path / "out", ["<image>"])
    assert facts == facts_of(fast)
    assert "<image>  was there, kept" in caplog.text


def small(name: str, vocab_size: int, **other: Any) -> Any:
    config = family(name, "tiny").config()
    if name == "llava":
        other["mm_cfg"] = replace(config.mm_cfg, image_token_index=None)
    return replace(config, vocab_size=vocab_size, **other)


@pytest.mark.parametrize("name, tied", [("gpt", False), ("gpt", True), ("llava", False)])
def test_archive_grows(tmp_path: Path, vicuna: Path, name: str, tied: bool) -> None:
    size = facts_of(vicuna).size
    config = small(name, size, share_embeddings_and_output_weights=tied)
    archive = make_archive(tmp_path / "x.nemo", name, config, vicuna)
    tokens = ["<image>", "<extra_id_0>"]
    facts = add_special_tokens(vicuna, tmp_path / "tokenizer", tokens)
    resize(open_source(archive, "--resize"), tmp_path / "tokenizer", tmp_path / "y.nemo")
    old, new = Archive(archive), open_source(tmp_path / "y.nemo", "path")
    assert new.model.vocab_size == size + 2 == facts.size
    if name == "llava":
        assert new.model.mm_cfg.image_token_index == facts.ids["<image>"]
    assert read_tokenizer(new.files).ids == facts.ids
    assert new.reader.names() == old.names()
    grown = [key for key in old.names() if new.reader.shape(key) != old.shape(key)]
    assert len(grown) == (1 if tied else 2)
    for key in old.names():
        before, after = old.read(key), new.reader.read(key)
        assert torch.equal(after[: len(before)], before)
        if key in grown:
            torch.testing.assert_close(after[size:].float(), before.float().mean(0).expand(2, -1), rtol=1e-2, atol=1e-4)
            assert torch.equal(
                new.reader.read(key, (slice(size - 1, size + 1), slice(0, 3))), after[size - 1 : size + 1, :3]
            )


def test_archive_with_room_keeps_its_weights(tmp_path: Path, pieces: Path, vicuna: Path) -> None:
    """And takes a SentencePiece model alone."""
    size = facts_of(vicuna).size
    archive = make_archive(tmp_path / "x.nemo", "gpt", small("gpt", size + 64), vicuna)
    add_special_tokens(pieces, tmp_path / "new.model", EXTRA)
    resize(open_source(archive, "--resize"), tmp_path / "new.model", tmp_path / "y.nemo")
    old, new = Archive(archive), open_source(tmp_path / "y.nemo", "path")
    assert all(torch.equal(old.read(key), new.reader.read(key)) for key in old.names())
    assert read_tokenizer(new.files).special["<extra_id_7>"] == size + 7


def test_another_models_tokenizer_is_refused(tmp_path: Path, vicuna: Path, fast: Path) -> None:
    archive = make_archive(tmp_path / "x.nemo", "gpt", small("gpt", facts_of(vicuna).size), vicuna)
    add_special_tokens(fast, tmp_path / "tokenizer", EXTRA)
    with pytest.raises(ConfigError, match="tokenizer: '.*' has the id"):
        resize(open_source(archive, "--resize"), tmp_path / "tokenizer", tmp_path / "y.nemo")
    assert not (tmp_path / "y.nemo").exists()


def test_nothing_else_is_overwritten(tmp_path: Path, fast: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(ConfigError, match="holds other files, as model.safetensors"):
        add_special_tokens(fast, tmp_path, EXTRA)
    (tmp_path / "x.model").write_text("no model")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        add_special_tokens(tmp_path / "x.model", tmp_path / "y.model", EXTRA)
    with pytest.raises(ConfigError, match="neither a SentencePiece model"):
        add_special_tokens(tmp_path / "absent", tmp_path / "y.model", EXTRA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "x.model"]


def test_script_adds_and_resizes(tmp_path: Path, vicuna: Path) -> None:
    """With NeMo's flags and ours."""
    size = facts_of(vicuna).size
    archive = make_archive(tmp_path / "x.nemo", "llava", small("llava", size), vicuna)
    flags = ["--input_file", vicuna, "--output_file", tmp_path / "new", "--is_userdefined", "--tokens", "<image>"]
    done = run("add_special_tokens.py", *flags, "--resize", archive, "--output_archive", tmp_path / "y.nemo")
    assert done.returncode == 0, done.stderr
    assert [str(size), "<image>", "added"] in [line.split() for line in done.stdout.splitlines()]
    assert open_source(tmp_path / "y.nemo", "path").model.mm_cfg.image_token_index == size
    failed = run("add_special_tokens.py", "--input", tmp_path / "absent", "--output", tmp_path / "z")
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
