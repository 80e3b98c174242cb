"""A training step with experts beside transformers', and beside the dense one in which a token passes as many weights.

    python scripts/benchmarks/experts.py [--experts N] [--topk K] [--rounds N] [--json FILE]

A small Qwen3-MoE of random weights on this machine, one process, fp32: forward and backward pass, clipping and AdamW on
the same samples in memory, from the same weights, whose losses are compared; both take turns. Local kernels on a CPU,
Transformer Engine's grouped products where it is. What experts cost more than the dense step is their router, the
sorting of tokens, and products in small pieces; it is only told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from side_by_side import by_turns, flags, report, row

from nemo_vlm.batch import Batch, Sample, collate
from nemo_vlm.config import RunConfig
from nemo_vlm.inference.restore import megatron_groups, process_group
from nemo_vlm.layout import one_process
from nemo_vlm.mcore import cpu
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.models.base import family
from nemo_vlm.sources import starting
from nemo_vlm.training.build import build_engine
from nemo_vlm.typed import defaults, read_run

LAYERS, HIDDEN, EXPERT, HEADS, VOCABULARY = 4, 512, 512, 8, 8192
SAMPLES, LENGTH, LR, CLIP = 4, 512, 1e-4, 1.0  # of a step
COMPARED = 6  # steps whose losses are; from step to step differences in rounding grow
ROUNDS = 15  # each is one step, and steps on a shared machine differ


def main() -> None:
    parser = flags(__doc__, ROUNDS)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model = make_model(options.experts, options.topk)
    settings = {
        "peer": f"transformers {transformers.__version__}, sdpa, experts by {model.config._experts_implementation}, "
        "torch's fused AdamW",
        "precision and optimizer": f"fp32, AdamW, learning rate {LR}, no weight decay, clipping at {CLIP}",
        "threads": torch.get_num_threads(),
    }
    report(measure(model, options.topk, options.rounds), options.json, settings)


def make_model(experts: int, topk: int) -> Any:
    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=EXPERT,
        moe_intermediate_size=EXPERT,
        num_experts=experts,
        num_experts_per_tok=topk,
        norm_topk_prob=True,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config)


def measure(theirs: Any, topk: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of each, and how far our losses are from transformers'."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        runs = {"ours": run_of({"restore_from_path": folder}), "dense": run_of(dense_sizes(topk))}
        layout, device, batch = one_process(runs["ours"].model, SAMPLES), cpu.device(), make_batch()
        with process_group(layout), megatron_groups(layout):
            engines = {name: build_engine(run, layout) for name, run in runs.items()}
            losses: dict[str, list[float]] = {name: [] for name in ("ours", "transformers", "dense")}
            ways = {name: partial(step, engine, batch, losses[name]) for name, engine in engines.items()}
            optimizer = torch.optim.AdamW(theirs.to(device).parameters(), lr=LR, weight_decay=0.0, fused=True)
            ways["transformers"] = partial(their_step, theirs, optimizer, batch.to(device), losses["transformers"])
            seconds = by_turns(ways, rounds)
    yield row("a step, beside transformers", seconds["ours"], seconds["transformers"], "s", "<= 1.0")
    yield row("a step, beside the dense one", seconds["ours"], seconds["dense"], "s")
    pairs = list(zip(losses["ours"], losses["transformers"], strict=True))[:COMPARED]
    apart = max(abs(one - two) for one, two in pairs)
    yield row(f"losses of {len(pairs)} steps beside transformers", apart, None, "nats apart", "<= 1e-4")


def run_of(sizes: dict[str, Any]) -> RunConfig:
    kind = family("gpt", "config").Config
    batch = dict(micro_batch_size=SAMPLES, global_batch_size=SAMPLES)
    tree = defaults(kind) | batch | {"family": "gpt", "vocab_size": VOCABULARY} | sizes
    model, _ = starting.settle(tree, ())
    trainer = {"precision": "32", "gradient_clip_val": CLIP}
    return read_run({"trainer": trainer, "exp_manager": {}, "model": model}, kind)


def dense_sizes(topk: int) -> dict[str, int]:
    sizes = dict(num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS)
    return sizes | dict(ffn_hidden_size=topk * EXPERT, qk_layernorm=True)


def make_batch() -> Batch:
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return collate([Sample(row[:-1], row[1:]) for row in tokens])


def step(engine: Engine, batch: Batch, losses: list[float]) -> None:
    losses.append(engine.step([batch], LR).loss)


def their_step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, losses: list[float]) -> None:
    with cpu.without_redirection():  # which is ours, and would cost each of its calls of torch
        optimizer.zero_grad()
        loss = model(batch.tokens, labels=batch.labels, shift_labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())


if __name__ == "__main__":
    main()
