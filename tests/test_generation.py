"""From Hugging Face's directory, without a step between: the same logits, the same tokens, the same first loss."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from commands import run
from distributed import run_ranks
from PIL import Image
from test_families import EXPERT_LAYOUTS, LAYOUTS, make_layout, micro_batches, run_of, settle
from test_families import whole as whole_weights
from tiny_hf import make_clip, make_llama, make_llava, make_qwen, make_qwen2_vl, make_qwen3_vl

from nemo_vlm.batch import Sample, collate
from nemo_vlm.config import ParallelConfig, RunConfig, StartConfig
from nemo_vlm.conversion.jobs import Run, export_huggingface, import_huggingface
from nemo_vlm.data.media import Frames
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference import answers, ask, evaluate
from nemo_vlm.inference.generate import Ends, generate
from nemo_vlm.inference.likelihood import log_likelihoods
from nemo_vlm.inference.restore import restore, stored_precision
from nemo_vlm.inference.settings import DecodingConfig, EvaluateConfig, GenerateConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.inference import Forward
from nemo_vlm.mcore.linear import FEW, LARGE, multiply
from nemo_vlm.models.base import family
from nemo_vlm.models.video import Video
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.tokenizers import tokenizer_of
from nemo_vlm.training.build import build_engine

GENERATE = Path(__file__).parents[1] / "examples" / "generate.py"
MODELS = {
    "llama": ("gpt", make_llama),
    "llama_tied": ("gpt", lambda folder: make_llama(folder, tie_word_embeddings=True)),
    "qwen2": ("gpt", make_qwen),
    "qwen3": ("gpt", lambda folder: make_qwen(folder, "qwen3")),
    "llava_odd": ("llava", make_llava),  # 5 heads in the tower, 3 layers
    "llava": ("llava", lambda folder: make_llava(folder, {"num_hidden_layers": 4}, {"num_attention_heads": 4})),
    "qwen2_vl": ("qwen2_vl", make_qwen2_vl),
    "qwen3_vl": ("qwen3_vl", make_qwen3_vl),
    "qwen3_vl_moe": ("qwen3_vl", lambda folder: make_qwen3_vl(folder, moe=True)),
}
NUM_TOKENS = 12
ANSWER = 64  # tokens
TOLERANCE = 1e-4  # of logits, ours to transformers'
SEEDS = {  # of samples whose answers are never a near tie
    "llama": 20,
    "llama_tied": 6,
    "qwen2": 3,
    "qwen3": 9,
    "llava_odd": 0,
    "llava": 10,
    "qwen2_vl": 13,
    "qwen3_vl": 10,
    "qwen3_vl_moe": 1,
}
LAYOUT_OF = {name: LAYOUTS[name] for name in ("tp2", "pp2", "fsdp")} | {"single": (1, ParallelConfig())}
EXPERTS = ("qwen3_vl_moe",)  # models that have them


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Directories, and an archive of each."""
    root = tmp_path_factory.mktemp("models")
    found = {name: make(root / name) for name, (_, make) in MODELS.items()}
    for name in MODELS:
        found[f"{name}.nemo"] = root / f"{name}.nemo"
        import_huggingface(open_source(found[name], "input"), found[f"{name}.nemo"], Run("auto", "cpu", False))
    return found


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """An image that is no square."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=numpy.uint8)
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def media(picture: Path) -> Path:
    """A folder with the image, another one, and the frames of a video."""
    Image.open(picture).resize((90, 60)).save(picture.parent / "b.png")
    (picture.parent / "clip").mkdir()
    for number in range(4):
        Image.open(picture).rotate(90 * number).save(picture.parent / "clip" / f"{number}.png")
    return picture.parent


def theirs(folder: Path, name: str) -> Any:
    cls = transformers.AutoModelForCausalLM if MODELS[name][0] == "gpt" else transformers.AutoModelForImageTextToText
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def samples_of(name: str, run: RunConfig) -> list[Sample]:
    """Of different lengths, one without images; LLaVA's with 1, 2, 1 and 0, the Qwens' with videos too."""
    return family(run.family, "tiny").samples(run.model, 4, torch.Generator().manual_seed(SEEDS[name]))


def asked_of(name: str) -> tuple[int, ...]:
    """The samples that are continued; behind the long video that another one of Qwen2-VL is, transformers 5 errs."""
    return (0, 2, 3) if name == "qwen2_vl" else (0, 1, 2, 3)


def starting_run(name: str, path: Path, parallel: ParallelConfig) -> RunConfig:
    """Training from a checkpoint: its architecture instead of the preset's."""
    kind = MODELS[name][0]
    preset = family(kind, "tiny").config()
    run = replace(run_of(kind, preset, parallel), start=StartConfig(restore_from_path=str(path)))
    run = settle(run)
    return replace(run, step=replace(run.step, micro_batch_size=1, global_batch_size=4))


