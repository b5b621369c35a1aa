"""csrc/cuda/pointwise.cu and scale.cu: the drop-in, and gradients that are scaled in place."""

import pytest
import torch
from torch import Tensor

from emulation.cases import DTYPES, ORDERS, Outputs, assert_losses, assert_same, each_dtype, placed
from emulation.harness import Guarded, Kernels, accumulation_dtype
from kldiv_ext import reference


def log_probabilities(shape: list[int], dtype: torch.dtype, log_target: bool) -> tuple[Tensor, Tensor]:
    """An input and a target, a fifth of which is a probability of 0."""
    input, target = (torch.randn(shape, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    target.view(-1)[::5] = -torch.inf
    return input.to(dtype), (target if log_target else target.exp()).to(dtype)


@pytest.mark.parametrize("log_target", [False, True])
@each_dtype(*DTYPES)
@pytest.mark.parametrize("shape", [[1, 1], [1, 7], [3, 8], [5, 333], [2, 4099]], ids=str)
def test_kl_div(kernels: Kernels, shape: list[int], dtype: torch.dtype, log_target: bool) -> None:
    input, target = log_probabilities(shape, dtype, log_target)
    dead = target == (-torch.inf if log_target else 0)
    input[dead] = -torch.inf  # has no effect
    leaves = [input.double().requires_grad_(), target.double().requires_grad_()]
    terms = reference.kl_div(leaves[0], leaves[1], reduction="none", log_target=log_target)
    rtol, atol = max(2 * torch.finfo(dtype).eps, 1e-12), 2 * torch.finfo(accumulation_dtype(input)).eps

    out = kernels.pointwise(input, target, log_target, "terms", scale=0.25)["terms"]
    assert_losses(out, 0.25 * terms, rtol, atol)
    loss = kernels.pointwise(input, target, log_target, "loss", scale=0.25)["loss"]
    assert_losses(loss, 0.25 * terms.sum(), 1e-5, 1e-6)

    weights = torch.randn(shape, dtype=dtype)
    for grad_output in (torch.tensor(0.5, dtype=loss.dtype), weights, weights[:1, :1].expand(shape)):
        of_input, of_target = torch.autograd.grad((terms * grad_output).sum(), leaves, retain_graph=True)
        both = kernels.pointwise(input, target, log_target, "grad_input", "grad_target", grad_output=grad_output)
        assert_losses(both["grad_input"], of_input, rtol, atol)
        assert_losses(both["grad_target"], of_target.masked_fill(dead, 0), rtol, 1e-5)
        without_input = kernels.pointwise(None, target, log_target, "grad_input", grad_output=grad_output)
        assert_same(without_input, both, "grad_input")


@each_dtype(*DTYPES)
def test_bits_do_not_depend_on_order_or_place(kernels: Kernels, dtype: torch.dtype) -> None:
    shape = [3, 2999]
    tensors = (*log_probabilities(shape, dtype, False), torch.randn(shape, dtype=dtype))

    def run(input: Tensor, target: Tensor, grad_output: Tensor, offset: int = 0) -> Outputs:
        forward = kernels.pointwise(input, target, False, "loss", offset=offset)
        forward |= kernels.pointwise(input, target, False, "terms", offset=offset)
        options = {"grad_output": grad_output, "offset": offset}
        return forward | kernels.pointwise(input, target, False, "grad_input", "grad_target", **options)

    expected = run(*tensors)
    for order in ORDERS[1:]:
        kernels.set_order(*order)
        assert_same(run(*tensors), expected)
    for offset in (1, 3):
        assert_same(run(*(placed(t, offset) for t in tensors), offset), expected)
    assert_same(run(*(t.t().contiguous().t() for t in tensors)), expected)
    assert_same(run(*(t.reshape(-1, 1).expand(-1, 2)[:, 0].view(shape) for t in tensors)), expected)
    if dtype != torch.float64:
        input, target, _ = tensors
        assert_same(kernels.pointwise(input, target.float(), False, "loss"), expected, "loss")


def test_kl_div_of_nothing(kernels: Kernels) -> None:
    assert kernels.pointwise(torch.empty(0, 4), torch.empty(0, 4), False, "loss")["loss"] == 0


@each_dtype(*DTYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 17, 5000])
def test_scale(kernels: Kernels, count: int, dtype: torch.dtype) -> None:
    for offset in (0, 1, 5):
        for factor in (torch.tensor(0.3), torch.tensor(-7.0, dtype=torch.float64)):
            guarded = Guarded(offset)
            gradient = guarded.new([count], dtype).copy_(torch.randn(count))
            expected = (gradient.to(accumulation_dtype(gradient)) * factor).to(dtype)
            kernels.scale_(gradient, factor)
            guarded.check()
            assert torch.equal(gradient, expected)


def test_scale_by_one_writes_nothing(kernels: Kernels) -> None:
    bits = torch.full([100], 0x7F81, dtype=torch.int16)  # a signalling NaN, which a write would make quiet
    kernels.scale_(bits.view(torch.bfloat16), torch.tensor(1.0))
    assert (bits == 0x7F81).all()
