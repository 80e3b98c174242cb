"""See what a run would be trained on: `python examples/show_data.py data=... n=20 [json=true] [picture=out.png]`."""

from nemo_vlm.door import launch
from nemo_vlm.experiment import show

if __name__ == "__main__":
    launch(show, "show_data")
