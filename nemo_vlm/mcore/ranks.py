"""Which ranks form which group, as Megatron orders them; no rank is started to ask."""

from __future__ import annotations

from megatron.core.parallel_state import RankGenerator

from nemo_vlm.layout import Layout

ORDER = "tp-cp-ep-dp-pp"  # initialize_model_parallel's default: tensor-parallel ranks are neighbours


def rank_groups(layout: Layout) -> dict[str, list[list[int]]]:
    """The ranks of every tensor-, context-, pipeline- and data-parallel group."""
    generator = RankGenerator(
        tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=layout.context, order=ORDER
    )
    tokens = {"tensor": "tp", "context": "cp", "pipeline": "pp", "data": "dp"}
    return {name: generator.get_ranks(token) for name, token in tokens.items()}


def first_replica(layout: Layout) -> list[list[int]]:
    """The ranks that hold the first copy of the model, by pipeline stage and tensor-parallel rank."""
    pipelines = rank_groups(layout)["pipeline"][: layout.tensor]
    return [list(stage) for stage in zip(*pipelines, strict=True)]