def results(layout_name: str, models: dict[str, Path]) -> dict[str, tuple[Any, ...]]:
    """On this rank, for each model: logits, which its archive gives too, tokens, passes, loss of the first step."""
    return {name: result(layout_name, name, models) for name in (MODELS if layout_name in LAYOUT_OF else EXPERTS)}


def result(layout_name: str, name: str, models: dict[str, Path]) -> tuple[Any, ...]:
    world_size, parallel = (LAYOUT_OF | EXPERT_LAYOUTS)[layout_name]
    run = starting_run(name, models[name], parallel)
    layout, samples = make_layout(run, world_size), samples_of(name, run)
    groups.initialize(layout, seed=1)
    engine = build_engine(run, layout)
    width = max(len(sample.tokens) for sample in samples)
    pad = layout.tensor if layout.sequence_parallel else 1
    sharded_logits = Forward(engine.updater.modules, run.model.vocab_size)(collate(samples, pad))[:, :width]
    loss = engine.step(micro_batches(layout, samples), lr=0.0).loss
    groups.shut_down()
    if layout.fsdp:
        return sharded_logits, [], {}, loss
    answering = replace(layout, sequence_parallel=False)
    logits, tokens, passes = generated(models[name], answering, samples, asked_of(name))
    torch.testing.assert_close(sharded_logits, logits, rtol=0, atol=TOLERANCE if layout.sequence_parallel else 0)
    with restore(open_source(models[f"{name}.nemo"], "model_path"), "32", answering) as restored:
        assert torch.equal(restored.forward(collate(samples)), logits)
    return logits, tokens, passes, loss


def generated(
    path: Path, layout: Layout, samples: list[Sample], numbers: tuple[int, ...]
) -> tuple[torch.Tensor, list[list[int]], dict[str, list[Any]]]:
    """Logits of the batch, the continuations of those of its rows, and the passes that it took."""
    with restore(open_source(path, "model_path"), "32", layout) as restored:
        logits, asked = restored.forward(collate(samples)), [samples[number] for number in numbers]
        passes = watch(restored.forward.modules[0].model)
        return logits, continued(restored.forward, asked), passes


def continued(forward: Forward, samples: list[Sample]) -> list[list[int]]:
    count = len(samples)
    answers = generate(forward, samples, [ANSWER] * count, DecodingConfig(), Ends(), range(count))
    return [answer.tokens.tolist() for answer in answers]


def watch(model: Any) -> dict[str, list[Any]]:
    """What a stage's parts are given from now on: the tower's views; the width of what the first layer gets; where
    rotary positions have axes, the first of them [b, s].
    """
    seen: dict[str, list[Any]] = {"views": [], "layer": [], "positions": []}
    gpt = model.language_model
    gpt.decoder.layers[0].input_layernorm.register_forward_pre_hook(lambda _, args: seen["layer"].append(len(args[0])))
    if hasattr(model, "vision_model"):
        model.vision_model.register_forward_pre_hook(lambda _, args: seen["views"].append(len(args[0])))
    if gpt.position_embedding_type == "mrope":
        gpt.rotary_pos_emb.register_forward_pre_hook(lambda _, args: seen["positions"].append(args[0][0]))
    return seen


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory) -> dict[str, tuple[Any, ...]]:
    """Of the archives, which are exported for it."""
    root = tmp_path_factory.mktemp("exports")
    for name in MODELS:
        export_huggingface(open_source(models[f"{name}.nemo"], "input"), root / name, Run("auto", "cpu", False))
    return {name: expected_of(name, root / name) for name in MODELS}


