"""csrc/cuda/walks.h: rows that are read once and stay in shared memory, on devices with clusters and without."""

import pytest
import torch

from emulation import cases
from emulation.cases import H200, HALF, JSD, REVERSE_KL, Options, assert_same, logits, oracle, placed
from emulation.harness import BOTH, STUDENT, Device, Kernels

# A row in one block and in several, with and without an incomplete group.
COLUMNS = (1032, 5003, 8192, 20_008)


@cases.each_dtype(torch.float32, *HALF)
@cases.each_divergence(*cases.DIVERGENCES)
def test_resident_rows(kernels: Kernels, small_device: Device, divergence: Options, dtype: torch.dtype) -> None:
    """With more rows than clusters; the bits do not depend on the number of clusters."""
    options = {"temperature": 1.5, "scale": 0.7, **divergence}
    for order, columns in zip(cases.ORDERS, COLUMNS, strict=True):
        kernels.keep_rows(small_device)
        kernels.set_order(*order)
        blocks, _, cluster, _ = kernels.resident_shape(5, columns, dtype)
        assert 0 < blocks // cluster < 5
        student, teacher = logits(5, columns, dtype)
        both = cases.check(kernels, student, teacher, **options)
        kernels.keep_rows(small_device._replace(multiprocessors=100))
        assert_same(kernels.distillation(student, teacher, gradients=BOTH, reduce=True, **options), both)


@cases.each_dtype(torch.float32, *HALF)
@pytest.mark.parametrize("columns", [2051, 2056])
def test_options_of_resident_rows(kernels: Kernels, small_device: Device, columns: int, dtype: torch.dtype) -> None:
    """Skipped positions between others, labels in and out of range, padding, NaN, any address."""
    kernels.keep_rows(small_device)
    valid = columns - 3 if columns % 8 else columns - 8
    row_scale = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 0.5, 1.0, 1.0, 0.0])
    labels = torch.tensor([7, 0, 7, 7, valid - 1, valid, 11, 3, 7])
    fine, skipped, wrong_label, broken = [1, 4, 6], row_scale == 0, 5, 7
    student, teacher = logits(len(labels), columns, dtype)
    student[:, valid:] = student[skipped] = student[broken, 5] = torch.nan
    options = {"temperature": 2.0, "hard_scale": 0.4, "valid_vocab": valid, **JSD}
    expected = oracle(student[fine], teacher[fine], labels=labels[fine], row_scale=row_scale[fine], **options)
    options |= {"labels": labels, "row_scale": row_scale, "gradients": BOTH}
    out = kernels.distillation(placed(student, 0), placed(teacher, 0), **options)
    cases.assert_close(cases.rows_of(out, fine), expected)
    for gradient in (out["grad_student"], out["grad_teacher"]):
        assert (gradient[skipped] == 0).all() and (gradient[:, valid:] == 0).all()
        assert gradient[broken, :valid].isnan().all()
    assert out["grad_student"][wrong_label, :valid].isnan().all()
    assert (out["row_loss"][skipped] == 0).all() and out["row_loss"][[wrong_label, broken]].isnan().all()
    assert_same(kernels.distillation(placed(student, 1), placed(teacher, 1), offset=1, **options), out)


def test_resident_and_streamed_rows_agree(kernels: Kernels) -> None:
    student, teacher = logits(3, 20_008, torch.float32, 1e-2)
    options = {"gradients": STUDENT, **REVERSE_KL}
    streamed = kernels.distillation(student, teacher, **options)
    kernels.keep_rows(H200)
    resident = kernels.distillation(student, teacher, **options)
    cases.assert_losses(resident["row_loss"], streamed["row_loss"], atol=0)
    torch.testing.assert_close(resident["grad_student"], streamed["grad_student"], rtol=1e-4, atol=1e-9)
    clusters = kernels.resident_shape(3, 20_008, torch.float32)[:3]
    assert clusters[2] > 1
    kernels.keep_rows(H200._replace(clusters=False))
    assert kernels.resident_shape(3, 20_008, torch.float32)[:3] == clusters
    assert_same(kernels.distillation(student, teacher, **options), resident)
