"""Convert a Llama or Vicuna of Hugging Face to a .nemo, with the flags of NeMo's script.

python scripts/convert_llama_hf_to_nemo.py --input_name_or_path vicuna-7b-v1.5 --output_path vicuna.nemo
"""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.script import parser, run_command


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--input_name_or_path", required=True, help="the directory, or a name in the local cache")
    flags.add_argument("--output_path", required=True, type=Path, help="the .nemo")
    flags.add_argument("--hparams_file", type=Path, help="YAML with settings for the archive, its branch model")
    options = flags.parse_args()

    from nemo_vlm.conversion.jobs import Run, import_llava, open_huggingface
    from nemo_vlm.conversion.settings import read_hparams

    source = open_huggingface(options.input_name_or_path, "--input_name_or_path", ["gpt"])
    settings = read_hparams(options.hparams_file) if options.hparams_file else {}
    run = Run(options.precision, options.device, options.verify)
    import_llava(source, options.output_path, run, settings, tokenizer=None)


if __name__ == "__main__":
    run_command(main)
