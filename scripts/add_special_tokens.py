"""Add special tokens to a SentencePiece model or a Hugging Face tokenizer, and rows for them to an archive.

python scripts/add_special_tokens.py --input tokenizer.model --output with-extra.model
python scripts/add_special_tokens.py --input vicuna-7b-v1.5 --output with-image --tokens "<image>" \\
    --resize vicuna.nemo --output_archive vicuna-image.nemo
"""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.script import Parser, run_command


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--input", "--input_file", required=True, type=Path, help="tokenizer.model, or a directory")
    flags.add_argument("--output", "--output_file", required=True, type=Path, help="where the result goes")
    flags.add_argument("--tokens", nargs="+", metavar="TOKEN", help="default: <extra_id_0> to <extra_id_7>")
    flags.add_argument("--is_userdefined", action="store_true", help="as in NeMo's script; here they always are")
    flags.add_argument("--resize", metavar="ARCHIVE", help="a .nemo that gets the tokenizer, and a row for each token")
    flags.add_argument("--output_archive", type=Path, help="where that goes")
    options = flags.parse_args()
    if (options.resize is None) != (options.output_archive is None):
        flags.error("--resize and --output_archive go together")

    from nemo_vlm.conversion.special_tokens import EXTRA, add_special_tokens, resize
    from nemo_vlm.sources.opening import open_source

    source = open_source(options.resize, "--resize") if options.resize else None
    add_special_tokens(options.input, options.output, options.tokens or EXTRA)
    if source:
        resize(source, options.output, options.output_archive)


if __name__ == "__main__":
    run_command(main)
