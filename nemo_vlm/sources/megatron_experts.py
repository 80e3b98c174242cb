"""Experts in the files of ranks, where each is a tensor of its own; elsewhere a layer's are one with an axis of them.

    decoder.layers.0.mlp.experts.experts.linear_fc1.weight            ours, and torch_dist's: [experts, ...]
    decoder.layers.0.mlp.experts.linear_fc1.weight7                   Megatron's TEGroupedMLP
    decoder.layers.0.mlp.experts.local_experts.7.linear_fc1.weight    its SequentialMLP

A file has all experts where no parallelism shares them out; RankFiles reads no others.
"""

from __future__ import annotations

import re
from collections import defaultdict

from nemo_vlm.formats.reader import Joined, Reader, Renamed
from nemo_vlm.formats.stacked import EXPERTS, Unstacked
from nemo_vlm.mapping import Ours, Stacked, rename

SINGLE = re.compile(
    r"(?P<front>(?:|.*\.)mlp\.experts\.)(?:local_experts\.(?P<number>\d+)\.)?"
    r"(?P<module>linear_fc[12])\.weight(?P<last>(?(number)|\d+))"
)


def with_joint_experts(reader: Reader) -> Reader:
    """A layer's experts as one tensor.

    Raises:
        ConfigError: they are not all of one shape.
    """
    layers: dict[str, dict[int, str]] = defaultdict(dict)
    for name in reader.names():
        if found := SINGLE.fullmatch(name):
            joint = f"{found['front']}experts.{found['module']}.weight"
            layers[joint][int(found["number"] or found["last"])] = name
    if not layers:
        return reader
    rules = []
    for joint, experts in layers.items():
        shape = reader.shape(experts[min(experts)])
        rules.append(Stacked(joint, tuple(rename("", name, shape) for _, name in sorted(experts.items()))))
    singles = {name for rule in rules for name in rule.theirs}
    rest = Renamed(reader, {name: name for name in reader.names() - singles})
    return Joined([rest, Ours(rules, Renamed(reader, {name: name for name in singles}))])


def with_single_experts(reader: Reader) -> Unstacked:
    """Each expert's tensors as TEGroupedMLP names them."""
    places: dict[str, tuple[str, int | None]] = {}
    for name in reader.names():
        if found := EXPERTS.fullmatch(name):
            for expert in range(reader.shape(name)[0]):
                places[f"{found['front']}{found['module']}.weight{expert}"] = (name, expert)
        else:
            places[name] = (name, None)
    return Unstacked(reader, places)
