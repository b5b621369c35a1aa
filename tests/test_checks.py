"""checks.py: wrong tensors raise the right error, naming argument and value; operators called directly stay safe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import make_models, named
from oracle import assert_equal

from kldiv_ext import _library, distillation_loss, linear_distillation_loss, token_stats
from kldiv_ext._library import ROW_CONSTANTS, ops
from kldiv_ext.modules import DistillationLoss, LinearDistillationLoss
from kldiv_ext.options import DistillationOptions, LinearDistillationOptions, OperatorOptions, table

STUDENT, TEACHER = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
LOGITS = {"student_logits": STUDENT, "teacher_logits": TEACHER}
MODELS = make_models(2, 3, vocab=11, dtype=torch.float32)


class Wrong(NamedTuple):
    error: type[Exception]
    says: str  # a pattern: the name, and the value or what is wrong with it
    arguments: dict[str, Any]


def wrong(argument: str, *rows: tuple[type[Exception], str, Any]) -> list[Wrong]:
    """One case per (error, what the message says after the argument's name, value of the argument)."""
    return [Wrong(error, f"{argument}.*{says}", {argument: value}) for error, says, value in rows]


def wrong_logits(argument: str) -> list[Wrong]:
    ones = torch.ones(2, 3, 11)
    return wrong(
        argument,
        (TypeError, "NoneType", None),
        (TypeError, "list", [[1.0, 2.0]]),
        (TypeError, "ndarray", np.ones((2, 3, 11))),
        (TypeError, "int64", ones.long()),
        (TypeError, "bool", ones.bool()),
        (TypeError, "complex64", ones * 1j),
        (TypeError, "float8", ones.to(torch.float8_e4m3fn)),
        (TypeError, "sparse", ones.to_sparse()),
        (ValueError, r"\(\)", torch.tensor(1.0)),
        (ValueError, r"\(2, 3, 0\)", ones[..., :0]),
        (ValueError, r"same shape.*\(2, 3, 1\)", ones[..., :1]),
        (ValueError, r"same shape.*\(1, 3, 11\)", ones[:1]),
        (ValueError, r"same shape.*\(3, 11\)", ones[0]),
        (ValueError, "meta", ones.to("meta")),
    )


def wrong_positions(argument: str, good: torch.Tensor, *dtypes: torch.dtype) -> list[Wrong]:
    return wrong(
        argument,
        (TypeError, "list", good.tolist()),
        (TypeError, "float", 1.0),
        *((TypeError, str(dtype)[6:], good.to(dtype)) for dtype in dtypes),
        (ValueError, r"\(2, 3\).*\(3, 2\)", good.t()),
        (ValueError, r"\(2, 3\).*\(1, 3\)", good[:1]),
        (ValueError, r"\(2, 3\).*\(6,\)", good.flatten()),
        (ValueError, r"\(2, 3\).*\(2, 3, 11\)", good[..., None].expand(2, 3, 11)),
        (ValueError, "cpu.*meta", good.to("meta")),
    )


ONES = torch.ones(2, 3)
WRONG_FOR_ALL = [
    *wrong_positions("labels", ONES.long(), torch.int32, torch.float32, torch.bool),
    *wrong_positions("mask", ONES.bool(), torch.uint8, torch.int64, torch.float32),
]
WRONG_FOR_LOSSES = [
    *wrong_positions("weight", ONES, torch.int64, torch.bool, torch.complex64),
    *wrong("weight", (ValueError, "gradient", torch.ones(2, 3, requires_grad=True))),
    *wrong(
        "num_items",
        (TypeError, "2.5", 2.5),
        (TypeError, "True", True),
        (TypeError, "'2'", "2"),
        (ValueError, "-1", -1),
        (ValueError, str(2**70), 2**70),
        (ValueError, r"\(1,\)", torch.tensor([2])),
        (ValueError, "bool", torch.tensor(True)),
        (ValueError, "complex", torch.tensor(2j)),
        (ValueError, "gradient", torch.tensor(2.0, requires_grad=True)),
        (ValueError, "meta", torch.tensor(2, device="meta")),
    ),
    *(
        Wrong(ValueError, f"num_items.*7.*{reduction}", {"num_items": 7, "reduction": reduction})
        for reduction in ("none", "sum", "batchmean")
    ),
    Wrong(ValueError, r"labels.*None.*hard_weight=0\.5", {"hard_weight": 0.5}),
    Wrong(IndexError, r"labels.*\[0, 11\).*11", {"labels": 11 * ONES.long(), "hard_weight": 0.5}),
]
WRONG_LOGITS = [
    *wrong_logits("student_logits"),
    *wrong_logits("teacher_logits"),
    *(
        Wrong(ValueError, r"valid_vocab.*12.*\(2, 3, 11\)", {"valid_vocab": 12, "teacher_logits": teacher})
        for teacher in (TEACHER, torch.randn(2, 3, 13))
    ),
    Wrong(ValueError, r"same shape.*\(2, 4, 11\)", {"valid_vocab": 5, "teacher_logits": torch.randn(2, 4, 11)}),
]
WRONG_MODELS = [
    *(
        row
        for name, tensor in MODELS.items()
        for row in wrong(
            name,
            (TypeError, "list", [1.0]),
            (TypeError, "int64", tensor.long()),
            (TypeError, "float64", tensor.double()),
            (ValueError, "meta", tensor.to("meta")),
        )
    ),
    *wrong("student_hidden", (ValueError, r"\(\)", torch.tensor(1.0))),
    *wrong("student_weight", (ValueError, r"\(9,\)", torch.ones(9)), (ValueError, r"\[V, 9\]", torch.ones(11, 6))),
    *wrong("student_bias", (ValueError, r"\[11\].*\(1, 11\)", MODELS["student_bias"][None])),
    *wrong("teacher_bias", (ValueError, r"\(10,\)", MODELS["teacher_bias"][1:])),
    *wrong("teacher_weight", (TypeError, "None", None)),
    *wrong("teacher_hidden", (TypeError, "None", None), (ValueError, r"\(2, 3, '...'\)", torch.ones(1, 3, 6))),
    *wrong("valid_vocab", (ValueError, "12", 12)),
    *wrong("max_workspace", (ValueError, "bytes.*10", 10)),
    Wrong(ValueError, "teacher_hidden.*teacher_logits", {"teacher_logits": TEACHER}),
    Wrong(ValueError, r"\(8, 9\).*11", {name: MODELS[name][3:] for name in ("student_weight", "student_bias")}),
    Wrong(ValueError, r"labels.*student_hidden.*\(2, 3\).*\(6,\)", {"labels": torch.zeros(6).long()}),
]
WRONG_FOR_STATS = wrong("labels", (IndexError, r"\[0, 11\).*11", 11 * ONES.long()))
CALLS: list[tuple[Callable[..., Any], dict[str, torch.Tensor], list[Wrong]]] = [
    (distillation_loss, LOGITS, [*WRONG_LOGITS, *WRONG_FOR_ALL, *WRONG_FOR_LOSSES]),
    (linear_distillation_loss, MODELS, [*WRONG_MODELS, *WRONG_FOR_ALL, *WRONG_FOR_LOSSES]),
    (token_stats, LOGITS, [*WRONG_LOGITS, *WRONG_FOR_ALL, *WRONG_FOR_STATS]),
]
MODULES = {distillation_loss: DistillationLoss, linear_distillation_loss: LinearDistillationLoss}


@pytest.mark.parametrize(
    "function, good, case",
    [
        pytest.param(function, good, case, id=f"{function.__name__}-{case.error.__name__}: {case.says}")
        for function, good, rows in CALLS
        for case in rows
    ],
)
def test_wrong_arguments(function: Callable[..., Any], good: dict[str, torch.Tensor], case: Wrong) -> None:
    """A function raises, and its module at the call; then it works again."""
    with pytest.raises(case.error, match=case.says):
        function(**{**good, **case.arguments})
    assert torch.is_tensor(function(**good)[0] if function is token_stats else function(**good))
    if function in MODULES:
        options = {name: value for name, value in case.arguments.items() if name in table(LinearDistillationOptions)}
        tensors = {name: value for name, value in case.arguments.items() if name not in options}
        with pytest.raises(case.error, match=case.says):
            MODULES[function](**options)(**{**good, **tensors})


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_every_tensor_has_a_wrong_case(call: Any) -> None:
    function, _, rows = call
    tried = {name for row in rows for name in row.arguments}
    options = {**table(DistillationOptions), **table(LinearDistillationOptions)}
    assert tried - set(options) == set(inspect.signature(function).parameters) - set(options)


@pytest.mark.parametrize("label", [-1, 9, 2**40])
def test_labels_out_of_range(label: int) -> None:
    """On the CPU such labels raise as in F.cross_entropy, where the position counts and a cross entropy is used."""
    labels = torch.tensor([[1, 2, label], [3, -100, 4]])
    options: dict[str, Any] = {"valid_vocab": 9, "hard_weight": 0.5}
    with pytest.raises(IndexError, match=rf"labels.*\[0, 9\).*{label}"):
        distillation_loss(STUDENT, TEACHER, labels, **options)
    expected = distillation_loss(STUDENT, TEACHER, labels.where(labels != label, -100), **options)
    assert_equal(distillation_loss(STUDENT, TEACHER, labels, mask=labels != label, **options), expected)
    assert_equal(distillation_loss(STUDENT, TEACHER, labels, weight=(labels != label).float(), **options), expected)
    assert distillation_loss(STUDENT, TEACHER, labels) > 0


def test_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA kernels the message says why and what to do; any other device is named."""
    logits = torch.ones(2, 11, device="meta")
    assert distillation_loss(logits, logits).device.type == "meta"  # the fake kernels

    class Elsewhere(torch.Tensor):
        kind = "cuda"
        device = property(lambda self: torch.device(self.kind))

    cuda = torch.ones(2, 11).as_subclass(Elsewhere)
    monkeypatch.setattr(_library, "cuda_missing_reason", "they are lost")
    with pytest.raises(RuntimeError, match=r"they are lost.*FORCE_CUDA.*kldiv_ext\.info"):
        distillation_loss(cuda, cuda)
    Elsewhere.kind = "xpu"
    with pytest.raises(ValueError, match=r"xpu.*kldiv_ext\.reference"):
        distillation_loss(cuda, cuda)


LEAF = torch.randn(2, 3, 11, requires_grad=True)
# {case: (what the message says, student, teacher)}
IN_PLACE = {
    "leaf": ("leaf", LEAF, TEACHER),
    "view of a leaf": ("view of a leaf", LEAF[:, :2], TEACHER[:, :2]),
    "expanded": (r"strides \(0, 11, 1\)", (LEAF[:1] * 1).expand(2, 3, 11), TEACHER),
    "overlapping windows": (r"strides \(3, 1\)", (LEAF * 1).as_strided((4, 5), (3, 1)), torch.randn(4, 5)),
    "one tensor on both sides": ("share memory", *[LEAF * 1] * 2),
    "halves of one tensor": ("share memory", *(LEAF * 1)[..., :10].chunk(2, -1)),
}


@pytest.mark.parametrize("case", named(IN_PLACE))
def test_logits_that_must_not_be_overwritten(case: tuple[str, torch.Tensor, torch.Tensor]) -> None:
    says, student, teacher = case
    with pytest.raises(ValueError, match=f"inplace_backward.*{says}"):
        distillation_loss(student, teacher, inplace_backward=True)
    assert distillation_loss(student, teacher) >= 0


# ---------------------------------------------------------------- operators called directly

LABELS = torch.zeros(2).long()
OPERATOR_OPTIONS = OperatorOptions(1.0, 0.5, None, "jsd", 0.5, 1.0, (1.0, 1.0), (0.0, 0.0), None)


def forward(a: Any, b: Any, labels: Any = LABELS, row_scale: Any = None, **changed: Any) -> Any:
    options = OPERATOR_OPTIONS._replace(**changed)
    return ops.distillation_loss(a, b, labels, row_scale, *options, True, True, True)


def backward(a: Any, b: Any, grad_output: Any, row_constants: Any, *needs_grad: bool) -> Any:
    return ops.distillation_loss_backward(
        grad_output, a, b, row_constants, LABELS, None, *OPERATOR_OPTIONS, *(needs_grad or (True, True))
    )


@pytest.mark.parametrize("call", [
    lambda a, b: forward(a, b[:1]),
    lambda a, b: forward(a, b[:, :5]),
    lambda a, b: forward(a, b[:, :5], valid_vocab=6),
    lambda a, b: forward(a, b, valid_vocab=0),
    lambda a, b: forward(a, b[:1], valid_vocab=6),
    lambda a, b: forward(a, b, divisor=0),
    lambda a, b: torch.ops.kldiv_ext.kl_div(a, b, 0, True),
    lambda a, b: forward(a, b, divergence="kl"),
    lambda a, b: forward(a, b, logit_scale=(1.0,)),
    lambda a, b: forward(a, b, logit_softcap=()),
    lambda a, b: forward(a, b, None),
    lambda a, b: forward(a, b, torch.zeros(3).long()),
    lambda a, b: forward(a, b, torch.zeros(2).int()),
    lambda a, b: forward(a, b, torch.zeros(4).long()[::2]),
    lambda a, b: forward(a, b, row_scale=torch.ones(1)),
    lambda a, b: forward(a, b, row_scale=torch.ones(())),
    lambda a, b: forward(a, b, row_scale=torch.ones(2).half()),
    lambda a, b: forward(a, b, row_scale=torch.ones(4)[::2]),
    lambda a, b: forward(a.long(), b.long()),
    lambda a, b: forward(a[:, :0], b[:, :0]),
    lambda a, b: forward(a[0, 0], b[0, 0]),
    lambda a, b: backward(a, b, torch.ones(3), torch.ones(2, ROW_CONSTANTS)),
    lambda a, b: backward(a, b, torch.ones(2), torch.ones(2, ROW_CONSTANTS - 1)),
    lambda a, b: ops.scale_(a.t(), torch.ones(())),
    lambda a, b: ops.scale_(a, torch.ones(2)),
])  # fmt: skip
def test_operators_do_not_read_out_of_bounds(call: Callable[..., Any]) -> None:
    """Python checks everything first; an operator repeats only the checks that memory safety needs."""
    student, teacher = torch.randn(2, 11), torch.randn(2, 11)
    with pytest.raises(RuntimeError):
        call(student, teacher)
    assert forward(student, teacher)[0].isfinite().all()


@pytest.mark.parametrize("requested", [(True, False), (False, True)])
def test_a_gradient_that_forward_was_not_asked_for_is_not_finite(requested: tuple[bool, bool]) -> None:
    """The row constants lack the sums for it."""
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    _, row_constants, *_ = ops.distillation_loss(student, teacher, LABELS, None, *OPERATOR_OPTIONS, *requested, False)
    gradients = backward(student, teacher, torch.ones(2), row_constants)
    assert [bool(g.isfinite().all()) for g in gradients] == list(requested)
    assert [bool(g.isfinite().any()) for g in gradients] == list(requested)
