"""NeMo's LLaVA guide as its commands are typed: Llama and CLIP in, two stages, answers, transformers out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from sentencepiece import SentencePieceTrainer
from test_cli import ROOT, TRAIN, run
from tiny_hf import make_clip, make_llama

from nemo_vlm.archive import Archive
from nemo_vlm.data import digits
from nemo_vlm.sources.opening import open_source

EMBEDDINGS = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
ANSWERS = 6


def typed(*command: str, cwd: Path, **env: str) -> str:
    result = run(*command, cwd=cwd, **env)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guide starts from, tiny: a Llama of Hugging Face, its SentencePiece model, a CLIP tower, LLaVA JSON."""
    folder = tmp_path_factory.mktemp("workflow")
    digits.write(folder / "data")
    turns = [
        turn for record in json.loads((folder / "data/train.json").read_text()) for turn in record["conversations"]
    ]
    texts = sorted({line for turn in turns for line in turn["value"].replace("<image>", "").splitlines() if line})
    with open(folder / "tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter([*texts, "USER: ASSISTANT:"]),
            model_writer=file,
            vocab_size=340,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
    make_llama(folder / "llama", vocab_size=len(tokenizer))
    for left in (folder / "llama").glob("tokenizer*"):
        left.unlink()
    (folder / "llama/tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    make_clip(folder / "clip")
    return folder


def overrides(stage: str, steps: int, **more: str) -> list[str]:
    settings = {
        "model.mm_cfg.llm.from_pretrained": "llama.nemo",
        "model.mm_cfg.vision_encoder.from_pretrained": "clip",
        "model.tokenizer.library": "sentencepiece",
        "model.tokenizer.model": "tokenizer_neva.model",
        "model.data.data_path": "data/train.json",
        "model.data.image_folder": "data",
        "model.data.num_workers": "0",
        "model.encoder_seq_length": "384",
        "model.micro_batch_size": "2",
        "model.global_batch_size": "4",
        "model.optim.sched.warmup_steps": "0",
        "trainer.precision": "32",
        "trainer.max_steps": str(steps),
        "exp_manager.name": stage,
    }
    return [f"{key}={value}" for key, value in (settings | more).items()]


def archive(folder: Path, name: str) -> Archive:
    return Archive(folder / f"nemo_experiments/{name}/checkpoints/{name}.nemo")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Both stages, the second under another layout."""
    scripts = ROOT / "scripts"
    tokens = ("--tokens", "<image>", *(f"<extra_id_{number}>" for number in range(8)))
    files = ("--input", "tokenizer.model", "--output", "tokenizer_neva.model")
    typed(str(scripts / "add_special_tokens.py"), *files, *tokens, cwd=folder)
    typed(
        str(scripts / "convert_llama_hf_to_nemo.py"),
        *("--input_name_or_path", "llama", "--output_path", "llama.nemo", "--precision", "fp32"),
        cwd=folder,
    )
    typed(str(TRAIN), *overrides("stage1", 3), cwd=folder, NEMO_CONFIG="llava_7b_pretrain")
    first = "nemo_experiments/stage1/checkpoints/stage1.nemo"
    more = {
        "model.mm_cfg.pretrain_mm_mlp_adapter": first,
        "model.tensor_model_parallel_size": "2",
        "model.optim.lr": "2e-4",
    }
    typed(str(TRAIN), *overrides("stage2", 3, **more), cwd=folder, NEMO_CONFIG="llava_7b_finetune")
    return folder


def test_the_first_stage_changes_the_projector_alone(trained: Path) -> None:
    stage, language = archive(trained, "stage1"), Archive(trained / "llama.nemo")
    tower = open_source(trained / "clip", "clip").reader
    for name in sorted(stage.names()):
        if name.startswith("language_model."):
            before = language.read(name)
            assert torch.equal(stage.read(name)[: len(before)], before), name  # the vocabulary has grown
            assert (stage.shape(name)[0] > len(before)) == (name in EMBEDDINGS)
        elif name.startswith("vision_model."):
            assert torch.equal(stage.read(name), tower.read(name)), name
    second = archive(trained, "stage2")
    changed = {name.split(".")[0] for name in stage.names() if not torch.equal(stage.read(name), second.read(name))}
    assert changed == {"language_model", "vision_projection"}


def test_answers_equal_those_of_transformers(trained: Path) -> None:
    """After the second stage: our inference on a jsonl against generate on the exported directory, token by token."""
    records = json.loads((trained / "data/heldout.json").read_text())[:ANSWERS]
    lines = [
        {"image": record["image"], "prompt": record["conversations"][0]["value"], "question_id": number}
        for number, record in enumerate(records)
    ]
    (trained / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = "nemo_experiments/stage2/checkpoints/stage2.nemo"
    typed(
        str(ROOT / "examples/neva_inference.py"),
        *(f"neva_model_file={model}", "prompt_file=questions.jsonl", "output_file=answers.jsonl"),
        *("inference.images_base_path=data", "inference.greedy=true", "inference.repetition_penalty=1.0"),
        *("inference.tokens_to_generate=12", "trainer.precision=32"),
        cwd=trained,
        NEMO_CONFIG="llava_7b_inference",
    )
    answers = [json.loads(line) for line in (trained / "answers.jsonl").read_text().splitlines()]
    typed(
        str(ROOT / "scripts/convert_llava_nemo_to_hf.py"),
        *("--input_name_or_path", model, "--hf_output_path", "exported", "--no-verify"),
        cwd=trained,
    )
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(trained / "exported", dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(trained / "exported")
    for record, answer in zip(records, answers, strict=True):
        content = record["conversations"][0]["value"]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(trained / "data" / record["image"]) as image:
            inputs = processor(text=text, images=image, return_tensors="pt")
        made = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer["token_ids"] == made.tolist()
        assert answer["text"].strip() == processor.decode(made, skip_special_tokens=True).strip()
        assert answer["image"] == record["image"]
    assert len({tuple(answer["token_ids"]) for answer in answers}) > 1  # it looks at the images
