"""Convert a Hugging Face directory to a .nemo; the family is read from its config.json.

python scripts/convert_hf_to_nemo.py --input llava-1.5-7b-hf --output llava.nemo
"""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.script import parser, run_command


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--input", required=True, help="the directory, or the name of a repository in the local cache")
    flags.add_argument("--output", required=True, type=Path, help="the .nemo")
    options = flags.parse_args()

    from nemo_vlm.conversion.jobs import Run, import_huggingface, open_huggingface

    run = Run(options.precision, options.device, options.verify)
    import_huggingface(open_huggingface(options.input, "--input"), options.output, run)


if __name__ == "__main__":
    run_command(main)
