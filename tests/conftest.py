"""Shared by all tests: quiet libraries, no network, and the server that ranks and commands are forked from."""

import multiprocessing
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

# It imports the heavy modules once, those too that a run imports later; it holds no threads and no groups.
HEAVY = ("door", "mcore.engine", "mcore.vit", "training.callbacks", "parallel.megatron", "inference.answers")
OTHERS = ("nemo_vlm.inference.evaluate", "transformers", "tokenizers", "matplotlib.figure", "tensorboard", "pytest")
OTHERS += ("sklearn.datasets", "s3fs", "tabulate")
multiprocessing.set_forkserver_preload([*(f"nemo_vlm.{name}" for name in HEAVY), *OTHERS])

# They begin first, so that none is the last that one of two workers has to do.
LONG = {f"test_{name}.py" for name in ("supervisor", "runs", "workflow", "families", "resume", "options", "generation")}


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
