"""Records with images and videos to the mllm JSON of MindSpeed-MM.

python scripts/prepare_mllm.py --input llava_instruct_150k.json --image-folder COCO2017/train2017 --output mllm.json

takes LLaVA and ShareGPT JSON: data=mllm model.data.data_path=mllm.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_vlm.config import DataConfig
from nemo_vlm.script import Parser, run_command


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--input", required=True, type=Path, help="JSON or JSONL of conversations")
    flags.add_argument("--output", required=True, type=Path, help="the JSON to write")
    flags.add_argument("--image-folder", help="default: the folder of the input")
    flags.add_argument("--video-folder", help="likewise")
    flags.add_argument(
        "--max-skip-fraction", type=float, default=DataConfig.max_skip_fraction, help="before it gives up"
    )
    options = flags.parse_args()

    from nemo_vlm.data.prepare_mllm import prepare
    from nemo_vlm.data.records import RecordFile

    file = RecordFile(options.input, options.image_folder, options.video_folder, "--input")
    sys.stdout.write(f"{prepare(file, options.output, options.max_skip_fraction)}\n")


if __name__ == "__main__":
    run_command(main)
