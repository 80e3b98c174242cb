"""Let a LLaVA answer: `python examples/neva_inference.py neva_model_file=X.nemo prompt_file=in.jsonl [key=value]`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import infer

if __name__ == "__main__":
    launch(infer, "llava_7b_inference")
