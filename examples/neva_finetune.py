"""Train a LLaVA: `python examples/neva_finetune.py [model=llava_7b] [parallel=tp2] [key=value ...]`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import train

if __name__ == "__main__":
    launch(train, "neva_finetune")
