"""Convert a LLaVA of Hugging Face to a .nemo, with the flags of NeMo's script.

python scripts/convert_llava_hf_to_nemo.py --input_name_or_path llava-1.5-7b-hf --output_path llava.nemo
"""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.script import parser, run_command


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--input_name_or_path", required=True, help="the directory, or a name in the local cache")
    flags.add_argument("--output_path", required=True, type=Path, help="the .nemo")
    flags.add_argument("--tokenizer_path", help="a directory whose tokenizer is taken instead of the model's")
    flags.add_argument("--conv_template", help="model.data.conv_template of the archive, as v1 or plain")
    flags.add_argument("--hparams_file", type=Path, help="YAML with settings for the archive, its branch model")
    flags.add_argument("--skip_verification", dest="verify", action="store_false", help="as --no-verify")
    options = flags.parse_args()

    from nemo_vlm.conversion.jobs import Run, import_llava, open_huggingface
    from nemo_vlm.conversion.settings import merged, read_hparams

    source = open_huggingface(options.input_name_or_path, "--input_name_or_path", ["llava"])
    settings = read_hparams(options.hparams_file) if options.hparams_file else {}
    if options.conv_template:
        settings = merged(settings, {"data": {"conv_template": options.conv_template}})
    run = Run(options.precision, options.device, options.verify)
    import_llava(source, options.output_path, run, settings, options.tokenizer_path)


if __name__ == "__main__":
    run_command(main)
