"""Print the command line that does here what one of Pai-Megatron-Patch or MindSpeed-MM does there; notes go to stderr.

python scripts/from_pai.py qwen2_5 dsw 0.5B 1 8 1e-5 1e-6 128 128 bf16 1 1 1 true true true false none false 100000 \\
    DATA DATA CHECKPOINT 10000 100 OUTPUT
python scripts/from_pai.py --env MP_PP0_LAYERS=12 qwen2_vl dsw 7B ...
python scripts/from_pai.py --family qwen2_5 run_8xH20.sh 0.5B HF_DIR OUTPUT false true bf16
python scripts/from_pai.py MindSpeed-MM/examples/qwen2vl/finetune_qwen2vl_7b.sh
python scripts/from_pai.py mm-convert Qwen2VLConverter hf_to_mm --cfg.mm_dir DIR ...
"""

from __future__ import annotations

import re
import sys

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.document import listing
from nemo_vlm.porting.line import translate
from nemo_vlm.porting.pai import FAMILIES
from nemo_vlm.script import Parser, run_command

OWN = ("--family", "--env", "--tokenizer", "--help", "-h")


def main() -> None:
    flags = Parser(__doc__)
    flags.epilog = listing()
    flags.add_argument("line", nargs="*", help="one of those below, and its arguments as they were typed there")
    flags.add_argument("--family", choices=FAMILIES, help="whose run_mcore_qwen.sh or run_8xH20.sh it is")
    flags.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="a variable there")
    flags.add_argument("--tokenizer", default="", help="its directory, for a run from random weights")
    # argparse takes -1e-5 and the flags of the line for its own, but not with a blank in front
    typed = [f" {word}" if word.startswith("-") and word.split("=")[0] not in OWN else word for word in sys.argv[1:]]
    options = flags.parse_intermixed_args(typed)
    line = [re.sub("^ (?=-)", "", word) for word in options.line]
    for setting in options.env:
        if "=" not in setting:
            raise ConfigError(f"--env {setting}: must be KEY=VALUE")
    given = dict(setting.split("=", 1) for setting in options.env)
    command, notes = translate(line, given, options.family, options.tokenizer)
    sys.stderr.writelines(f"note: {note}\n" for note in notes)
    print(command)


if __name__ == "__main__":
    run_command(main)
