"""Print the command line that does here what one of Pai-Megatron-Patch does there; notes go to stderr.

python scripts/from_pai.py qwen2_5 dsw 0.5B 1 8 1e-5 1e-6 128 128 bf16 1 1 1 true true true false none false 100000 \\
    DATA DATA CHECKPOINT 10000 100 OUTPUT
python scripts/from_pai.py --env MP_PP0_LAYERS=12 qwen2_vl dsw 7B ...
python scripts/from_pai.py --family qwen2_5 run_8xH20.sh 0.5B HF_DIR OUTPUT false true bf16
"""

from __future__ import annotations

import os
import re
import sys

from nemo_vlm.conversion.command import Parser, run_command
from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.document import listing
from nemo_vlm.porting.pai import FAMILIES, translate


def main() -> None:
    flags = Parser(__doc__)
    flags.epilog = listing()
    flags.add_argument("line", nargs="*", help="one of those below, and its arguments as they were typed there")
    flags.add_argument("--family", choices=FAMILIES, help="whose run_mcore_qwen.sh or run_8xH20.sh it is")
    flags.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="of the environment there")
    flags.add_argument("--tokenizer", default="", help="its directory, for a run from random weights")
    # argparse takes -1e-5 for a flag, but not with a blank in front
    typed = [f" {word}" if re.match("-[^-h]", word) else word for word in sys.argv[1:]]
    options = flags.parse_intermixed_args(typed)
    line = [re.sub("^ (?=-)", "", word) for word in options.line]
    for setting in options.env:
        if "=" not in setting:
            raise ConfigError(f"--env {setting}: must be KEY=VALUE")
    env = os.environ | dict(setting.split("=", 1) for setting in options.env)
    command, notes = translate(line, env, options.family, options.tokenizer)
    sys.stderr.writelines(f"note: {note}\n" for note in notes)
    print(command)


if __name__ == "__main__":
    run_command(main)
