"""Score an archive: `python examples/neva_evaluation.py neva_model_file=X.nemo data_path=questions.json`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import evaluate

if __name__ == "__main__":
    launch(evaluate, "neva_evaluation")
