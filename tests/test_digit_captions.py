"""The captions that Qwen3-VL's demo learns after the questions: what stands there is what scikit-learn says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from nemo_vlm.config import TokenizerConfig
from nemo_vlm.data import digit_captions, digit_pairs
from nemo_vlm.data.digit_captions import PIXELS, caption
from nemo_vlm.sources.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "datasets/digit_captions"
    digit_captions.write(folder)
    return folder


def nearest(image: Image.Image) -> int:
    """Which digit a square shows, by the most similar of the small originals."""
    data = load_digits()
    small = numpy.asarray(image.resize((8, 8), Image.Resampling.BOX), float) / 255 * 16
    return int(data.target[((data.images - small) ** 2).sum((1, 2)).argmin()])


def test_captions_say_what_stands_there() -> None:
    assert caption([3]) == "A three."
    assert caption([8, 3]) == "An eight and a three."
    assert caption([3, 8, 1]) == "A three, an eight and a one."


def test_pictures_show_what_their_captions_say(folder: Path) -> None:
    train, heldout = (json.loads((folder / name).read_text()) for name in digit_captions.FILES)
    assert (len(train), len(heldout)) == (4500, 891)
    right = []
    for record in heldout[:60]:
        (name,), (request, said) = record["images"], record["conversations"]
        with Image.open(folder / name) as row:
            count = row.width // PIXELS
            squares = [row.crop((PIXELS * place, 0, PIXELS * (place + 1), PIXELS)) for place in range(count)]
        assert request["value"] == "<image>Describe this image."
        assert record["category"] == ("one", "two", "three")[count - 1]
        right.append(said["value"] == caption([nearest(square) for square in squares]))
    assert numpy.mean(right) >= 0.95


def test_the_tokenizer_is_that_of_the_questions(folder: Path) -> None:
    """Its chat template is left to the run's: Qwen2-VL's and Qwen3-VL's differ in the system message."""
    beside = load_tokenizer(TokenizerConfig(str(folder / digit_captions.TOKENIZER)))
    assert len(beside) == digit_captions.NUM_TOKENS == digit_pairs.NUM_TOKENS
    assert beside.chat_template is None
    said = "A three, an eight and a one."
    assert beside.decode(beside(said)["input_ids"]) == said


def test_a_folder_of_another_name_is_somebody_elses(tmp_path: Path) -> None:
    digit_captions.write(tmp_path)
    assert not any(tmp_path.iterdir())
