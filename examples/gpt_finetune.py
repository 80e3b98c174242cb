"""Instruction tuning: `python examples/gpt_finetune.py [model=qwen2_5_7b] [data=sft_json] [key=value ...]`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import train

if __name__ == "__main__":
    launch(train, "gpt_finetune")
