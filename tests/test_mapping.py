"""Weight rules: both directions are inverse, a slice reads no more than itself, and nothing is left unsaid."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import InMemory, Slices
from nemo_vlm.mapping import Ours, Reshape, Stacked, Swapped, Theirs, fuse_gate_up, fuse_qkv, rename

HEADS, GROUPS, SIZE, WIDTH, FFN, EXPERTS = 6, 2, 4, 5, 7, 3
RULES = [
    fuse_qkv("qkv", ["q", "k", "v"], HEADS, GROUPS, SIZE, (WIDTH,)),
    fuse_qkv("qkv_bias", ["qb", "kb", "vb"], HEADS, GROUPS, SIZE, ()),
    fuse_gate_up("fc1", "gate", "up", FFN, (WIDTH,)),
    rename("norm", "their_norm", (WIDTH,)),
    Reshape("class_token", (1, 1, WIDTH), "class", (WIDTH,)),
    Swapped("fc2", (EXPERTS, WIDTH, FFN), "down"),
    Stacked(
        "experts_fc1",
        tuple(fuse_gate_up("one", f"gate{expert}", f"up{expert}", FFN, (WIDTH,)) for expert in range(EXPERTS)),
    ),
]
THEIRS = {
    name: torch.randn(shape)
    for name, shape in {
        "q": (HEADS * SIZE, WIDTH),
        "k": (GROUPS * SIZE, WIDTH),
        "v": (GROUPS * SIZE, WIDTH),
        "qb": (HEADS * SIZE,),
        "kb": (GROUPS * SIZE,),
        "vb": (GROUPS * SIZE,),
        "gate": (FFN, WIDTH),
        "up": (FFN, WIDTH),
        "their_norm": (WIDTH,),
        "class": (WIDTH,),
        "down": (EXPERTS, FFN, WIDTH),
        **{f"{part}{expert}": (FFN, WIDTH) for part in ("gate", "up") for expert in range(EXPERTS)},
    }.items()
}


class Counting(InMemory):
    """Counts the elements that are read."""

    count = 0

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        found = super().read(name, slices)
        Counting.count += found.numel()
        return found


def test_there_and_back_is_bit_equal() -> None:
    ours = Ours(RULES, InMemory(THEIRS))
    back = Theirs(RULES, ours)
    assert back.names() == set(THEIRS)
    for name, tensor in THEIRS.items():
        assert torch.equal(back.read(name), tensor)
        assert back.shape(name) == tensor.shape


def test_query_groups_stand_one_after_another() -> None:
    """By hand: [q0 q1 q2 k0 v0] [q3 q4 q5 k1 v1], heads of SIZE rows."""
    q, k, v = (THEIRS[name].unflatten(0, (-1, SIZE)) for name in "qkv")
    expected = torch.cat([q[0:3].flatten(0, 1), k[0], v[0], q[3:6].flatten(0, 1), k[1], v[1]])
    assert torch.equal(Ours(RULES, InMemory(THEIRS)).read("qkv"), expected)


def test_experts_are_turned_and_stacked() -> None:
    ours = Ours(RULES, InMemory(THEIRS))
    assert torch.equal(ours.read("fc2")[1], THEIRS["down"][1].T)
    assert torch.equal(ours.read("experts_fc1")[2], torch.cat([THEIRS["gate2"], THEIRS["up2"]]))


def test_every_slice_is_right_and_reads_only_itself() -> None:
    ours, whole = Ours(RULES, Counting(THEIRS)), Ours(RULES, InMemory(THEIRS))
    for name in ("qkv", "qkv_bias", "fc1", "norm", "fc2", "experts_fc1"):
        rows = whole.shape(name)[0]
        pairs = itertools.combinations if "experts" in name else itertools.combinations_with_replacement
        for first, last in pairs(range(rows + 1), 2):
            slices = (slice(first, last), *(slice(1, 3) for _ in whole.shape(name)[1:]))
            Counting.count = 0
            part = ours.read(name, slices)
            assert torch.equal(part, whole.read(name)[slices])
            assert Counting.count == part.numel()
    with pytest.raises(AssertionError):
        ours.read("fc2", (slice(0, 1), slice(1, 3)))  # axes could not be told apart
    theirs = Theirs(RULES, whole)
    for name in ("q", "up1"):
        assert torch.equal(theirs.read(name, (slice(3, 6), slice(0, 2))), THEIRS[name][3:6, 0:2])
    down = (slice(1, 2), slice(3, 5), slice(0, 3))
    assert torch.equal(theirs.read("down", down), THEIRS["down"][down])


@pytest.mark.parametrize(
    "broken, message",
    [
        ({name: tensor for name, tensor in THEIRS.items() if name != "k"}, "x: tensors are missing: k"),
        (THEIRS | {"extra": torch.zeros(1)}, "x: the model has no place for these tensors: extra"),
        (
            THEIRS | {"k": torch.zeros(3, WIDTH)},
            r"x: the tensor 'k' has shape \(3, 5\), the configuration needs \(8, 5\)",
        ),
    ],
    ids=["missing", "left over", "wrong shape"],
)
def test_both_sides_are_used_wholly(broken: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ours(RULES, InMemory(broken, "x"))
