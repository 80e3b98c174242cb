"""Score a language model with EleutherAI's lm-eval, from local files; needs requirements/eval.txt.

python scripts/evaluate_lm.py --model run.nemo --tasks cmmlu,ceval-valid --data DIR --output scores.json

DIR holds datasets under their names on the hub: haonan-li/cmmlu/{test,dev}/agronomy.csv and
ceval/ceval-exam/{val,dev}/accountant_val.csv, as their archives unpack, or clones of their repositories.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # where nemo_vlm is not installed

from nemo_vlm.script import PRECISIONS, Parser, run_command


def main() -> None:
    flags = Parser(__doc__)
    flags.add_argument("--model", required=True, help="Hugging Face's directory, a .nemo or a training checkpoint")
    flags.add_argument("--tasks", required=True, help="of lm-eval or of --include-path, with commas between them")
    flags.add_argument("--output", required=True, type=Path, help="the JSON file of the scores")
    flags.add_argument("--data", type=Path, help="folder with the tasks' datasets; else Hugging Face's cache")
    flags.add_argument("--include-path", type=Path, help="folder with tasks of one's own, YAML files of lm-eval")
    flags.add_argument("--cache", type=Path, help="folder of exports; else $NEMO_VLM_CACHE or ~/.cache/nemo_vlm")
    flags.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: the model's own")
    flags.add_argument("--batch-size", type=int, default=16)
    flags.add_argument("--num-fewshot", type=int, help="examples in front of each question; else as the task says")
    flags.add_argument("--apply-chat-template", action="store_true", help="ask by the model's chat template")
    flags.add_argument("--baseline", type=Path, help="the JSON file of another evaluation, to print the differences")
    flags.add_argument("--limit", type=int, help="examples of each task at most, for a trial")
    options = flags.parse_args()

    from nemo_vlm.scoring.harness import Evaluation, evaluate

    asked = vars(options) | {"tasks": tuple(options.tasks.split(","))}
    if (table := evaluate(Evaluation(**asked))) is not None:
        print(table)


if __name__ == "__main__":
    run_command(main)