@torch.no_grad()
def expected_of(name: str, path: Path) -> tuple[Any, ...]:
    """By transformers: logits, which of them count, tokens, the passes that they should take, loss."""
    run, model = starting_run(name, path, ParallelConfig()), theirs(path, name)
    samples, inputs = samples_of(name, run), family(run.family, "tiny").hf_inputs
    batch, asked = collate(samples), collate([samples[number] for number in asked_of(name)])
    output = model(**inputs(run.model, batch), labels=batch.labels, shift_labels=batch.labels)
    given = padded_left(inputs(run.model, asked), asked.lengths)
    answer = model.generate(
        **given,
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(answer.logits).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 2 * TOLERANCE, f"{name}: a near tie, which proves nothing"
    width = asked.tokens.shape[1]
    passes: dict[str, Any] = {"views": [len(asked.images)] if MODELS[name][0] != "gpt" else []}
    passes["layer"] = [width] + [1] * (ANSWER - 1)
    if "mm_token_type_ids" in given:
        prompt = {key: value for key, value in given.items() if "pixel" not in key}
        passes["first"] = model.model.get_rope_index(**prompt)[0].amax((0, 2)) + 1
    visible = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    return output.logits, visible, answer.sequences[:, width:].tolist(), passes, output.loss.item()


def padded_left(inputs: dict[str, Any], lengths: torch.Tensor) -> dict[str, Any]:
    """Rows [b, s] that are padded on the right as transformers' generate takes them; positions are its own."""
    width = inputs["input_ids"].shape[1]
    moved = {
        key: torch.stack([row.roll(width - length) for row, length in zip(rows, lengths.tolist(), strict=True)])
        for key, rows in inputs.items()
        if key in ("input_ids", "mm_token_type_ids")
    }
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return {key: value for key, value in inputs.items() if key != "position_ids"} | moved | {"attention_mask": mask}


@pytest.mark.parametrize("layout", [*LAYOUT_OF, "ep2", "etp2", "tp2_ep2"])
def test_every_layout_reads_hugging_face(layout: str, models, expected) -> None:
    """Prompts of several lengths, with none to three images and videos, in one batch."""
    world_size = (LAYOUT_OF | EXPERT_LAYOUTS)[layout][0]
    for rank, found in enumerate(run_ranks(results, world_size, layout, models)):  # every rank has all of it
        for name, (logits, tokens, passes, loss) in found.items():
            their_logits, visible, their_tokens, their_passes, their_loss = expected[name]
            assert (logits - their_logits)[visible].abs().max() <= TOLERANCE, name
            assert torch.equal(logits.argmax(-1)[visible], their_logits.argmax(-1)[visible])
            assert loss == pytest.approx(their_loss, rel=1e-5), name
            if layout != "fsdp":
                assert tokens == their_tokens, name
                check_passes(passes, their_passes, has_tower=not (layout == "pp2" and rank))


def check_passes(found: dict[str, list[Any]], expected: dict[str, Any], has_tower: bool) -> None:
    """Images and videos are encoded once and prompts are read once; then each pass is of one token a row."""
    assert found["views"] == (expected["views"] if has_tower else [])
    assert found["layer"] == expected["layer"]
    if "first" in expected:
        _, *steps = found["positions"]
        assert torch.equal(torch.cat(steps, 1), expected["first"][:, None] + torch.arange(ANSWER - 1))


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_batch_is_answered_as_one_by_one(name: str, models, expected) -> None:
    """From an archive; and both as by transformers, whose batch is padded on the left."""
    samples = samples_of(name, starting_run(name, models[name], ParallelConfig()))
    with restore(open_source(models[f"{name}.nemo"], "model_path"), "32") as restored:
        alone = [continued(restored.forward, [samples[number]])[0] for number in asked_of(name)]
    assert alone == expected[name][2]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl_moe"])
def test_behind_images_and_videos_a_cache_counts_on(name: str, models) -> None:
    """Of all samples, the long video too, some done before others: answers and likelihoods as without a cache."""
    with restore(open_source(models[name], "model_path"), "32") as restored:
        samples = samples_of(name, starting_run(name, models[name], ParallelConfig()))
        found = generate(restored.forward, samples, [6, 2, 4, 6], DecodingConfig(), Ends(), range(4))
        options = [[answer.tokens[:4], answer.tokens.flip(0)] for answer in found]
        likely = log_likelihoods(restored.forward, samples, options)
        for sample, answer, given, scores in zip(samples, found, options, likely, strict=True):
            assert torch.equal(uncached(restored.forward, sample, answer.tokens).argmax(-1), answer.tokens)
            for option, score in zip(given, scores, strict=True):
                logprobs = uncached(restored.forward, sample, option).double().log_softmax(-1)
                torch.testing.assert_close(score, logprobs.gather(1, option[:, None]).sum(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_a_large_weight_is_multiplied_from_the_side_that_pays(tokens: int) -> None:
    hidden, weight = torch.randn(1, tokens, 1024), torch.randn(LARGE // 1024, 1024)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        product = multiply(hidden, weight)
    (shapes,) = [event.input_shapes for event in seen.events() if event.name == "aten::mm"]
    assert shapes[0] == ([1024, 1024] if tokens in FEW else [tokens, 1024])
    assert product.is_contiguous()
    torch.testing.assert_close(product, hidden @ weight.t(), rtol=0, atol=1e-3)


def uncached(forward: Forward, sample: Sample, answer: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocab_size] of each token of an answer [n], from the whole of it at once."""
    whole = torch.cat([sample.tokens, answer])
    logits = forward(collate([replace(sample, tokens=whole, labels=whole[:0])]))
    return logits[0, len(sample.tokens) - 1 : -1]


def test_what_is_given_by_hand_may_not_contradict(models) -> None:
    run = run_of("llava", family("llava", "tiny").config())
    run = replace(run, start=StartConfig(restore_from_path=str(models["llava_odd"])))
    with pytest.raises(ConfigError, match=r"^model.num_layers=4: .*llava_odd has 3$"):
        settle(run, {"model.num_layers"})
    assert settle(run).model.num_layers == 3


@pytest.mark.parametrize("whole", [False, True], ids=["tower", "whole CLIP"])
def test_modules_come_from_several_checkpoints(whole: bool, models, tmp_path: Path) -> None:
    tower, llm = make_clip(tmp_path / "clip", whole), models["llama"]
    config = family("llava", "tiny").config()
    vision = replace(config.mm_cfg.vision_encoder, from_pretrained=str(tower))
    pretrained = replace(config.mm_cfg, vision_encoder=vision, llm=replace(config.mm_cfg.llm, from_pretrained=str(llm)))
    run = settle(run_of("llava", replace(config, mm_cfg=pretrained)))
    assert run.model.vocab_size == 307
    assert run.model.mm_cfg.vision_encoder.num_attention_heads == 5
    found = run_ranks(initial_weights, 1, run)[0]
    for path, part in ((llm, "language_model."), (tower, "vision_model.")):
        reader = open_source(path, "input").reader
        assert reader.names() == {name for name in found if name.startswith(part)}
        assert all(torch.equal(found[name], reader.read(name)) for name in reader.names())


def initial_weights(run: RunConfig) -> dict[str, torch.Tensor]:
    layout = make_layout(run, 1)
    groups.initialize(layout, seed=1)
    found = whole_weights(build_engine(run, layout).parts())
    groups.shut_down()
    return found


QUESTION = "USER: <image>\nWhat is in the picture? ASSISTANT:"
MESSAGES = [{"role": "user", "content": "<image>\nWhat is in the picture?"}]


def lines(picture: Path) -> list[dict[str, Any]]:
    return [
        {"prompt": QUESTION, "image": picture.name, "id": 7},
        {"messages": MESSAGES, "images": [picture.name]},
        {"prompt": "USER: Two: <image><image> which? ASSISTANT:", "images": [picture.name, picture.name]},
        {"prompt": "USER: Who are you? ASSISTANT:"},
    ]


def test_the_command_answers_as_transformers(models, picture: Path) -> None:
    """With the directory's own processor: the same prompt tokens, and the same answers, EOS included."""
    processor = transformers.LlavaProcessor.from_pretrained(models["llava"])
    model = theirs(models["llava"], "llava")
    questions, output = picture.parent / "in.jsonl", picture.parent / "answers" / "out.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines(picture)))
    done = run(
        str(GENERATE),
        f"model_path={models['llava']}.nemo",
        f"prompt_file={questions}",
        f"output_file={output}",
        f"inference.tokens_to_generate={NUM_TOKENS}",
        "parallel=tp2",
        cwd=picture.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    for line, given in zip(answered, lines(picture), strict=True):
        text = given.get("prompt", QUESTION)
        images = [Image.open(picture)] * text.count("<image>") or None
        inputs = processor(text=text, images=images, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0]
        start = inputs["input_ids"].shape[1]
        assert line["prompt_token_ids"] == inputs["input_ids"][0].tolist()
        assert line["token_ids"] == tokens[start:].tolist()
        assert line["text"] == processor.tokenizer.decode(tokens[start:], skip_special_tokens=True)
        assert {key: line[key] for key in given} == given


PAD = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
PARTS = [{"type": "image", "image": "noise.png"}, {"type": "text", "text": "Or"}, {"type": "image", "image": "b.png"}]
LISTED = {"type": "video", "video": [f"clip/{number}.png" for number in range(4)]}
QWEN_LINES: dict[str, tuple[dict[str, Any], list[str]]] = {  # and the files in the order of the text
    "parts": ({"messages": [{"role": "user", "content": PARTS}]}, ["noise.png", "b.png"]),
    "pads": ({"prompt": f"A {PAD['image']} b <image>", "images": ["noise.png", "b.png"]}, ["noise.png", "b.png"]),
    "frames": ({"messages": [{"role": "user", "content": "<video>\nWhat?"}], "video": "clip"}, ["clip"]),
    "listed": ({"messages": [{"role": "user", "content": [LISTED, {"type": "text", "text": "What?"}]}]}, ["clip"]),
    "both": ({"prompt": "<video> and <image>", "videos": ["clip.mp4"], "image": "b.png"}, ["clip", "b.png"]),
    "text": ({"messages": [{"role": "user", "content": "Who?"}]}, []),
}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl_moe"])
def test_a_qwen_answers_about_files_as_transformers(name: str, models, media: Path) -> None:
    """Tokens as Hugging Face's processor would make them, pixels of images by it, and the answers of its model."""
    folder, path = media, models[name]
    (folder / "qwen.jsonl").write_text("".join(json.dumps(line) + "\n" for line, _ in QWEN_LINES.values()))
    answered = answer_lines({"model_path": str(path), "prompt_file": str(folder / "qwen.jsonl")}, NUM_TOKENS)
    model = theirs(path, name)
    for line, (given, files) in zip(answered, QWEN_LINES.values(), strict=True):
        inputs = inputs_of_transformers(path, given, [folder / name for name in files])
        tokens = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0].tolist()
        assert line["prompt_token_ids"] + line["token_ids"] == tokens
        assert line["prompt_token_ids"] == inputs["input_ids"][0].tolist()


SPOKEN = [{"from": "human", "value": "<image> or <video>?"}, {"from": "gpt", "value": "A red square"}]
RECORDS: list[dict[str, Any]] = [
    {"id": 0, "conversations": SPOKEN, "image": "noise.png", "video": "clip", "choices": ["A red square", "no"]},
    {"id": 1, "conversations": [{**SPOKEN[0], "value": "<image>?"}, SPOKEN[1]], "image": "b.png"},
    {"id": 2, "conversations": [{**SPOKEN[0], "value": "Who?"}, SPOKEN[1]]},
]


def draw_and_score(media: Path, path: Path, name: str, parallel: ParallelConfig, batch_size: int) -> None:
    """Answers to QWEN_LINES, which are drawn, and predictions of RECORDS."""
    given = dict(model=parallel, inference=DecodingConfig(False, tokens_to_generate=6, batch_size=batch_size))
    files = dict(prompt_file=str(media / "drawn.json"), output_file=str(media / f"{name}.jsonl"))
    answers.prepare(GenerateConfig(model_path=str(path), **files, **given), {}).run()
    (media / f"{name}_scores").mkdir(exist_ok=True)
    files = dict(data_path=str(media / "records.json"), output_folder=str(media / f"{name}_scores"))
    evaluate.prepare(EvaluateConfig(neva_model_file=str(path), **files, **given), {}).run()


def test_ranks_that_share_experts_answer_together(models, media: Path) -> None:
    """Two copies of the model, each on two ranks, as one process with other batches."""
    path = models["qwen3_vl_moe"]
    (media / "drawn.json").write_text(json.dumps([line for line, _ in QWEN_LINES.values()]))
    (media / "records.json").write_text(json.dumps(RECORDS))
    four = ParallelConfig(expert_model_parallel_size=2, cpu_data_parallel_size=2)
    run_ranks(draw_and_score, 4, media, path, "four", four, 2)
    run_ranks(draw_and_score, 1, media, path, "one", ParallelConfig(), 3)
    for name in ("{}.jsonl", "{}_scores/predictions.jsonl"):
        four_ranks, one = ((media / name.format(each)).read_text().splitlines() for each in ("four", "one"))
        assert len(one) in (len(QWEN_LINES), len(RECORDS))
        for found, expected in zip(map(json.loads, four_ranks), map(json.loads, one), strict=True):
            likelihoods = [each.pop("log_likelihoods", {}) for each in (found, expected)]
            assert found == expected and likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-5)


def test_a_copy_holds_all_tensors_and_all_experts(models) -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=5)
    config = GenerateConfig(model_path=str(models["qwen3_vl_moe"]), prompt="Who?", model=layout)
    with pytest.raises(ConfigError, match="^model.expert_model_parallel_size=1: 5 ranks share the experts, which must"):
        answers.prepare(config, {})


UNREADABLE = {  # by the file's name, what its line says
    "half.jpg": "not a readable image",
    "text.jpg": "not a readable image",
    "line.png": "one side is more than 200 times the other",
    "half.mp4": "not a readable video",
}


def test_what_cannot_be_read_loses_its_own_answer_alone(models, picture: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a model whose tokens depend on the pixels, so that it is found out before anything is answered."""
    folder = picture.parent
    Image.open(picture).save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:100])
    (folder / "text.jpg").write_text("no image")
    (folder / "half.mp4").write_bytes(b"\0\0\0\x20ftypisom" * 20)
    Image.new("RGB", (600, 2)).save(folder / "line.png")
    kinds = {name: "video" if name.endswith("mp4") else "image" for name in (*UNREADABLE, "whole.jpg")}
    lines = [{"prompt": f"<{kind}> What?", kind: name} for name, kind in kinds.items()]
    (folder / "unreadable.json").write_text(json.dumps(lines))
    asked = {"model_path": str(models["qwen2_vl"]), "prompt_file": str(folder / "unreadable.json")}
    with pytest.raises(
        RuntimeError, match="^4 of 5 prompts could not be answered, .*; the first: .* entry 1: .*half.jpg"
    ):
        answer_lines(asked, 3)
    *lost, found = written(models["qwen2_vl"])
    assert len(found["token_ids"]) == 3 and "error" not in found
    for line, (name, why) in zip(lost, UNREADABLE.items(), strict=True):
        assert line["text"] == "" and f"{name}: " in line["error"] and why in line["error"]


def inputs_of_transformers(path: Path, line: dict[str, Any], files: list[Path]) -> dict[str, torch.Tensor]:
    """What Hugging Face's processor makes of a line. Pixels of videos are ours: theirs need torchvision."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
    text = line.get("prompt") or tokenizer.apply_chat_template(
        line["messages"], tokenize=False, add_generation_prompt=True
    )
    for kind, pad in PAD.items():
        text = text.replace(f"<{kind}>", pad)
    inputs: dict[str, torch.Tensor] = {}
    front, *pieces = re.split(r"<\|(image|video)_pad\|>", text)
    for file, kind, piece in zip(files, pieces[::2], pieces[1::2], strict=True):
        found = seen_of_video(path, file) if kind == "video" else processor(Image.open(file), return_tensors="pt")
        for key, value in found.items():
            inputs[key] = torch.cat([inputs[key], value]) if key in inputs else value
        count = int(found[f"{kind}_grid_thw"].prod()) // 4
        if kind == "video" and "qwen3" in path.name:  # at two frames a second, each two of them apart
            moments = int(found["video_grid_thw"][0, 0])
            front, piece = front.removesuffix("<|vision_start|>"), piece.removeprefix("<|vision_end|>")
            runs = PAD["video"].replace("<|video_pad|>", "<|video_pad|>" * (count // moments))
            front += "".join(f"<{moment + 0.25:.1f} seconds>{runs}" for moment in range(moments)) + piece
        else:
            front += f"<|{kind}_pad|>" * count + piece
    ids = tokenizer(front, return_tensors="pt")["input_ids"]
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return {**inputs, "input_ids": ids, "mm_token_type_ids": (ids == image).int() + 2 * (ids == video).int()}


def seen_of_video(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    source, frames = open_source(path, "model_path"), Frames(tuple(sorted(folder.iterdir())), 2.0)
    parts = family(source.family, "processor")
    found = parts.Processor(source.model, source.settings["data"], tokenizer_of(source)).pixels([Video(frames)])
    assert found.grids[0][0] == 2  # four frames
    return {"pixel_values_videos": found.normalised().pixel_values, "video_grid_thw": found.image_grid_thw}


def answer_lines(asked: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """The task in this process."""
    output = Path(asked["model_path"]).parent / "in_process.jsonl"
    config = GenerateConfig(**asked, output_file=str(output), inference=DecodingConfig(tokens_to_generate=limit))
    generation = answers.prepare(config, {})
    generation.make_ready({})
    generation.run()
    return written(Path(asked["model_path"]))


def written(model: Path) -> list[dict[str, Any]]:
    """By answer_lines."""
    return [json.loads(line) for line in (model.parent / "in_process.jsonl").read_text().splitlines()]


ASKED = {  # flags, and what they mean: the parts of a message, and their files
    "nothing": ([], [{"type": "image"}, {"type": "text", "text": "Describe this image."}], [ask.PICTURE]),
    "a text that places them": (
        ["--prompt", "<video> and <image>?", "--image", "b.png", "--video", "clip"],
        [{"type": "video"}, {"type": "text", "text": " and "}, {"type": "image"}, {"type": "text", "text": "?"}],
        ["clip", "b.png"],
    ),
    "several": (
        ["--prompt", "Alike?", "--image", "noise.png", "--image", "b.png", "--json"],
        [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Alike?"}],
        ["noise.png", "b.png"],
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_one_question_is_answered_as_by_transformers(
    case: str, models, media: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (flags, content, files), path = ASKED[case], models["qwen3_vl_moe"]
    monkeypatch.chdir(media)
    given = ["--model-path", f"{path}.nemo", "--max-new-tokens", str(NUM_TOKENS)]
    monkeypatch.setattr("sys.argv", ["qwen3_vl_inference.py", *given, *flags])
    ask.main()
    printed = capsys.readouterr().out
    inputs = inputs_of_transformers(path, {"messages": [{"role": "user", "content": content}]}, [*map(Path, files)])
    tokens = theirs(path, "qwen3_vl_moe").generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    text = transformers.AutoTokenizer.from_pretrained(path).decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    if "--json" not in flags:
        assert printed == f"{[text]}\n"
        return
    line = json.loads(printed)
    assert line["answer"] == text and line["prompt_token_ids"] + line["token_ids"] == tokens[0].tolist()
    assert (line["prompt"], line["images"], line["videos"]) == ("Alike?", files, [])


WRONG_FLAGS = {
    "--image none.png": "--image: none.png: the image does not exist",
    "--video none.mp4": "--video: none.mp4: the video does not exist",
    "--image https://x.y/z.png": "--image: https:/x.y/z.png: the image does not exist; addresses are not read",
    "--image empty": "--image: empty: is a folder, not a file",
    "--video empty": "--video: empty: holds no frames",
    "--prompt <video>? --image noise.png": "--prompt: 0 <image> in the text, 1 images; give --image and",
    "--prompt <image><|image_pad|> --image noise.png": "--prompt: 2 <image> in the text, 1 images; give",
    "--model-path nowhere": "--model-path=nowhere: there is no such file or directory",
    "--image half.jpg": "half.jpg: not a readable image",
}


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_a_question_that_cannot_be_asked_is_one_line(
    flags: str, models, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(picture.parent)
    Path("half.jpg").write_bytes(b"\xff\xd8 no image")
    Path("empty").mkdir(exist_ok=True)
    monkeypatch.setattr("sys.argv", ["_", "--model-path", str(models["qwen3_vl"]), *flags.split()])
    with pytest.raises(ConfigError) as error:
        ask.main()
    assert str(error.value).startswith(WRONG_FLAGS[flags])


def test_any_of_several_eos_ends_an_answer(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    asked = {"model_path": str(folder), "prompt": "USER: hi"}
    (free,) = answer_lines(asked, 12)
    stop = next(token for place, token in enumerate(free["token_ids"]) if place and token != free["token_ids"][0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    (stopped,) = answer_lines(asked, 12)
    assert stopped["token_ids"] == free["token_ids"][: free["token_ids"].index(stop) + 1]


def test_weights_run_in_the_precision_they_are_stored_in(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    assert stored_precision(open_source(folder, "")) == "32"
    theirs(folder, "llama").bfloat16().save_pretrained(folder)
    assert stored_precision(open_source(folder, "")) == "bf16"
    assert len(answer_lines({"model_path": str(folder), "prompt": "USER: hi"}, 3)[0]["token_ids"]) == 3


def message(part: dict[str, Any]) -> dict[str, str]:
    return {"lines": json.dumps({"messages": [{"role": "user", "content": [part]}]})}


MISTAKES = {
    "no such model": ({"model_path": "nowhere"}, "model_path=nowhere: there is no such file or directory"),
    "no model": ({"model_path": None}, "model_path=null: "),
    "no prompt": ({"prompt": None}, "give either prompt_file="),
    "no image": ({"prompt": "<image>", "image": "none.png"}, "prompt: none.png: the image does not exist"),
    "too few images": ({"prompt": "<image> x"}, "prompt: 1 <image> in the text, 0 images"),
    "too long": ({"prompt": "word " * 300}, "prompt: .* leave no room for an answer in model.encoder_seq_length=256"),
    "not JSON": ({"lines": '{"prompt": "x"}\n{"prompt": '}, r"in.jsonl line 2: not JSON"),
    "half a character": ({"lines": r'{"prompt": "\ud83d"}'}, "in.jsonl line 1: not JSON that can be read"),
    "no prompt at all": ({"lines": "{}"}, "in.jsonl line 1: must have either 'prompt' or 'messages'"),
    "an empty prompt": ({"of": "qwen2", "lines": '{"prompt": ""}'}, "in.jsonl line 1: the prompt is empty"),
    "a folder": ({"prompt": "<image>", "image": "/proc"}, "prompt: /proc: is a folder, not a file"),
    "an address": ({"prompt": "<image>", "image": "http://x.y/z"}, "does not exist; addresses are not read"),
    "a part": (
        {"lines": '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}'},
        "in.jsonl line 1: each of 'messages' needs .* a list of parts: texts, images, videos",
    ),
    "no kind of part": (message({"type": ["image"], "image": "a"}), "in.jsonl line 1: each of 'messages' needs"),
    "no frames": (message({"type": "video", "video": []}), "in.jsonl line 1: each of 'messages' needs"),
    "a text with a file": (message({"type": "text", "text": "", "image": 5}), "has 'image' beside 'text'; pixels and"),
    "pixels": (message({"image": "a", "max_pixels": 9}), "has 'max_pixels' beside 'image'; pixels and frames are as"),
    "unseen": ({"inference": DecodingConfig(all_probs=True)}, "inference.all_probs=true: goes with output_file="),
    "named twice": (
        {"lines": '{"image": "a", "messages": [{"role": "user", "content": [{"type": "image", "image": "b"}]}]}'},
        "in.jsonl line 1: 'image' stands beside 'messages' and in them",
    ),
    "a folder to write": ({"output_file": "/proc"}, "output_file=/proc: is a folder; must be a file"),
    "another form": ({"lines": '{"prompt": "x", "messages": []}'}, "in.jsonl line 1: must have either"),
    "nothing": ({"lines": "\n"}, "in.jsonl: holds no prompt"),
    "fsdp": ({"model": ParallelConfig(fsdp=True)}, "model.fsdp=true: whole copies of the model answer"),
    "heads": ({"model": ParallelConfig(tensor_model_parallel_size=3)}, "tensor_model_parallel_size=3"),
    "no folder": ({"output_file": "/proc/none/x"}, "output_file=/proc/none/x: cannot be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, models, tmp_path: Path) -> None:
    asked, message = MISTAKES[name]
    asked = {"of": "llava", "prompt": "x"} | asked
    asked = {"model_path": str(models[asked.pop("of")])} | asked
    if "lines" in asked:
        (tmp_path / "in.jsonl").write_text(asked.pop("lines"))
        asked |= {"prompt": None, "prompt_file": str(tmp_path / "in.jsonl")}
    with pytest.raises(ConfigError, match=message) as error:
        generation = answers.prepare(GenerateConfig(**asked), {})
        generation.make_ready({})
        generation.run()
    assert "\n" not in str(error.value)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    (folder / "chat_template.jinja").unlink()
    questions = tmp_path / "in.jsonl"
    questions.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(ConfigError, match="line 1: the tokenizer has no chat template"):
        answer_lines({"model_path": str(folder), "prompt_file": str(questions)}, 3)


@pytest.mark.parametrize(
    "text", ["<image>\nWhich digit?", "a, b", "it's", 'say "hi"', "back\\slash", "end\\", 'q\\"x', "", "{a: 1}", "\\n"]
)
def test_a_prompt_on_the_command_line_may_be_any_text(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from nemo_vlm.command_line import quoted

    (override,) = OverridesParser.create().parse_overrides([quoted(f"prompt={text}")])
    assert override.value() == text
    assert quoted(quoted(f"prompt={text}")) == quoted(f"prompt={text}")  # ranks repeat the command line
    assert quoted("parallel=tp2") == "parallel=tp2"
