"""Which ranks form which group, as Megatron orders them; no rank is started to ask."""

from __future__ import annotations

from megatron.core.parallel_state import RankGenerator

from nemo_vlm.layout import Layout

ORDER = "tp-cp-ep-dp-pp"  # initialize_model_parallel's default: tensor-parallel ranks are neighbours


def rank_groups(layout: Layout) -> dict[str, list[list[int]]]:
    """The ranks of every tensor-, context-, pipeline- and data-parallel group, and of experts, where they have own."""
    generator = RankGenerator(
        tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=layout.context, order=ORDER
    )
    tokens = {"tensor": "tp", "context": "cp", "pipeline": "pp", "data": "dp"}
    groups = {name: generator.get_ranks(token) for name, token in tokens.items()}
    if not layout.experts_apart:
        return groups
    generator = RankGenerator(
        tp=layout.expert_tensor, ep=layout.expert, dp=layout.expert_data, pp=layout.pipeline, cp=1, order=ORDER
    )
    tokens = {"expert_tensor": "tp", "expert": "ep", "expert_data": "dp"}
    return groups | {name: generator.get_ranks(token) for name, token in tokens.items()}


def first_replica(layout: Layout) -> list[list[int]]:
    """The first ranks that hold every weight, by pipeline stage: tensor-parallel ones, more where experts take more."""
    pipelines = rank_groups(layout)["pipeline"][: layout.ranks_of_copy]
    return [list(stage) for stage in zip(*pipelines, strict=True)]
