"""Shared by all tests: quiet libraries, no network, and the server that ranks and commands are forked from."""

import multiprocessing
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

# It imports the heavy modules once; it holds no threads and no groups.
HEAVY = ("door", "mcore.engine", "mcore.vit", "training.callbacks", "parallel.megatron", "inference.answers")
OTHERS = ("nemo_vlm.inference.evaluate", "transformers", "tokenizers", "matplotlib.figure", "tensorboard", "pytest")
multiprocessing.set_forkserver_preload([*(f"nemo_vlm.{name}" for name in HEAVY), *OTHERS])
