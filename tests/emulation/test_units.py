"""csrc/cuda/units.h: arithmetic by the special function unit, whose results here err as far as PTX allows."""

from __future__ import annotations

import torch
from torch import Tensor

from emulation.harness import Kernels


def small_difference(x: Tensor, series: tuple[float, ...], difference: Tensor) -> Tensor:
    """`difference`, but where x is small x² times a series."""
    return torch.where(x.abs() < 1e-3, x * x * sum(c * x**i for i, c in enumerate(series)), difference)


def test_relative_errors(kernels: Kernels) -> None:
    x = torch.cat([torch.logspace(-9, 1.3, 40_001, dtype=torch.float64), torch.tensor([0.5, 1.0, 20.0])]).float()

    def worst(x: Tensor, column: int, exact: Tensor) -> float:
        return float(((kernels.units(x.float())[:, column].double() - exact) / exact).abs().max())

    gap = x.double()
    expm1_series = (1 / 2, -1 / 6, 1 / 24)
    assert worst(gap, 0, torch.exp(-gap)) < 4e-6  # a rounded exponent: eps |x|
    assert worst(gap, 1, torch.expm1(-gap)) < 5e-7
    assert worst(gap, 2, small_difference(gap, expm1_series, gap + torch.expm1(-gap))) < 2e-6
    y = torch.cat([x, -x[x < 0.9]]).double()
    assert worst(y, 3, torch.log1p(y)) < 1.2e-6
    assert worst(y, 4, small_difference(y, (1 / 2, -1 / 3, 1 / 4), y - torch.log1p(y))) < 1e-5
    delta = torch.cat([x, -x]).double()
    assert worst(delta, 5, -torch.expm1(-delta)) < 4e-6
    assert worst(delta, 6, small_difference(delta, expm1_series, delta + torch.expm1(-delta))) < 4e-6
    assert kernels.units(torch.zeros(1)).tolist() == [[1, 0, 0, 0, 0, 0, 0]]
