"""Train a Qwen2-VL: `python examples/qwen2_vl_finetune.py [model=qwen2_vl_7b] [data=sharegpt] [key=value ...]`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import train

if __name__ == "__main__":
    launch(train, "qwen2_vl_finetune")
