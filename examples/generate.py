"""Let a model answer: `python examples/generate.py model_path=X.nemo prompt_file=in.jsonl output_file=out.jsonl`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import generate

if __name__ == "__main__":
    launch(generate, "generate")
