"""A plan as a picture: the pipeline's schedule on a time axis, and the memory of each rank by kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_vlm.files import written_whole
from nemo_vlm.planning.communication import Case
from nemo_vlm.planning.hardware import GIB
from nemo_vlm.planning.report import sizes, spent
from nemo_vlm.planning.rules import RESERVE
from nemo_vlm.planning.schedule import Piece, Stages, simulate

FORWARD, BACKWARD = ("#9ecae1", "#4292c6", "#08519c"), ("#fdd0a2", "#fd8d3c", "#a63603")  # by chunk, in turn
KINDS = {  # of memory, from below
    "weights": "#4477aa",
    "gradients": "#66ccee",
    "optimizer": "#228833",
    "activations": "#ee6677",
    "buffers": "#ccbb44",
}
WAITS, LIMIT = "#e4e4e4", "#bb2222"
MOST_RANKS = 16  # that are drawn; further ones are left out
LEGIBLE = 72  # passes in a row of the picture, up to which they can be told apart and are numbered


def draw(plan: dict[str, Any], case: Case, path: Path) -> None:
    """Write a PNG.

    Args:
        plan: as planning.plan.describe gives it.
    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    each = plan["stage_seconds"]
    stages = Stages(tuple(each["forward"]), tuple(each["backward"]), case.layout.pipeline)
    rows = min(stages.ranks, MOST_RANKS)
    heights = (1.2 + 0.32 * rows, 3.6)
    figure = Figure(figsize=(13, sum(heights) + 1), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    figure.suptitle(headline(plan), fontsize=11)
    draw_schedule(above, stages, case.num_micro_batches, plan["bubble"])
    draw_memory(below, plan["stages"], case)
    picture = BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # figure.savefig would lay it out twice
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, "wb") as file:
        file.write(picture.getvalue())


def headline(plan: dict[str, Any]) -> str:
    time = plan["step_time"]
    each = time["tokens_per_sec"] / plan["world_size"]
    return (
        f"{plan['name']}: {plan['total_parameters'] / 1e9:.1f} B parameters on {plan['world_size']} x "
        f"{time['hardware'].upper()}: {sizes(plan['layout'])}\n"
        f"{time['seconds']:.3g} s a step, {each:,.0f} tokens/s a GPU, MFU {100 * time['mfu']:.1f} %; "
        f"of the step {spent(time)}"
    )


def shown(stages: Stages, micro_batches: int) -> int:
    """Micro-batches that begin in the picture: whole groups of the pipeline's ranks, as many as can be told apart."""
    passes = 2 * len(stages.forward)  # of a group, in a row
    return min(micro_batches, max(LEGIBLE // passes, 2) * stages.ranks)


def draw_schedule(axis: Any, stages: Stages, micro_batches: int, bubble: float) -> None:
    """A row a stage, a bar a pass, numbered by micro-batch; what stays grey waits.

    Where not all is shown, it ends with the first stage's last forward pass: up to there further micro-batches change
    nothing.
    """
    from matplotlib.patches import Patch

    few = shown(stages, micro_batches)
    pieces, ranks = simulate(stages, few), min(stages.ranks, MOST_RANKS)
    cut = few < micro_batches
    end = max(piece.end for piece in pieces if not cut or (piece.rank == 0 and not piece.backward))
    draw_boxes(axis, [(0, rank - 0.42, end, 0.84) for rank in range(ranks)], facecolors=WAITS)
    draw_passes(axis, [piece for piece in pieces if piece.rank < ranks and piece.start < end], end)
    axis.set(xlim=(0, end), ylim=(ranks - 0.4, -0.6), xlabel="seconds")
    axis.set_yticks(range(ranks), [f"stage {rank}" for rank in range(ranks)])
    first = f"the beginning, {few} of {micro_batches}" if cut else f"all {few}"
    left_out = f", {ranks} of {stages.ranks} stages" if ranks < stages.ranks else ""
    waits = f"over the whole step a stage waits {100 * bubble:.1f} %"
    axis.set_title(f"schedule: {first} micro-batches{left_out}; {waits}", loc="left", fontsize=10)
    named = {"forward": FORWARD[0], "backward": BACKWARD[0], "waits": WAITS}
    later = " (darker: later virtual stages)" if len(stages.forward) > stages.ranks else ""
    handles = [Patch(color=color, label=name + later * (name == "waits")) for name, color in named.items()]
    axis.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False)


def draw_boxes(axis: Any, places: Iterable[tuple[float, float, float, float]], **look: Any) -> None:
    """Rectangles (left, bottom, width, height) as one thing, which is drawn in no time whatever their number."""
    from matplotlib.collections import PolyCollection

    corners = [[(x, y), (x, y + height), (x + width, y + height), (x + width, y)] for x, y, width, height in places]
    axis.add_collection(PolyCollection(corners, **look), autolim=False)


def draw_passes(axis: Any, pieces: Sequence[Piece], whole: float) -> None:
    shades = [(BACKWARD if piece.backward else FORWARD)[piece.chunk % len(FORWARD)] for piece in pieces]
    places = [(piece.start, piece.rank - 0.42, piece.end - piece.start, 0.84) for piece in pieces]
    draw_boxes(axis, places, facecolors=shades, edgecolor="white", linewidth=0.4)
    for piece, color in zip(pieces, shades, strict=True):
        if piece.end - piece.start > whole / 120:
            ink = "black" if color in (FORWARD[0], *BACKWARD[:2]) else "white"
            middle = (piece.start + min(piece.end, whole)) / 2
            look: dict[str, Any] = dict(ha="center", va="center", fontsize=7, color=ink, in_layout=False)
            axis.text(middle, piece.rank, str(piece.micro_batch + 1), **look)


def draw_memory(axis: Any, entries: Sequence[dict[str, Any]], case: Case) -> None:
    """A bar a rank of the first copy of the model, its kinds one on another, under the hardware's limit."""
    limit = case.hardware.memory / GIB
    places, floor = range(len(entries)), [0.0] * len(entries)
    for kind, color in KINDS.items():
        heights = [(entry["bytes"].get(kind) or 0) / GIB for entry in entries]
        if any(heights):
            bars = [(x - 0.4, below, 0.8, height) for x, below, height in zip(places, floor, heights, strict=True)]
            draw_boxes(axis, bars, facecolors=color, label=kind)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    axis.axhline(limit, color=LIMIT, linewidth=1.5)
    ground = dict(facecolor="white", edgecolor="none", pad=1.5)  # a bar may stand behind it
    name = f"{case.hardware.name.upper()}: {limit:.0f} GiB"
    axis.text(-0.45, 1.015 * limit, name, color=LIMIT, va="bottom", fontsize=9, bbox=ground)
    axis.axhspan(limit * (1 - RESERVE), limit, color=LIMIT, alpha=0.1)
    axis.set(ylabel="GiB", xlim=(-0.6, len(entries) - 0.4), ylim=(0, 1.15 * max(limit, *floor)))
    every = -(-len(entries) // 32)
    labels = [f"{entry['rank']}" for entry in entries[::every]]
    axis.set_xticks(list(places)[::every], labels, fontsize=8)
    axis.set_xlabel("rank (the first copy of the model; stages one behind another)")
    axis.set_title("memory of each rank", loc="left", fontsize=10)
    borders = [place + 0.5 for place, (one, other) in enumerate(pairwise(entries)) if one["stage"] != other["stage"]]
    axis.vlines(borders, *axis.get_ylim(), color="#999999", linewidth=0.8, linestyle=":")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(KINDS), fontsize=8, frameon=False)
