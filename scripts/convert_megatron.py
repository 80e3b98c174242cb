"""Convert to and from Megatron's own directories: torch_dist, or mp_rank files for any sizes.

python scripts/convert_megatron.py --input llama-hf --output llama-mcore --format torch_dist
python scripts/convert_megatron.py --input llama-hf --output llama-tp2pp2 --format mp_rank \\
    --tensor-model-parallel-size 2 --pipeline-layers 14,18
python scripts/convert_megatron.py --input llama-mcore --output llama.nemo
python scripts/convert_megatron.py --input qwen2-vl-hf --output qwen2-vl-mm --format mp_rank \\
    --names mindspeed --num-layer-list 0,0,10,20
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_vlm.script import parser, run_command


def size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 1 on")
    return int(text)


def layers(text: str) -> tuple[int, ...]:
    if not all(count.isdecimal() for count in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} must be numbers with commas between, 1,3")
    return tuple(int(count) for count in text.split(","))


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--input", required=True, help="Megatron's directory, Hugging Face's, or a .nemo")
    flags.add_argument("--output", required=True, type=Path, help="without --format: a .nemo, or Hugging Face's")
    flags.add_argument("--format", choices=("torch_dist", "mp_rank"), help="of a Megatron directory to write")
    flags.add_argument("--tensor-model-parallel-size", type=size, default=1, help="of mp_rank files")
    flags.add_argument("--pipeline-model-parallel-size", type=size, help="of mp_rank files")
    flags.add_argument("--pipeline-layers", type=layers, help="decoder layers of each stage, 1,3")
    flags.add_argument("--num-layer-list", type=layers, help="the same as MindSpeed says it: first layers, 0,0,10,20")
    names = "whose names a model gets: pai (the default); a Qwen2-VL mindspeed, mindspeed2, too; a Qwen3-VL megatron"
    flags.add_argument("--names", help=names)
    flags.add_argument("--iteration", help="a number or release; without it the input's last, and release to write")
    flags.add_argument("--hf-config", type=Path, help="a directory whose config.json describes the input")
    options = flags.parse_args()

    from nemo_vlm.conversion.megatron import run

    run(options)


if __name__ == "__main__":
    run_command(main)
