"""Export a LoRA adapter to the layout of Hugging Face's PEFT, which loads it beside the exported base.

python scripts/export_lora_to_hf.py --adapter run.nemo --output adapter-hf --base llava-hf
"""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.script import Parser, run_command


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--adapter", required=True, help="the run's .nemo, or one of its training checkpoints")
    flags.add_argument("--output", required=True, type=Path, help="the directory to write")
    flags.add_argument("--base", help="what adapter_config.json says of the base; else what the run started from")
    options = flags.parse_args()

    from nemo_vlm.conversion.peft import export_adapter

    export_adapter(options.adapter, options.output, options.base)


if __name__ == "__main__":
    run_command(main)
