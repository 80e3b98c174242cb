"""Train a Qwen3-VL: `python examples/qwen3_vl_finetune.py [model=qwen3_vl_30b_a3b] [data=sharegpt] [key=value ...]`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import train

if __name__ == "__main__":
    launch(train, "qwen3_vl_finetune")
