"""The accuracy that kldiv_ext promises, and the accuracy results that miss it."""

import math
from typing import Any

# Relative L2 error of the gradient of every row.
GRADIENT_PROMISE = 4e-3
# Error of the loss: relative for losses from AWAY on, relative down to BELOW, absolute below that.
LOSS_PROMISE, AWAY = 1e-5, 1e-4
NEAR_PROMISE, BELOW = 1e-3, 1e-6
ABSOLUTE_PROMISE = 1e-9


def first_order(divergence: str) -> bool:
    """Total variation is of first order in the logits' distance, the others of second; its gradient jumps at p = q."""
    return divergence == "total_variation"


def loss_promise(divergence: str, loss: float) -> float:
    """The largest absolute error of the loss."""
    if loss >= (math.sqrt(AWAY) if first_order(divergence) else AWAY):
        return LOSS_PROMISE * loss
    return NEAR_PROMISE * loss if loss >= BELOW else ABSOLUTE_PROMISE


def gradient_promise(divergence: str, dtype: str) -> float:
    """The largest relative error of a row's gradient.

    A gradient that jumps has none where p = q up to rounding; 16-bit logits never are that close.
    """
    jumps = first_order(divergence) and dtype not in ("bfloat16", "float16")
    return math.inf if jumps else GRADIENT_PROMISE


def missed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of kldiv_ext that miss a promise."""
    return [record for record in records if record["contender"] == "kldiv_ext" and record["status"] != "ok"]


def describe(record: dict[str, Any]) -> str:
    """An accuracy result on one line."""
    problem = "{divergence}, {dtype}, V = {vocab}, KL = {level:.1e}".format_map(record)
    if record.get("gradient_error") is None or record.get("loss_error") is None:
        return f"{problem}: {record['status']}"
    off = record["loss_error"] * record["loss"]
    loss = f"loss {record['loss']:.1e} off by {off:.1e} ({record['loss_error']:.1e})"
    return f"{problem}: {loss}, gradient by {record['gradient_error']:.1e}; {record['status']}"
