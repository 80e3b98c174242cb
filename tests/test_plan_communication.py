"""The plan's bytes on their way against what the ranks of a step really send, collective by collective."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from test_plan_memory import FULL, PHOTO, TP2_SP, VPP2, planned_run
from torch._C._distributed_c10d import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_vlm.config import LoraConfig, PeftConfig, RunConfig
from nemo_vlm.config.plan import PlanConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.planning import communication
from nemo_vlm.planning.communication import case_for, ring
from nemo_vlm.planning.parameters import count
from nemo_vlm.training.build import build_engine
from nemo_vlm.training.rehearsal import batches_of

SMALL = 4096  # bytes of a tensor: shapes, counts, norms and the sums of a softmax are not planned
TP2, PP2, EP2 = ({f"{kind}_model_parallel_size": 2} for kind in ("tensor", "pipeline", "expert"))
CP2 = {"context_parallel_size": 2}
LORA = PeftConfig("lora", None, LoraConfig(target_modules=("all",)))
FROZEN = "_frozen"  # of such a case the tower is
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, settings of planned_run
    "gpt_tp2": (2, dict(name="gpt", parallel=TP2)),
    "gpt_tp2_sp": (2, dict(name="gpt", parallel=TP2_SP, precision="bf16")),
    "gpt_tp2_sp_full": (2, dict(name="gpt", parallel=TP2_SP, step=FULL)),
    "gpt_dp2": (2, dict(name="gpt", precision="bf16")),
    "gpt_fsdp": (2, dict(name="gpt", parallel={"fsdp": True}, precision="bf16")),
    "gpt_fsdp_grad": (2, dict(name="gpt", parallel={"fsdp": True, "fsdp_sharding_strategy": "grad"})),
    "llava_fsdp_frozen": (2, dict(name="llava", parallel={"fsdp": True})),
    "gpt_hsdp": (4, dict(name="gpt", parallel={"fsdp": True, "fsdp_sharding_strategy": "hybrid"})),
    "gpt_cp2_selective": (2, dict(name="gpt", parallel=CP2, step={"activations_checkpoint_granularity": "selective"})),
    "qwen3_vl_ep2_allgather": (
        2,
        dict(name="qwen3_vl", data=PHOTO, parallel=EP2, step={"moe_token_dispatcher_type": "allgather"}),
    ),
    "gpt_tied_pp2": (2, dict(name="gpt", parallel=PP2, model={"share_embeddings_and_output_weights": True})),
    "gpt_vpp2": (2, dict(name="gpt", parallel=VPP2)),
    "gpt_cp2": (2, dict(name="gpt", parallel=CP2)),
    "llava_tp2": (2, dict(name="llava", parallel=TP2)),
    "llava_tp2_frozen": (2, dict(name="llava", parallel=TP2, step=FULL)),
    "llava_tp2_lora": (2, dict(name="llava", parallel=TP2, peft=LORA)),
    "llava_tp2_sp_lora": (2, dict(name="llava", parallel=TP2_SP, peft=LORA)),
    "qwen2_vl_tp2_sp": (2, dict(name="qwen2_vl", data=PHOTO, parallel=TP2_SP)),
    "qwen3_vl_ep2": (2, dict(name="qwen3_vl", data=PHOTO, parallel=EP2)),
    "qwen2_vl_tp2_pp2": (4, dict(name="qwen2_vl", data=PHOTO, parallel=TP2 | PP2)),
    "gpt_tp2_cp2": (4, dict(name="gpt", parallel=TP2_SP | CP2)),
    "qwen3_vl_tp2_sp": (2, dict(name="qwen3_vl", data=PHOTO, parallel=TP2_SP | {"expert_tensor_parallel_size": 1})),
    "qwen3_vl_tp2_ep2": (4, dict(name="qwen3_vl", data=PHOTO, parallel=TP2_SP | EP2)),
}


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends, as rings do it; collectives of small tensors apart.

    Attributes:
        bytes: by the collective's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            leaves = tree_leaves((args, kwargs))
            sizes = [leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if max(sizes, default=0) > SMALL:
                name = func._schema.name.removeprefix("c10d::")
                self.bytes[name] += sum(sizes) * share(name, ranks_of(leaves))
        return func(*args, **kwargs or {})


def share(name: str, ranks: int) -> float:
    """Of the bytes of all tensors that a collective is given, those that one rank sends."""
    if name == "recv_":
        return 0.0
    if name == "send":
        return 1.0
    if name in ("allreduce_", "allreduce_coalesced_"):
        return 2 * ring(ranks)
    if name == "alltoall_base_":  # what is sent and what comes are about as much
        return ring(ranks) / 2
    assert "gather" in name or "scatter" in name, name
    return ring(ranks) * ranks / (ranks + 1)  # it is given the whole, and one rank's part of it


def ranks_of(leaves: list[Any]) -> int:
    """How many the group has that stands among a collective's arguments."""
    objects = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
    (group,) = [each for each in objects if "ProcessGroup" in str(each._type())]
    return ProcessGroup.unbox(group).size()


def run_of_case(key: str) -> tuple[RunConfig, Layout]:
    ranks, settings = CASES[key]
    run, layout = planned_run(ranks, **settings)
    if not key.endswith(FROZEN):
        return run, layout
    media: Any = run.model.media
    tower = replace(media.vision_encoder, freeze=True)
    return replace(run, model=replace(run.model, mm_cfg=replace(media, vision_encoder=tower))), layout  # type: ignore[call-arg]


RUNS = {key: run_of_case(key) for key in CASES}


def stepped(runs: list[tuple[RunConfig, Layout]]) -> list[Counter[str]]:
    found = []
    for run, layout in runs:
        groups.initialize(layout, seed=1)
        engine, batches = build_engine(run, layout), batches_of(run, layout)
        engine.step(batches, lr=0.0)
        with SentBytes() as sent:
            engine.step(batches, lr=0.0)
        found.append(sent.bytes)
        groups.shut_down()
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Counter[str]]]:
    """What each rank of each run sent in a step."""
    found = {}
    for ranks in (2, 4):
        some = {key: run for key, run in RUNS.items() if run[1].world_size == ranks}
        results = run_ranks(stepped, ranks, list(some.values()))
        found |= dict(zip(some, zip(*results, strict=True), strict=True))
    return found


@pytest.mark.parametrize("key", RUNS)
def test_a_rank_sends_what_was_planned(key: str, measured: dict[str, list[Counter[str]]]) -> None:
    (run, layout), parts = RUNS[key], count(RUNS[key][0], RUNS[key][1].tensor)
    case, replicas = case_for(run, layout, PlanConfig()), max(layout.replicas, layout.expert_data)
    shared = {"tensor": layout.tensor, "context": layout.context, "expert": layout.expert * layout.expert_tensor}
    tied = layout.pipeline if run.model.share_embeddings_and_output_weights else 1
    shared |= {"pipeline": layout.pipeline, "gradients": max(replicas, tied), "weights": replicas}
    for stage in range(layout.pipeline):
        planned = communication.of_step(case, parts.of_stage(layout, stage), stage)
        sent = measured[key][stage * layout.world_size // layout.pipeline]
        assert sum(planned.values()) == pytest.approx(sent.total(), rel=0.02), (planned, sent)
        assert {kind for kind, size in planned.items() if size} <= {kind for kind, ranks in shared.items() if ranks > 1}
