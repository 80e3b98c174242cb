"""Merge a LoRA adapter into the model that it was trained beside: a .nemo like any other.

python scripts/merge_lora.py --base llava.nemo --adapter run.nemo --output merged.nemo
"""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.script import parser, run_command


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--base",
        required=True,
        nargs="+",
        help="what the run started from; several where each brought a part; of two with the same the later counts",
    )
    flags.add_argument("--adapter", required=True, help="the run's .nemo, or one of its training checkpoints")
    flags.add_argument("--output", required=True, type=Path, help="the .nemo to write")
    options = flags.parse_args()

    from nemo_vlm.conversion.lora import merge

    merge(options.base, options.adapter, options.output, options.precision, options.verify)


if __name__ == "__main__":
    run_command(main)
