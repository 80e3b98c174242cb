"""Say what a .nemo holds, without loading it: configuration, tensors, parameters, tokenizer, files.

python scripts/inspect_nemo.py run.nemo
"""

from __future__ import annotations

from nemo_vlm.script import Parser, run_command


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("path", help="a .nemo, or any other checkpoint that docs/weights.md names")
    flags.add_argument("--all", action="store_true", help="list every tensor; else layers are folded into one line")
    flags.add_argument("--json", action="store_true", help="for machines, with every setting and every tensor")
    options = flags.parse_args()

    from nemo_vlm.conversion.inspect import show
    from nemo_vlm.sources.opening import open_any

    show(open_any(options.path, "path"), options.all, options.json)


if __name__ == "__main__":
    run_command(main)
