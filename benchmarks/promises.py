"""What kldiv_ext promises of its accuracy, and which results keep it."""

import math
from typing import Any

# The gradient, relative L2 of every row.
GRADIENT_PROMISE = 4e-3
# The loss, relative: away from 0, and nearer to it; absolute below that.
LOSS_PROMISE, AWAY = 1e-5, 1e-4
NEAR_PROMISE, BELOW = 1e-3, 1e-6
ABSOLUTE_PROMISE = 1e-9


def first_order(divergence: str) -> bool:
    """Of the first order in the distance of the logits, where the others are of the second; its gradient jumps."""
    return divergence == "total_variation"


def loss_promise(divergence: str, loss: float) -> float:
    """How far off the loss may be, absolutely."""
    if loss >= (math.sqrt(AWAY) if first_order(divergence) else AWAY):
        return LOSS_PROMISE * loss
    return NEAR_PROMISE * loss if loss >= BELOW else ABSOLUTE_PROMISE


def gradient_promise(divergence: str, dtype: str) -> float:
    """Where p is q but for rounding a gradient that jumps may be either side's. 16-bit logits are not that close."""
    jumps = first_order(divergence) and dtype not in ("bfloat16", "float16")
    return math.inf if jumps else GRADIENT_PROMISE


def missed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What kldiv_ext did not keep."""
    return [record for record in records if record["contender"] == "kldiv_ext" and record["status"] != "ok"]


def describe(record: dict[str, Any]) -> str:
    """One line on a result of the accuracy command."""
    problem = "{divergence}, {dtype}, V = {vocab}, KL = {kl:.1e}".format_map(record)
    if record.get("gradient_error") is None or record.get("loss_error") is None:
        return f"{problem}: {record['status']}"
    loss = "loss {loss:.1e} off by {loss_error_absolute:.1e} ({loss_error:.1e})".format_map(record)
    return f"{problem}: {loss}, gradient by {record['gradient_error']:.1e}; {record['status']}"
