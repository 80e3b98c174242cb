"""Score a vision-language model with VLMEvalKit, in the environment that requirements/eval.txt tells how to make.

torchrun --nproc-per-node=8 scripts/evaluate_vlm.py --vlmevalkit DIR --model run.nemo --data MMBench_DEV_EN MME \\
    --work-dir results --verbose

DIR is a checkout, which is not changed. Other flags are its run.py's: --mode, --reuse, --judge, --data-config, ...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # where nemo_vlm is not installed

from nemo_vlm.script import PRECISIONS, Parser, run_command


def main() -> None:
    flags = Parser(__doc__)
    flags.allow_abbrev = False  # run.py's --mode is none of --model
    flags.add_argument("--vlmevalkit", required=True, type=Path, metavar="DIR", help="the checkout of VLMEvalKit")
    flags.add_argument("--model", default="", help="Hugging Face's directory, a .nemo or a training checkpoint")
    flags.add_argument(
        "--data", nargs="+", default=[], metavar="NAME", help="datasets of VLMEvalKit's, or $LMUData/NAME.tsv"
    )
    flags.add_argument("--work-dir", default="outputs", type=Path, help="folder of results and of scores.json")
    flags.add_argument("--name", default="", help="of the model, in the results' names; default: its file's")
    flags.add_argument("--baseline", type=Path, metavar="DIR", help="another run's --work-dir, to compare with")
    flags.add_argument("--cache", type=Path, help="folder of exports; default: $NEMO_VLM_CACHE or ~/.cache/nemo_vlm")
    flags.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: as the weights are stored")
    flags.add_argument("--max-new-tokens", type=int, default=512, help="of an answer")
    flags.add_argument("--verbose", action="store_true", help="print each answer")
    flags.add_argument("--config", type=Path, metavar="FILE", help="of VLMEvalKit, in place of --model and --data")
    flags.add_argument("--print-config", action="store_true", help="write what stock run.py takes as its --config")
    options, others = flags.parse_known_args()

    from nemo_vlm.scoring.stock import print_config
    from nemo_vlm.scoring.vlmevalkit import Evaluation, evaluate

    printed = vars(options).pop("print_config")
    asked = Evaluation(**vars(options) | {"data": tuple(options.data), "others": tuple(others)})
    print_config(asked) if printed else evaluate(asked)


if __name__ == "__main__":
    run_command(main)
