"""A plan as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from nemo_vlm.planning.hardware import GIB

KEPT = ("weights", "gradients", "optimizer")
IN_A_STEP = ("activations", "buffers")  # of a run that trains


def report(plan: dict[str, Any]) -> Iterator[str]:
    """The lines of a plan as planning.plan.describe gives it."""
    layout, batch = plan["layout"], plan["batch"]
    parts = ", ".join(f"{name} {count:,}" for name, count in plan["total_parameters_by_part"].items())
    active = f", {plan['active_parameters']:,} of them active" * (plan["active_parameters"] < plan["total_parameters"])
    yield f"{plan['name']}: {plan['family']}, {plan['total_parameters']:,} parameters ({parts}){active}"
    nodes, ranks_per_node = layout["num_nodes"], layout["ranks_per_node"]
    yield f"world size {plan['world_size']} (nodes {nodes} x ranks {ranks_per_node}): {sizes(layout)}"
    yield f"layers of each stage: {', '.join(map(str, layout['stage_layers']))}"
    groups = (f"{name} {shortened(ranks[0])}" for name, ranks in plan["groups"].items())
    yield f"groups, the first of each kind: {'; '.join(groups)}"
    count, ranks, samples = (batch[key] for key in ("num_micro_batches", "data_parallel_size", "global_batch_size"))
    if batch["packing"]:
        yield f"global batch {samples}, packed into some {count} micro-batches x data-parallel ranks {ranks}"
    else:
        size = batch["micro_batch_size"]
        yield f"global batch {samples} = micro-batch {size} x micro-batches {count} x data-parallel ranks {ranks}"
    if "step_time" in plan:
        yield from outlook(plan)
    yield from plan["notes"]
    trains = plan["stages"][0]["bytes"]["activations"] is not None
    counted = "at the peak of a step" if trains else "activations not counted"
    yield f"GiB of each rank in precision {plan['precision']}, {counted}:"
    columns = KEPT + IN_A_STEP * trains
    kinds = ("tensor", "expert") if layout["experts_apart"] else ("tensor",)
    header = ("stage", *(f"{kind} ranks" for kind in kinds), "parameters held", *columns, "total")
    yield from aligned([header, *rows(plan["stages"], kinds, columns)])


def outlook(plan: dict[str, Any]) -> Iterator[str]:
    """What is expected of a step, and the rules that are broken."""
    time, flops, seen = plan["step_time"], dict(plan["flops"]), plan["visual_tokens"]
    total = flops.pop("total")
    each = time["tokens_per_sec"] / plan["world_size"]
    shares = ", ".join(f"{part} {100 * count / total:.1f} %" for part, count in flops.items() if count)
    sent = ", ".join(f"{kind} {count / GIB:.2f} GiB" for kind, count in plan["communication"].items() if count)
    yield (
        f"expected on {time['hardware']}: {time['seconds']:.3f} s a step, {each:,.0f} tokens/s a GPU, "
        f"MFU {100 * time['mfu']:.1f} % (HFU {100 * time['hfu']:.1f} %), bubble {100 * plan['bubble']:.1f} %"
    )
    computed = f"{total / 1e15:,.2f} PFLOP" if total >= 1e13 else f"{total / 1e12:,.3f} TFLOP"
    yield f"a step computes {computed}: {shares}" + f"; sees {seen:,} visual tokens" * bool(seen)
    yield f"a rank sends in it {sent or 'nothing'}"
    yield f"of the step {spent(time)}"
    yield from (f"against a rule: {rule}" for rule in plan["rules"])


def spent(time: dict[str, Any]) -> str:
    """What a step's time goes to beside its passes; messages make these longer too."""
    messages, update = (100 * time[key] / time["seconds"] for key in ("waits_for_messages", "optimizer"))
    return f"{messages:.1f} % are messages that nothing hides, {update:.1f} % the optimizer"


def sizes(layout: dict[str, Any]) -> str:
    """Sizes of the layout in words."""
    tensor = f"tensor {layout['tensor']}" + " with sequence parallelism" * layout["sequence_parallel"]
    pipeline = f"pipeline {layout['pipeline']}" + f" x {layout['virtual']} virtual" * (layout["virtual"] > 1)
    context = [f"context {layout['context']}"] if layout["context"] > 1 else []
    fsdp = [f"fsdp {layout['fsdp']} over {layout['shards']}"] if layout["fsdp"] else []
    of_experts = f"expert {layout['expert']} (tensor {layout['expert_tensor']}, data {layout['expert_data']})"
    experts = [of_experts] * layout["experts_apart"]
    return ", ".join([tensor, *context, pipeline, f"data {layout['data']}", *experts, *fsdp])


def shortened(ranks: list[int]) -> str:
    shown = [str(rank) for rank in ranks]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", shown[-1]])


def rows(stages: list[dict[str, Any]], kinds: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """A row for neighbouring ranks of a stage that hold equally much."""

    def holding(entry: dict[str, Any]) -> tuple[int, ...]:
        held = (entry[key] for key in ("parameters", "replicated_parameters", "padding_parameters"))
        return (entry["stage"], sum(held), *(entry["bytes"][column] for column in columns))

    for (stage, held, *num_bytes), entries in groupby(stages, holding):
        alike = list(entries)
        spans = (span([entry[f"{kind}_rank"] for entry in alike]) for kind in kinds)
        yield (str(stage), *spans, f"{held:,}", *(f"{n / GIB:.3f}" for n in (*num_bytes, sum(num_bytes))))


def span(ranks: list[int]) -> str:
    first, last = min(ranks), max(ranks)
    return str(first) if first == last else f"{first}-{last}"


def aligned(table: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
