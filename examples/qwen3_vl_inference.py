"""Ask a model: `python examples/qwen3_vl_inference.py --model-path DIR_OR_NEMO [--image X] [--prompt Y] [--json]`."""

from nemo_vlm.inference.ask import main
from nemo_vlm.script import run_command

if __name__ == "__main__":
    run_command(main)
