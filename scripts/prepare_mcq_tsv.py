"""Multiple-choice records to a TSV of VLMEvalKit's, by which scripts/evaluate_vlm.py scores a model.

python scripts/prepare_mcq_tsv.py --input datasets/digits_vqa/heldout.json --output LMUData/Digits.tsv

takes LLaVA and ShareGPT JSON whose questions list their options ("A. zero"), or that have them in a field `choices`;
LMUData=LMUData torchrun scripts/evaluate_vlm.py --data Digits ... finds it then.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_vlm.script import Parser, run_command


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--input", required=True, type=Path, help="JSON or JSONL of conversations")
    flags.add_argument("--output", required=True, type=Path, help="the TSV to write; its name is the dataset's")
    flags.add_argument("--image-folder", help="default: the folder of the input")
    options = flags.parse_args()

    from nemo_vlm.data.records import RecordFile
    from nemo_vlm.scoring.tsv import prepare

    sys.stdout.write(f"{prepare(RecordFile(options.input, options.image_folder, key='--input'), options.output)}\n")


if __name__ == "__main__":
    run_command(main)
