"""Pretrain a language model: `python examples/gpt_pretrain.py [model=qwen2_5_7b] [data=mmap] [key=value ...]`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import train

if __name__ == "__main__":
    launch(train, "gpt_pretrain")
