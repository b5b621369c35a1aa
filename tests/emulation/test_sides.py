"""csrc/cuda/sides.h and groups.h: where logits are read and gradients are written, in any layout and dtype."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from emulation.cases import (
    EVERY_DTYPE,
    HALF,
    ORDERS,
    assert_close,
    assert_losses,
    assert_same,
    logits,
    oracle,
    placed,
)
from emulation.harness import BOTH, DTYPES, STUDENT, Kernels, accumulation_dtype


@EVERY_DTYPE
@pytest.mark.parametrize("columns", [7, 33, 257, 1000, 4097])
def test_bits_do_not_depend_on_order_or_place(kernels: Kernels, columns: int, dtype: torch.dtype) -> None:
    rows = 3
    student, teacher = logits(rows, columns, dtype)

    def run(student: Tensor, teacher: Tensor, offset: int = 0) -> dict[str, Tensor]:
        return kernels.distillation(student, teacher, "jsd", 0.3, gradients=BOTH, reduce=True, offset=offset)

    expected = run(student, teacher)
    for order in ORDERS[1:]:
        kernels.set_order(*order)
        assert_same(run(student, teacher), expected)
    for offset in (1, 2, 3):
        assert_same(run(placed(student, offset), placed(teacher, 3 - offset), offset), expected)
    padded = [torch.full([rows, columns + 5], torch.nan, dtype=dtype)[:, :columns].copy_(t) for t in (student, teacher)]
    assert_same(run(*padded), expected)
    transposed = [t.t().contiguous().t() for t in (student, teacher)]
    result = run(*transposed)
    assert_same(run(transposed[0], teacher), result)
    if dtype in HALF:  # logits that are not contiguous are read like float32
        assert_losses(result["row_loss"], expected["row_loss"], atol=0)
        assert_close(result, {name: tensor.double() for name, tensor in expected.items()})
    else:
        assert_same(result, expected)
    flipped = run(student.flip(0), teacher.flip(0))
    assert torch.equal(flipped["row_loss"].flip(0), expected["row_loss"])  # whatever the other rows are
    assert torch.equal(flipped["grad_student"].flip(0), expected["grad_student"])


@pytest.mark.parametrize("dtypes", itertools.permutations(DTYPES, 2), ids=str)
def test_two_dtypes(kernels: Kernels, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (t.to(dtype) for t, dtype in zip(logits(4, 300, torch.float32), dtypes, strict=True))
    out = kernels.distillation(student, teacher, "reverse_kl", gradients=BOTH)
    assert_close(out, oracle(student, teacher, "reverse_kl"), rtol=1e-5)
    wide = accumulation_dtype(student, teacher)
    widened = kernels.distillation(student.to(wide), teacher.to(wide), "reverse_kl", gradients=STUDENT)
    assert torch.equal(out["row_loss"], widened["row_loss"])
    assert torch.equal(out["grad_student"], widened["grad_student"].to(student.dtype))


def test_leading_dimensions(kernels: Kernels) -> None:
    student, teacher = torch.randn(3, 4, 2, 40).permute(2, 0, 1, 3), torch.randn(2, 3, 4, 40)
    out = kernels.distillation(student, teacher, gradients=STUDENT)
    flat = kernels.distillation(student.reshape(-1, 40), teacher.reshape(-1, 40), gradients=STUDENT)
    assert_same(out, flat)


def test_rows_more_than_2_to_the_31_elements_apart(kernels: Kernels) -> None:
    stride = 2**31 + 3
    far = torch.empty(2 * stride, dtype=torch.float16).as_strided([2, 9], [stride, 1])  # only two rows are touched
    student, teacher = logits(2, 9, torch.float16)
    expected = kernels.distillation(student, teacher, gradients=STUDENT)
    assert_same(kernels.distillation(far.copy_(student), teacher, gradients=STUDENT), expected)


@pytest.mark.parametrize("columns", [9, 2051, 2056])
@pytest.mark.parametrize(("divergence", "parameter"), [("forward_kl", 0.0), ("jsd", 0.3)])
def test_where_gradients_go(both_tiers: Kernels, divergence: str, parameter: float, columns: int) -> None:
    """Rounded to another dtype, and over the logits: the same bits in every order of threads."""
    kernels = both_tiers
    student, teacher = logits(5, columns, torch.float32)
    options: dict[str, Any] = {
        "divergence": divergence,
        "parameter": parameter,
        "temperature": 1.5,
        "labels": torch.tensor([0, columns - 1, 3, 7, 8]),
        "hard_scale": 0.5,
        "grad_output": torch.tensor([1.0, -2.0, 0.5, 3.0, 1e-3]),
    }
    for gradients in (STUDENT, BOTH):
        options["gradients"] = gradients
        kernels.set_order(*ORDERS[0])
        expected = kernels.distillation(student, teacher, **options)
        for order, dtype in itertools.product(ORDERS, HALF):
            kernels.set_order(*order)
            narrow = kernels.distillation(student, teacher, gradient_dtype=dtype, **options)
            for name, tensor in expected.items():
                assert torch.equal(narrow[name], tensor.to(dtype) if name.startswith("grad") else tensor), name
            assert_same(kernels.distillation(student.clone(), teacher, in_place=True, **options), expected)
