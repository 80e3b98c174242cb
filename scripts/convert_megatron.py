"""Convert to and from Megatron's own directories: torch_dist, or mp_rank files for any sizes.

python scripts/convert_megatron.py --input llama-hf --output llama-mcore --format torch_dist
python scripts/convert_megatron.py --input llama-hf --output llama-tp2pp2 --format mp_rank \\
    --tensor-model-parallel-size 2 --pipeline-layers 14,18
python scripts/convert_megatron.py --input llama-mcore --output llama.nemo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_vlm.conversion.command import PRECISIONS, Parser, run_command


def size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 1 on")
    return int(text)


def layers(text: str) -> tuple[int, ...]:
    if not all(count.isdecimal() for count in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} must be numbers with commas between, 1,3")
    return tuple(int(count) for count in text.split(","))


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--input", required=True, help="Megatron's directory, Hugging Face's, or a .nemo")
    flags.add_argument("--output", required=True, type=Path, help="without --format: a .nemo, or Hugging Face's")
    flags.add_argument("--format", choices=("torch_dist", "mp_rank"), help="of a Megatron directory to write")
    flags.add_argument("--tensor-model-parallel-size", type=size, default=1, help="of mp_rank files")
    flags.add_argument("--pipeline-model-parallel-size", type=size, help="of mp_rank files")
    flags.add_argument("--pipeline-layers", type=layers, help="decoder layers of each stage, 1,3")
    flags.add_argument("--iteration", help="a number or release; without it the input's last, and release to write")
    flags.add_argument("--hf-config", type=Path, help="a directory whose config.json describes the input")
    flags.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: each tensor keeps its own")
    options = flags.parse_args()

    from nemo_vlm.conversion.megatron import run

    run(options)


if __name__ == "__main__":
    run_command(main)
