"""Convert a LLaVA's .nemo to a Hugging Face directory, with the flags of NeMo's script.

python scripts/convert_llava_nemo_to_hf.py --input_name_or_path run.nemo --hf_output_path out
"""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.script import parser, run_command

TYPES = ("clip", "siglip")


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--input_name_or_path", required=True, help="the .nemo, or the directory it was extracted to")
    flags.add_argument("--hf_output_path", type=Path, help="the directory to write")
    flags.add_argument("--output_path", type=Path, help="the same, where --hf_output_path is not given")
    flags.add_argument("--input_tokenizer", help="a directory whose tokenizer is taken instead of the archive's")
    flags.add_argument("--processor_type", choices=TYPES, help="must be what the archive has")
    flags.add_argument("--vision_tower_type", choices=TYPES, help="must be what the archive has")
    flags.add_argument("--vision_encoder_path", help="the vision tower, where the archive holds none")
    flags.add_argument("--cpu-only", dest="device", action="store_const", const="cpu", help="as --device cpu")
    options = flags.parse_args()
    output = options.hf_output_path or options.output_path
    if output is None:
        flags.error("--hf_output_path is needed: the directory to write")

    from nemo_vlm.conversion import jobs
    from nemo_vlm.sources.opening import open_source

    source = jobs.of_family(
        open_source(options.input_name_or_path, "--input_name_or_path"), "--input_name_or_path", ["llava"]
    )
    source = jobs.with_tower(source, options.vision_encoder_path)
    jobs.check_tower_type(
        source, {"--processor_type": options.processor_type, "--vision_tower_type": options.vision_tower_type}
    )
    if options.input_tokenizer:
        source = jobs.with_tokenizer(source, options.input_tokenizer, "--input_tokenizer")
    jobs.export_huggingface(source, output, jobs.Run(options.precision, options.device, options.verify))


if __name__ == "__main__":
    run_command(main)
