"""csrc/cuda/team.h: how the threads of a block, of a cluster and of blocks without a cluster exchange sums.

Every barrier and count is needed: where the emulated device skips one (Kernels.fault), a sum is wrong in some order.
"""

import pytest
import torch

from emulation.cases import ORDERS
from emulation.harness import Device, Kernels

# Blocks of a team, and whether the device has clusters.
TEAMS = {"block": (1, False), "cluster": (4, True), "blocks": (4, False)}
# How often a thread of a team calls a primitive: in the constructor, then in two sums.
CALLS = {
    ("block", "barrier"): 0 + 2,
    ("cluster", "cluster_barrier"): 1 + 2,
    ("blocks", "barrier"): 2 + 4,
    ("blocks", "arrive"): 0 + 2,
    ("blocks", "await"): 0 + 2,
}


def is_right(kernels: Kernels, team: str, in_one_room: bool = False) -> bool:
    """Whether two sums are right in every order of threads."""
    blocks, clusters = TEAMS[team]
    kernels.set_device(*Device(clusters=clusters))
    out = torch.empty(2, 256 * blocks, dtype=torch.float64)  # of two teams
    thread = torch.arange(256.0 * blocks)
    expected = (thread + len(thread)).sum()
    for order in ORDERS:
        kernels.set_order(*order)
        try:
            kernels.two_sums(blocks, in_one_room, out)
        except RuntimeError:
            return False
        if (out != expected).any():
            return False
    return True


@pytest.mark.parametrize("team", TEAMS)
def test_sums_take_turns_in_two_rooms(kernels: Kernels, team: str) -> None:
    assert is_right(kernels, team)
    assert not is_right(kernels, team, in_one_room=True)


@pytest.mark.parametrize(("team", "primitive"), CALLS)
def test_every_call_is_needed(kernels: Kernels, team: str, primitive: str) -> None:
    for call in range(CALLS[team, primitive]):
        with kernels.fault(primitive, call):
            assert not is_right(kernels, team), f"{primitive} {call}"
    with kernels.fault(primitive, CALLS[team, primitive]):  # there is no such call
        assert is_right(kernels, team)
