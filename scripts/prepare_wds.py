"""Records with images and videos to a folder of tars (webdataset), made ready by Megatron-Energon.

python scripts/prepare_wds.py --input blip_laion_cc_sbu_558k.json --image-folder images --output wds

takes LLaVA, ShareGPT and mllm JSON: model.data.data_impl=energon model.data.data_path=wds
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_vlm.config import DataConfig
from nemo_vlm.script import Parser, run_command


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--input", required=True, type=Path, help="JSON or JSONL of conversations")
    flags.add_argument("--output", required=True, type=Path, help="the folder to write")
    flags.add_argument("--image-folder", help="or a .tar; default: the folder of the input")
    flags.add_argument("--video-folder", help="likewise")
    flags.add_argument("--max-samples-per-tar", type=int, default=10_000, help="default: 10000")
    flags.add_argument("--split-ratio", default="9,1,0", help="shares of train, val and test; default: 9,1,0")
    flags.add_argument(
        "--max-skip-fraction", type=float, default=DataConfig.max_skip_fraction, help="before it gives up"
    )
    options = flags.parse_args()
    try:
        split = tuple(float(share) for share in options.split_ratio.split(","))
    except ValueError:
        flags.error(f"--split-ratio={options.split_ratio}: must be shares of train, val and test, as 9,1,0")

    from nemo_vlm.data.prepare_wds import Sharding, prepare
    from nemo_vlm.data.records import RecordFile

    how = Sharding(options.max_samples_per_tar, split)
    file = RecordFile(options.input, options.image_folder, options.video_folder, "--input")
    sys.stdout.write(f"{prepare(file, options.output, how, options.max_skip_fraction)}\n")


if __name__ == "__main__":
    run_command(main)
