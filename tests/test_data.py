"""Records to batches: order, masks, pixels, merging."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from nemo_vlm.batch import IGNORE_INDEX, Images, Sample, collate, pack
from nemo_vlm.config import DataConfig, StepConfig, TokenizerConfig
from nemo_vlm.data import digits
from nemo_vlm.data.loader import Share, StepSampler
from nemo_vlm.data.orders import Blend
from nemo_vlm.data.records import RecordDataset, RecordFile, read_records
from nemo_vlm.data.tokenizer import VISION_TOKENS
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout
from nemo_vlm.models.base import FAMILIES, family
from nemo_vlm.models.images import CLIP, SIGLIP, ImageTransform, patchify, unpatchify
from nemo_vlm.models.merge import merge
from nemo_vlm.sources.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    digits.write(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(digits_folder: Path):
    return load_tokenizer(TokenizerConfig(str(digits_folder / "tokenizer")))


def test_digits_are_the_ones_of_scikit_learn(digits_folder: Path) -> None:
    from sklearn.datasets import load_digits

    train, heldout = (json.loads((digits_folder / f"{name}.json").read_text()) for name in ("train", "heldout"))
    kinds = [[record["category"] for record in records] for records in (train, heldout)]
    assert [kind.count("open") for kind in kinds] == [1500, 297]
    assert [kind.count("choice") for kind in kinds] == [500, 297]
    assert not {record["image"] for record in train} & {record["image"] for record in heldout}
    original = digits.shuffled(1797)[1500]
    target = int(load_digits().target[original])
    first_open, first_choice = heldout[:2]
    assert first_open["conversations"][1]["value"] == digits.answer(target)
    question, answer = (turn["value"] for turn in first_choice["conversations"])
    assert f"\n{answer}. {digits.NAMES[target]}\n" in question
    assert question.endswith("Answer with the option's letter from the given choices directly.")
    with Image.open(digits_folder / first_open["image"]) as image:
        small = numpy.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
    assert numpy.abs(small - load_digits().images[original]).mean() < 1.5  # through a bicubic enlargement and back


def test_answers_are_english() -> None:
    assert [digits.answer(digit) for digit in (1, 7, 8)] == ["It is a one.", "It is a seven.", "It is an eight."]


def test_digits_are_written_once(digits_folder: Path) -> None:
    before = (digits_folder / "train.json").stat().st_mtime_ns
    digits.write(digits_folder)
    assert (digits_folder / "train.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_makes_samples_of_any_data(name: str, digits_folder: Path, tokenizer) -> None:
    config = replace(family(name, "tiny").config(), vocab_size=None)
    if config.reads_media:
        unsettled = {key: None for key in vars(config.mm_cfg) if key.endswith("token_index")}
        config = replace(config, mm_cfg=replace(config.mm_cfg, **unsettled))
    tokenizer.add_tokens(list(VISION_TOKENS), special_tokens=True)
    parts = family(name, "processor")
    processor = parts.Processor(
        parts.settle(config, tokenizer), DataConfig(conv_template="v1", system_message=""), tokenizer
    )
    dataset = RecordDataset([RecordFile(digits_folder / "heldout.json")], None, processor)
    sample = dataset[0]
    answer = dataset.record(0)["conversations"][1]["value"]
    assert tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX]) == f" {answer}</s>"
    prompt = processor.prompt(dataset.record(0))
    assert torch.equal(prompt.tokens, sample.tokens[: len(prompt.tokens)])
    assert (
        sample.labels[len(prompt.tokens) - 1] != IGNORE_INDEX
    )  # the prompt ends where the first trained token is predicted
    assert sample.labels[: len(prompt.tokens) - 1].eq(IGNORE_INDEX).all()


def test_images_and_placeholders_must_match(digits_folder: Path, tokenizer) -> None:
    parts = family("llava", "processor")
    config = replace(family("llava", "tiny").config(), vocab_size=None)
    config = replace(config, mm_cfg=replace(config.mm_cfg, image_token_index=None))
    processor = parts.Processor(parts.settle(config, tokenizer), DataConfig(system_message=""), tokenizer)
    record = read_records(str(digits_folder / "heldout.json"), None)[0]
    with pytest.raises(ConfigError, match="1 <image> in the text, 2 images"):
        processor.sample({**record, "image": record["image"] * 2})
    with pytest.raises(ConfigError, match="does not exist"):
        processor.sample({**record, "image": [Path("/nowhere.png")]})


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (33, 33), (20, 27), (336, 101)])
def test_pixels_equal_hugging_face(size: tuple[int, int]) -> None:
    image = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=numpy.uint8))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    siglip = SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=3)
    for ours, theirs in (
        (ImageTransform(48, **CLIP, mode="crop"), clip),
        (ImageTransform(48, **SIGLIP, mode="stretch"), siglip),
    ):
        expected = theirs(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(normalised_views(ours, image)[0], expected, rtol=0, atol=1e-5)


def normalised_views(transform: ImageTransform, image: Image.Image) -> list[torch.Tensor]:
    """[3, height, width] each."""
    return unpatchify(transform.patches(transform.views(image), 1).normalised())


def test_padding_to_a_square_keeps_the_whole_image() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    transform = ImageTransform(40, mean=(0.5, 0.25, 0.0), std=(1, 1, 1), mode="pad")
    pixels = normalised_views(transform, image)[0]
    inside, outside = (
        pixels[:, 20, 20] + torch.tensor([0.5, 0.25, 0]),
        pixels[:, 2, 20] + torch.tensor([0.5, 0.25, 0]),
    )
    torch.testing.assert_close(inside, torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(outside, torch.tensor([127 / 255, 63 / 255, 0]), atol=1e-6, rtol=0)


def layout(data: int, micro_batch_size: int, num_micro_batches: int) -> Layout:
    return Layout(1, data, 1, 1, False, (1,), micro_batch_size, num_micro_batches)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_does_not_depend_on_the_layout(shuffle: bool) -> None:
    def run(data: int, micro_batch_size: int, num_micro_batches: int) -> list[list[int]]:
        step = StepConfig(micro_batch_size, data * micro_batch_size * num_micro_batches)
        order = Blend([numpy.arange(10)], (1.0,), 3, shuffle)
        ranks = [list(StepSampler(order, 6, 0, step, Share(rank, data))) for rank in range(data)]
        return [[k for (group,) in step for k in group] for step in zip(*ranks, strict=True)]

    expected = run(1, 1, 8)
    assert expected == run(1, 4, 2) == run(2, 2, 2) == run(4, 2, 1)
    seen = sum(expected, [])
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))  # whole epochs
    assert (seen[:10] != seen[10:20]) == shuffle


def test_collate_pads_on_the_right() -> None:
    views = patchify([torch.ones(3, 2, 4)], patch_size=2)
    samples = [
        Sample(torch.arange(1, n + 1), torch.arange(2, n + 2), images) for n, images in ((3, Images()), (5, views))
    ]
    batch = collate(samples, pad_multiple=4)
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.labels[0].tolist() == [2, 3, 4] + [IGNORE_INDEX] * 5
    assert batch.lengths.tolist() == [3, 5]
    assert batch.images.grids == [(1, 1, 2)]
    assert batch.images.pixel_values.shape == (2, 12)
    assert batch.counts().tolist() == [8, 16, 34, 2, 4, 0, 0]
    packed = pack(samples, pad_multiple=4)
    assert (packed.packed, batch.packed) == (True, False)
    assert packed.tokens.tolist() == [[1, 2, 3, 1, 2, 3, 4, 5]]
    assert packed.labels.tolist() == [[2, 3, 4, 2, 3, 4, 5, 6]]
    assert packed.segments.tolist() == [[0] * 3 + [1] * 5]
    assert packed.counts().tolist() == [8, 8, 34, 2, 4, 0, 0]


def test_patches_are_what_the_convolution_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(3, *size, generator=generator) for size in ((8, 12), (4, 4), (9, 7))]
    images = patchify(views, 4)
    assert images.grids == [(1, 2, 3), (1, 1, 1), (1, 2, 1)]
    for view, again in zip(views, unpatchify(images), strict=True):
        assert again.equal(view[:, : again.shape[1], : again.shape[2]])
    convolution = torch.nn.Conv2d(3, 5, 4, 4)
    expected = torch.cat([convolution(view[None])[0].flatten(1).T for view in views])
    found = torch.nn.functional.linear(images.pixel_values, convolution.weight.flatten(1), convolution.bias)
    torch.testing.assert_close(found, expected)


def test_merge_puts_features_in_order_and_counts_them() -> None:
    tokens = torch.tensor([[5, 9, 9, 1], [9, 2, 3, 9]])
    embeddings, features = torch.zeros(4, 2, 3), torch.arange(1.0, 5).unsqueeze(1).expand(4, 3)
    for tokens_of_one in (tokens, torch.where(tokens == 9, torch.tensor([[8, 8, 9, 8], [9, 8, 8, 9]]), tokens)):
        merged = merge(embeddings, tokens_of_one, features, placeholder_ids=(8, 9))
        assert merged[:, :, 0].T.tolist() == [[0, 1, 2, 0], [3, 0, 0, 4]]
    with pytest.raises(ValueError, match="4 placeholders of images and videos in the tokens, 3 vision features"):
        merge(embeddings, tokens, features[:3], placeholder_ids=(8, 9))


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", "not json", '[{"id": 1}]'])
def test_broken_files_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match="x.json"):
        read_records(str(tmp_path / "x.json"), None)
