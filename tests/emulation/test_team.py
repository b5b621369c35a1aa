"""csrc/cuda/team.h: how threads of a block, a cluster and several blocks without a cluster exchange sums.

Every barrier and count is needed: where the emulated device skips one (Kernels.fault), a sum is wrong in some order.
"""

from __future__ import annotations

import pytest
import torch

from emulation.cases import ORDERS
from emulation.harness import Device, Kernels

# Blocks of a team, and whether the device has clusters.
TEAMS = {"block": (1, False), "cluster": (4, True), "blocks": (4, False)}
# How often a thread of a team calls a primitive in two sums, and in the constructor before.
CALLS = {
    ("block", "barrier"): 2,
    ("cluster", "cluster_barrier"): 1 + 2,
    ("blocks", "barrier"): 2 + 2 * 2,
    ("blocks", "arrive"): 2,
    ("blocks", "await"): 2,
}


def is_right(kernels: Kernels, team: str, in_one_room: bool = False) -> bool:
    """Whether two sums are right in every order of threads."""
    blocks, clusters = TEAMS[team]
    kernels.set_device(*Device(clusters=clusters))
    thread = torch.arange(blocks * 256, dtype=torch.float64)
    right = True
    for order in ORDERS:
        kernels.set_order(*order)
        try:
            sums = kernels.two_sums(blocks, in_one_room)
        except RuntimeError:
            return False
        right &= bool((sums == (thread + len(thread)).sum()).all())
    return right


@pytest.mark.parametrize("team", TEAMS)
def test_sums(kernels: Kernels, team: str) -> None:
    assert is_right(kernels, team)


@pytest.mark.parametrize("team", TEAMS)
def test_sums_take_turns_in_two_rooms(kernels: Kernels, team: str) -> None:
    assert not is_right(kernels, team, in_one_room=True)


@pytest.mark.parametrize(("team", "primitive"), CALLS)
def test_every_call_is_needed(kernels: Kernels, team: str, primitive: str) -> None:
    calls = CALLS[team, primitive]
    for call in range(calls + 1):
        with kernels.fault(primitive, call):
            assert is_right(kernels, team) == (call == calls), f"{primitive} {call}"
    assert is_right(kernels, team)
