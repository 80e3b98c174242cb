"""Conversations to packed .bin/.idx files for model.data.data_impl=sft_idxmap, in the format of Pai-Megatron-Patch.

python scripts/prepare_sft_idxmap.py --input alpaca.jsonl --output alpaca_4096 --tokenizer Qwen2.5-7B \\
    --seq-length 4096 --packing
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nemo_vlm.config import DataConfig
from nemo_vlm.script import Parser, add_tokenizer, run_command, tokenizer_of

DATA = DataConfig()


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--input", required=True, type=Path, help="JSON or JSONL; a line may be a list of records")
    flags.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="of .bin, .idx and _lengths.png")
    add_tokenizer(flags)
    flags.add_argument("--seq-length", required=True, type=int, help="tokens of a pack, the model.encoder_seq_length")
    flags.add_argument("--packing", action="store_true", help="conversations share packs; else each has its own")
    flags.add_argument("--conv-template", default="qwen2", help="default: qwen2")
    flags.add_argument("--system-message", help="default: the template's")
    flags.add_argument("--too-long", default=DATA.too_long, choices=("truncate", "drop"), help="default: truncate")
    flags.add_argument("--max-skip-fraction", type=float, default=DATA.max_skip_fraction, help="before it gives up")
    flags.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    options = flags.parse_args()

    from nemo_vlm.data.prepare_sft import UNLIMITED, Packing, prepare
    from nemo_vlm.models.gpt.config import Config
    from nemo_vlm.models.gpt.processor import Processor
    from nemo_vlm.models.templates import TEMPLATES
    from nemo_vlm.sources.tokenizers import load_tokenizer

    if options.conv_template not in TEMPLATES:
        flags.error(f"--conv-template={options.conv_template}: must be one of {', '.join(TEMPLATES)}")
    if options.seq_length < 2 or options.workers < 1:
        flags.error("--seq-length must be 2 or more, --workers 1 or more")
    tokenizer = load_tokenizer(tokenizer_of(options))
    data = DataConfig(conv_template=options.conv_template, system_message=options.system_message)
    processor = Processor(Config(encoder_seq_length=UNLIMITED), data, tokenizer)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how = Packing(options.seq_length, options.packing, options.too_long, padding)
    report = prepare(options.input, options.output, processor, how, options.workers, options.max_skip_fraction)
    sys.stdout.write(f"{report}\n")


if __name__ == "__main__":
    run_command(main)
