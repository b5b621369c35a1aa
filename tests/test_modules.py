"""modules.py: the losses as modules; and what the docstrings of modules and functions call equivalent."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import pickle
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DIVERGENCES, OPTION_MIXES, logits, make_models, make_pair, named, position_tensors
from oracle import assert_equal
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db

import kldiv_ext
from kldiv_ext import DistillationLoss, KLDivLoss, LinearDistillationLoss, distillation_loss, linear_distillation_loss

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:size_average and reduce args")

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: mix.options for name, mix in OPTION_MIXES.items()},
    **{str(divergence): divergence.options for divergence in DIVERGENCES},
    "inplace_backward": {"inplace_backward": True},
    "chunk_size": {"chunk_size": 4},
}


@pytest.mark.parametrize("options", named(OPTIONS))
def test_modules_are_the_functions(device: str, options: dict[str, Any]) -> None:
    ignore_index = options.get("ignore_index", -100)
    positions = position_tensors(("labels", "mask", "weight"), (3, 4), 30, device, ignore_index=ignore_index)
    pair = dict(zip(("student_logits", "teacher_logits"), make_pair(3, 4, 50, device=device), strict=True))
    for kind, function, tensors, missing in (
        (DistillationLoss, distillation_loss, pair, "chunk_size"),
        (LinearDistillationLoss, linear_distillation_loss, make_models(3, 4, device=device), "inplace_backward"),
    ):
        if missing in options:
            continue
        module = kind(**options)
        expected = function(**tensors, **positions, **options)
        for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_equal(same(**tensors, **positions), expected)
            assert all(f"{name}={value!r}" in repr(same) for name, value in options.items())
        assert not list(module.parameters()) and not module.state_dict()
        if function is distillation_loss:
            assert_equal(module(*tensors.values(), *positions.values()), expected)
        if options.get("reduction", "mean") == "mean":
            expected = function(**tensors, **positions, num_items=10, **options)
            assert_equal(module(**tensors, **positions, num_items=10), expected)


MODULE_INFO = next(info for info in module_db if info.module_cls is nn.KLDivLoss)


@pytest.mark.parametrize("dtype", MODULE_INFO.dtypes)
def test_moduleinfo(device: str, dtype: torch.dtype) -> None:
    for case in MODULE_INFO.module_inputs_func(MODULE_INFO, device, dtype, requires_grad=False, training=True):
        given, call = case.constructor_input, case.forward_input
        ours, theirs = (kind(*given.args, **given.kwargs) for kind in (KLDivLoss, nn.KLDivLoss))
        for expected in (theirs, functools.partial(case.reference_fn, ours)):
            # Some of these targets are negative: NaN.
            assert_close(ours(*call.args, **call.kwargs), expected(*call.args, **call.kwargs), equal_nan=True)


def test_kl_div_loss(device: str) -> None:
    input, target = (logits(3, 4, device=device, seed=seed).log_softmax(-1) for seed in (0, 1))
    module = KLDivLoss(reduction="batchmean", log_target=True)
    expected = F.kl_div(input, target, reduction="batchmean", log_target=True)
    assert isinstance(module, nn.KLDivLoss)
    assert repr(module) == repr(nn.KLDivLoss(reduction="batchmean", log_target=True))
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (copied.reduction, copied.log_target) == ("batchmean", True)
        assert_close(copied(input, target), expected)
    assert_close(functional_call(module, {}, (input, target)), expected)
    with pytest.warns(UserWarning, match="size_average and reduce args"):
        assert KLDivLoss(size_average=False).reduction == "sum"


def equivalent(documented: Any, names: dict[str, Any]) -> Any:
    """Run the code after "Equivalent to" in a docstring; `names` gets its variables. Returns its last expression."""
    lines = inspect.getdoc(documented).split("Equivalent to")[1].split(":\n", 1)[1].splitlines()
    code = ast.parse(textwrap.dedent("\n".join(line for line in lines if line.startswith("    "))))
    last = code.body.pop() if isinstance(code.body[-1], ast.Expr) else ast.parse("None").body[0]
    names |= {"F": F, "torch": torch, "kldiv_ext": kldiv_ext}
    exec(compile(code, "<docstring>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<docstring>", "eval"), names)


STUDENT, TEACHER = make_pair(2, 3, 50)
LOGITS = {"student_logits": STUDENT, "teacher_logits": TEACHER, "labels": torch.arange(6).view(2, 3)}
MODELS = {**make_models(2, 3, dtype=torch.float32), "labels": LOGITS["labels"]}


def test_equivalent_of_the_losses() -> None:
    options = {"temperature": 2.0, "valid_vocab": 40, "logit_scale": 0.5, "logit_softcap": 3.0}
    options |= {"soft_weight": 0.7, "hard_weight": 0.3}
    assert_close(equivalent(distillation_loss, {**LOGITS, **options}), distillation_loss(**LOGITS, **options))
    others = dict.fromkeys(("mask", "weight", "num_items", "teacher_logits"))
    for documented, function, tensors in (
        (linear_distillation_loss, linear_distillation_loss, MODELS),
        (LinearDistillationLoss, linear_distillation_loss, MODELS),
        (DistillationLoss, distillation_loss, LOGITS),
    ):
        expected = function(**tensors, **options)
        assert_close(equivalent(documented, {**others, **tensors, "options": options}), expected)


def test_equivalent_of_token_stats() -> None:
    names = {**LOGITS, "temperature": 2.0}
    equivalent(kldiv_ext.token_stats, names)
    stats = kldiv_ext.token_stats(STUDENT, TEACHER, temperature=2.0)
    assert_close(stats.forward_kl, names["forward_kl"])
    assert_equal(stats.top1_agreement, names["top1_agreement"])


def test_equivalent_of_the_drop_in() -> None:
    names = {"size_average": None, "reduce": None, "reduction": "batchmean", "log_target": True}
    names |= {"input": STUDENT.log_softmax(-1), "target": TEACHER.log_softmax(-1)}
    expected = equivalent(kldiv_ext.kl_div, names)
    assert_close(kldiv_ext.kl_div(names["input"], names["target"], reduction="batchmean", log_target=True), expected)
    assert_close(equivalent(KLDivLoss, names)(names["input"], names["target"]), expected)
