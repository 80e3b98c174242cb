"""Tokenize JSONL for pretraining, into Megatron's .bin and .idx files.

python scripts/prepare_mmap.py --input a.jsonl b.jsonl --output corpus --tokenizer Qwen2.5-7B --append-eod --workers 16

writes corpus_text_document.bin and .idx: python examples/gpt_pretrain.py data=mmap model.data.data_path=corpus ...
"""

from __future__ import annotations

import os
from pathlib import Path

from nemo_vlm.script import Parser, add_tokenizer, run_command, tokenizer_of


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--input", required=True, nargs="+", type=Path, help="JSONL, or JSON lists")
    flags.add_argument("--output", required=True, type=Path, help="beginning of the names of the files to write")
    add_tokenizer(flags)
    flags.add_argument("--json-keys", nargs="+", default=["text"], help="the texts of a record; each gets its files")
    flags.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's EOS")
    flags.add_argument("--eod-token", help="with another token")
    flags.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    flags.add_argument("--max-skip-fraction", type=float, default=0.01, help="share of records that may be left out")
    options = flags.parse_args()
    if options.workers < 1:
        flags.error("--workers must be 1 or more")
    if options.eod_token and not options.append_eod:
        flags.error("--eod-token goes with --append-eod")
    if len(set(options.json_keys)) < len(options.json_keys):
        flags.error(f"--json-keys {' '.join(options.json_keys)}: a key is given twice")

    from nemo_vlm.data.preparation import tokenize
    from nemo_vlm.data.tokenization import Tokenization
    from nemo_vlm.sources.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_of(options))
    settings = Tokenization(tokenizer, tuple(options.json_keys), options.append_eod, options.eod_token)
    tokenize(options.input, options.output, settings, options.workers, options.max_skip_fraction)


if __name__ == "__main__":
    run_command(main)
