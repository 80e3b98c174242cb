"""Convert a .nemo, or another checkpoint, to a Hugging Face directory; the family is read from its model_config.yaml.

python scripts/convert_nemo_to_hf.py --input llava.nemo --output llava-hf
"""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.script import parser, run_command


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--input", required=True, help="the .nemo, or the directory that it was extracted to")
    flags.add_argument("--output", required=True, type=Path, help="the directory; an earlier export is replaced")
    options = flags.parse_args()

    from nemo_vlm.conversion.jobs import Run, export_huggingface
    from nemo_vlm.sources.opening import open_source

    run = Run(options.precision, options.device, options.verify)
    export_huggingface(open_source(options.input, "--input"), options.output, run)


if __name__ == "__main__":
    run_command(main)
