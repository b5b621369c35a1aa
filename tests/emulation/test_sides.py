"""csrc/cuda/sides.h and groups.h: where logits are read and gradients are written, in any layout and dtype."""

import itertools

import pytest
import torch
from torch import Tensor

from emulation import cases
from emulation.cases import FORWARD_KL, JSD, REVERSE_KL, Options, Outputs, assert_same, logits, oracle, placed
from emulation.harness import BOTH, STUDENT, Kernels, accumulation_dtype


@cases.each_dtype(*cases.DTYPES)
@pytest.mark.parametrize("columns", [7, 33, 257, 1000, 4097])
def test_bits_do_not_depend_on_order_or_place(kernels: Kernels, columns: int, dtype: torch.dtype) -> None:
    rows = 3
    student, teacher = logits(rows, columns, dtype)

    def run(student: Tensor, teacher: Tensor, offset: int = 0) -> Outputs:
        return kernels.distillation(student, teacher, gradients=BOTH, reduce=True, offset=offset, **JSD)

    expected = run(student, teacher)
    for order in cases.ORDERS[1:]:
        kernels.set_order(*order)
        assert_same(run(student, teacher), expected)
    for offset in (1, 2, 3):
        assert_same(run(placed(student, offset), placed(teacher, 3 - offset), offset), expected)
    padded = [torch.full([rows, columns + 5], torch.nan, dtype=dtype)[:, :columns].copy_(t) for t in (student, teacher)]
    assert_same(run(*padded), expected)
    transposed = [t.t().contiguous().t() for t in (student, teacher)]
    result = run(*transposed)
    assert_same(run(transposed[0], teacher), result)
    if dtype in cases.HALF:  # logits that are not contiguous are read like float32
        cases.assert_close(result, {name: tensor.double() for name, tensor in expected.items()}, atol=0)
    else:
        assert_same(result, expected)
    flipped = run(student.flip(0), teacher.flip(0))  # a row does not depend on the others
    assert_same(cases.rows_of(flipped, [2, 1, 0]), expected, "row_loss", "grad_student")


@pytest.mark.parametrize("dtypes", list(itertools.permutations(cases.DTYPES, 2)), ids=str)
def test_two_dtypes(kernels: Kernels, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (t.to(dtype) for t, dtype in zip(logits(4, 300, torch.float32), dtypes, strict=True))
    out = kernels.distillation(student, teacher, gradients=BOTH, **REVERSE_KL)
    cases.assert_close(out, oracle(student, teacher, **REVERSE_KL), rtol=1e-5)
    wide = accumulation_dtype(student, teacher)
    widened = kernels.distillation(student.to(wide), teacher.to(wide), gradients=STUDENT, **REVERSE_KL)
    assert torch.equal(out["row_loss"], widened["row_loss"])
    assert torch.equal(out["grad_student"], widened["grad_student"].to(student.dtype))


def test_leading_dimensions(kernels: Kernels) -> None:
    student, teacher = torch.randn(3, 4, 2, 40).permute(2, 0, 1, 3), torch.randn(2, 3, 4, 40)
    out = kernels.distillation(student, teacher, gradients=STUDENT)
    assert_same(out, kernels.distillation(student.reshape(-1, 40), teacher.reshape(-1, 40), gradients=STUDENT))


def test_rows_more_than_2_to_the_31_elements_apart(kernels: Kernels) -> None:
    stride = 2**31 + 3
    far = torch.empty(2 * stride, dtype=torch.float16).as_strided([2, 9], [stride, 1])  # only two rows are touched
    student, teacher = logits(2, 9, torch.float16)
    expected = kernels.distillation(student, teacher, gradients=STUDENT)
    assert_same(kernels.distillation(far.copy_(student), teacher, gradients=STUDENT), expected)


@pytest.mark.parametrize("columns", [9, 2051, 2056])
@cases.each_divergence(FORWARD_KL, JSD)
def test_where_gradients_go(both_tiers: Kernels, divergence: Options, columns: int) -> None:
    """Rounded to another dtype, and over the logits: the same bits in every order of threads."""
    student, teacher = logits(5, columns, torch.float32)
    options = {"labels": torch.tensor([0, columns - 1, 3, 7, 8]), "hard_scale": 0.5, "temperature": 1.5, **divergence}
    options["grad_output"] = torch.tensor([1.0, -2.0, 0.5, 3.0, 1e-3])
    for gradients in (STUDENT, BOTH):
        options["gradients"] = gradients
        both_tiers.set_order(*cases.ORDERS[0])
        expected = both_tiers.distillation(student, teacher, **options)
        for order in cases.ORDERS:
            both_tiers.set_order(*order)
            over = both_tiers.distillation(student.clone(), teacher, in_place=True, **options)
            assert_same(over, expected)
            for dtype in cases.HALF:
                narrow = both_tiers.distillation(student, teacher, gradient_dtype=dtype, **options)
                rounded = {name: t.to(dtype) if name.startswith("grad") else t for name, t in expected.items()}
                assert_same(narrow, rounded)
