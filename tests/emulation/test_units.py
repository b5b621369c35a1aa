"""csrc/cuda/units.h: arithmetic by the special function unit, whose results here err as far as PTX allows."""

import torch
from torch import Tensor

from emulation.harness import Kernels


def small_difference(x: Tensor, difference: Tensor, *series: float) -> Tensor:
    """`difference`; where x is small x² times a series instead."""
    return torch.where(x.abs() < 1e-3, x * x * sum(c * x**i for i, c in enumerate(series)), difference)


def test_relative_errors(kernels: Kernels) -> None:
    x = torch.cat([torch.logspace(-9, 1.3, 40_001, dtype=torch.float64), torch.tensor([0.5, 1.0, 20.0])]).float()

    def units(x: Tensor) -> Tensor:
        return torch.tensor([kernels.module.units(value) for value in x.tolist()])

    def worst(computed: Tensor, exact: Tensor) -> float:
        return float(((computed.double() - exact) / exact).abs().max())

    gap, of_gap = x.double(), units(x)
    assert worst(of_gap[:, 0], torch.exp(-gap)) < 4e-6  # a rounded exponent: eps |x|
    assert worst(of_gap[:, 1], torch.expm1(-gap)) < 5e-7
    excess = small_difference(gap, gap + torch.expm1(-gap), 1 / 2, -1 / 6, 1 / 24)
    assert worst(of_gap[:, 2], excess) < 2e-6
    y = torch.cat([x, -x[x < 0.9]])
    of_y, y = units(y), y.double()
    assert worst(of_y[:, 3], torch.log1p(y)) < 1.2e-6
    assert worst(of_y[:, 4], small_difference(y, y - torch.log1p(y), 1 / 2, -1 / 3, 1 / 4)) < 1e-5
    delta = torch.cat([x, -x])
    of_delta, delta = units(delta), delta.double()
    assert worst(of_delta[:, 5], -torch.expm1(-delta)) < 4e-6
    excess = small_difference(delta, delta + torch.expm1(-delta), 1 / 2, -1 / 6, 1 / 24)
    assert worst(of_delta[:, 6], excess) < 4e-6
    assert kernels.module.units(0) == [1, 0, 0, 0, 0, 0, 0]
