"""Plan a run: `python examples/plan.py model=qwen2_vl_72b trainer.num_nodes=4 [search=true] [hardware=h200]`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import train

if __name__ == "__main__":
    launch(train, "plan")
