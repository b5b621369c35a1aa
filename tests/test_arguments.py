"""Wrong arguments of distillation_loss and DistillationLoss: the right error, naming the argument and its value."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import kldiv_ext
from kldiv_ext import DistillationLoss, _library, distillation_loss
from kldiv_ext._library import ROW_CONSTANTS
from kldiv_ext.options import OperatorOptions

STUDENT, TEACHER = torch.randn(2, 3, 11), torch.randn(2, 3, 11)


class Wrong(NamedTuple):
    error: type[Exception] | tuple[type[Exception], ...]
    says: str  # what the message must hold: the name, and the value or what is wrong with it
    arguments: dict[str, Any]


def of_logits(argument: str) -> dict[str, Wrong]:
    return {
        f"{argument} None": Wrong(TypeError, f"{argument}.*NoneType", {argument: None}),
        f"{argument} list": Wrong(TypeError, f"{argument}.*list", {argument: [[1.0, 2.0]]}),
        f"{argument} ndarray": Wrong(TypeError, f"{argument}.*ndarray", {argument: np.ones((2, 3, 11))}),
        f"{argument} int64": Wrong(TypeError, f"{argument}.*int64", {argument: torch.ones(2, 3, 11).long()}),
        f"{argument} bool": Wrong(TypeError, f"{argument}.*bool", {argument: torch.ones(2, 3, 11).bool()}),
        f"{argument} complex": Wrong(TypeError, f"{argument}.*complex64", {argument: torch.ones(2, 3, 11) * 1j}),
        f"{argument} float8": Wrong(
            TypeError, f"{argument}.*float8", {argument: torch.ones(2, 3, 11).to(torch.float8_e4m3fn)}
        ),
        f"{argument} sparse": Wrong(TypeError, f"{argument}.*sparse", {argument: torch.ones(2, 3, 11).to_sparse()}),
        f"{argument} 0-d": Wrong(ValueError, rf"{argument}.*\(\)", {argument: torch.tensor(1.0)}),
        f"{argument} empty vocabulary": Wrong(ValueError, rf"{argument}.*\(2, 3, 0\)", {argument: torch.ones(2, 3, 0)}),
        f"{argument} vocabulary": Wrong(ValueError, r"same shape.*\(2, 3, 1\)", {argument: torch.ones(2, 3, 1)}),
        f"{argument} broadcasts": Wrong(ValueError, r"same shape.*\(1, 3, 11\)", {argument: torch.ones(1, 3, 11)}),
        f"{argument} fewer dimensions": Wrong(ValueError, r"same shape.*\(3, 11\)", {argument: torch.ones(3, 11)}),
        f"{argument} other device": Wrong(
            ValueError, "device.*meta|meta.*device", {argument: torch.ones(2, 3, 11, device="meta")}
        ),
    }


def of_positions(argument: str, good: torch.Tensor, *bad_dtypes: torch.dtype) -> dict[str, Wrong]:
    return {
        f"{argument} list": Wrong(TypeError, f"{argument}.*list", {argument: good.tolist()}),
        f"{argument} number": Wrong(TypeError, f"{argument}.*float", {argument: 1.0}),
        f"{argument} transposed": Wrong(ValueError, rf"{argument}.*\(2, 3\).*\(3, 2\)", {argument: good.t()}),
        f"{argument} broadcasts": Wrong(ValueError, rf"{argument}.*\(2, 3\).*\(1, 3\)", {argument: good[:1]}),
        f"{argument} flat": Wrong(ValueError, rf"{argument}.*\(2, 3\).*\(6,\)", {argument: good.flatten()}),
        f"{argument} with vocabulary": Wrong(
            ValueError, rf"{argument}.*\(2, 3\).*\(2, 3, 11\)", {argument: good[..., None].expand(2, 3, 11)}
        ),
        f"{argument} other device": Wrong(ValueError, f"{argument}.*cpu.*meta", {argument: good.to("meta")}),
    } | {f"{argument} {d}": Wrong(TypeError, f"{argument}.*{str(d)[6:]}", {argument: good.to(d)}) for d in bad_dtypes}


def of_share(argument: str) -> dict[str, Wrong]:
    return {
        f"{argument} -0.1": Wrong(ValueError, f"{argument}.*-0.1", {argument: -0.1}),
        f"{argument} 1.5": Wrong(ValueError, f"{argument}.*1.5", {argument: 1.5}),
        f"{argument} nan": Wrong(ValueError, f"{argument}.*nan", {argument: math.nan}),
        f"{argument} 1e-31": Wrong(ValueError, f"{argument}.*1e-31", {argument: 1e-31}),
        f"{argument} str": Wrong(TypeError, f"{argument}.*'0.5'", {argument: "0.5"}),
        f"{argument} bool": Wrong(TypeError, f"{argument}.*True", {argument: True}),
        f"{argument} Tensor": Wrong(TypeError, f"{argument}.*tensor", {argument: torch.tensor(0.5)}),
        f"{argument} None": Wrong(TypeError, f"{argument}.*None", {argument: None}),
    }


def of_weight(argument: str) -> dict[str, Wrong]:
    return {
        f"{argument} inf": Wrong(ValueError, f"{argument}.*inf", {argument: math.inf}),
        f"{argument} nan": Wrong(ValueError, f"{argument}.*nan", {argument: math.nan}),
        f"{argument} huge": Wrong(ValueError, f"{argument}.*1000", {argument: 10**400}),
        f"{argument} str": Wrong(TypeError, f"{argument}.*'1'", {argument: "1"}),
        f"{argument} bool": Wrong(TypeError, f"{argument}.*True", {argument: True}),
        f"{argument} None": Wrong(TypeError, f"{argument}.*None", {argument: None}),
        f"{argument} Tensor": Wrong(TypeError, f"{argument}.*tensor", {argument: torch.tensor(0.5)}),
    }


def of_sides(argument: str) -> dict[str, Wrong]:
    return {
        f"{argument} 0": Wrong(ValueError, f"{argument}.*0", {argument: 0}),
        f"{argument} -1": Wrong(ValueError, f"{argument}.*-1", {argument: -1.0}),
        f"{argument} inf": Wrong(ValueError, f"{argument}.*inf", {argument: math.inf}),
        f"{argument} 1e39": Wrong(ValueError, rf"{argument}.*1e\+39", {argument: 1e39}),
        f"{argument} 1e-39": Wrong(ValueError, f"{argument}.*1e-39", {argument: (None, 1e-39)}),
        f"{argument} str": Wrong(TypeError, f"{argument}.*'30'", {argument: "30"}),
        f"{argument} bool": Wrong(TypeError, f"{argument}.*True", {argument: (True, None)}),
        f"{argument} three": Wrong(ValueError, rf"{argument}.*pair.*\(1, 2, 3\)", {argument: (1, 2, 3)}),
        f"{argument} of the teacher": Wrong(ValueError, f"{argument}.*-3", {argument: (None, -3.0)}),
        f"{argument} Tensor": Wrong(TypeError, f"{argument}.*tensor", {argument: torch.tensor(30.0)}),
    }


# The arguments that tensors come in as.
TENSORS = {
    **of_logits("student_logits"),
    **of_logits("teacher_logits"),
    **of_positions("labels", torch.ones(2, 3).long(), torch.int32, torch.float32, torch.bool),
    **of_positions("mask", torch.ones(2, 3).bool(), torch.uint8, torch.int64, torch.float32),
    **of_positions("weight", torch.ones(2, 3), torch.int64, torch.bool, torch.complex64),
    "weight requires grad": Wrong(ValueError, "weight.*gradient", {"weight": torch.ones(2, 3, requires_grad=True)}),
    "num_items float": Wrong(TypeError, "num_items.*2.5", {"num_items": 2.5}),
    "num_items bool": Wrong(TypeError, "num_items.*True", {"num_items": True}),
    "num_items str": Wrong(TypeError, "num_items.*'2'", {"num_items": "2"}),
    "num_items negative": Wrong(ValueError, "num_items.*-1", {"num_items": -1}),
    "num_items 2^70": Wrong(ValueError, f"num_items.*{2**70}", {"num_items": 2**70}),
    "num_items 1-d": Wrong(ValueError, r"num_items.*\(1,\)", {"num_items": torch.tensor([2])}),
    "num_items bool tensor": Wrong(ValueError, "num_items.*bool", {"num_items": torch.tensor(True)}),
    "num_items complex": Wrong(ValueError, "num_items.*complex", {"num_items": torch.tensor(2j)}),
    "num_items requires grad": Wrong(
        ValueError, "num_items.*gradient", {"num_items": torch.tensor(2.0, requires_grad=True)}
    ),
    "num_items other device": Wrong(ValueError, "num_items.*meta", {"num_items": torch.tensor(2, device="meta")}),
}

OPTIONS = {
    "divergence unknown": Wrong(ValueError, "divergence.*forward_kl.*'kl'", {"divergence": "kl"}),
    "divergence case": Wrong(ValueError, "divergence.*'JSD'", {"divergence": "JSD"}),
    "divergence None": Wrong(ValueError, "divergence.*None", {"divergence": None}),
    "divergence list": Wrong((TypeError, ValueError), r"divergence.*\['jsd'\]", {"divergence": ["jsd"]}),
    **of_share("beta"),
    **of_share("skew"),
    **of_share("alpha"),
    "temperature 0": Wrong(ValueError, "temperature.*0", {"temperature": 0}),
    "temperature -1": Wrong(ValueError, "temperature.*-1", {"temperature": -1.0}),
    "temperature 1e-40": Wrong(ValueError, "temperature.*1e-40", {"temperature": 1e-40}),
    "temperature huge": Wrong(ValueError, "temperature.*1000", {"temperature": 10**400}),
    "ignore_index 2^70": Wrong(ValueError, f"ignore_index.*{2**70}", {"ignore_index": 2**70}),
    "valid_vocab 2^70": Wrong(ValueError, f"valid_vocab.*{2**70}", {"valid_vocab": 2**70}),
    "reduction array": Wrong(ValueError, "reduction.*mean", {"reduction": np.array(["mean", "sum"])}),
    "temperature inf": Wrong(ValueError, "temperature.*inf", {"temperature": math.inf}),
    "temperature nan": Wrong(ValueError, "temperature.*nan", {"temperature": math.nan}),
    "temperature str": Wrong(TypeError, "temperature.*'1'", {"temperature": "1"}),
    "temperature bool": Wrong(TypeError, "temperature.*True", {"temperature": True}),
    "temperature Tensor": Wrong(TypeError, "temperature.*tensor", {"temperature": torch.tensor(2.0)}),
    "temperature None": Wrong(TypeError, "temperature.*None", {"temperature": None}),
    **of_weight("soft_weight"),
    **of_weight("hard_weight"),
    **of_sides("logit_softcap"),
    **of_sides("logit_scale"),
    "valid_vocab 0": Wrong(ValueError, "valid_vocab.*0", {"valid_vocab": 0}),
    "valid_vocab float": Wrong(TypeError, "valid_vocab.*8.0", {"valid_vocab": 8.0}),
    "valid_vocab bool": Wrong(TypeError, "valid_vocab.*True", {"valid_vocab": True}),
    "in place int": Wrong(TypeError, "inplace_backward.*1", {"inplace_backward": 1}),
    "T2 int": Wrong(TypeError, "scale_by_temperature_squared.*1", {"scale_by_temperature_squared": 1}),
    "ignore_index float": Wrong(TypeError, "ignore_index.*1.0", {"ignore_index": 1.0}),
    "ignore_index bool": Wrong(TypeError, "ignore_index.*True", {"ignore_index": True}),
    "ignore_index None": Wrong(TypeError, "ignore_index.*None", {"ignore_index": None}),
    "reduction unknown": Wrong(ValueError, "reduction.*batchmean.*'avg'", {"reduction": "avg"}),
    "reduction None": Wrong(ValueError, "reduction.*None", {"reduction": None}),
    "reduction list": Wrong((TypeError, ValueError), r"reduction.*\['mean'\]", {"reduction": ["mean"]}),
    "unknown option": Wrong(TypeError, "temprature", {"temprature": 2.0}),
}


def still_works() -> None:
    leaf = STUDENT.clone().requires_grad_()
    loss = distillation_loss(leaf, TEACHER)
    loss.backward()
    assert loss > 0 and leaf.grad.any()


@pytest.mark.parametrize("wrong", [pytest.param(w, id=name) for name, w in {**TENSORS, **OPTIONS}.items()])
def test_function(wrong: Wrong) -> None:
    with pytest.raises(wrong.error, match=wrong.says):
        distillation_loss(**{"student_logits": STUDENT, "teacher_logits": TEACHER, **wrong.arguments})
    still_works()


@pytest.mark.parametrize("wrong", [pytest.param(w, id=name) for name, w in OPTIONS.items()])
def test_module_at_construction(wrong: Wrong) -> None:
    with pytest.raises(wrong.error, match=wrong.says):
        DistillationLoss(**wrong.arguments)


@pytest.mark.parametrize("wrong", [pytest.param(w, id=name) for name, w in TENSORS.items()])
def test_module_at_the_call(wrong: Wrong) -> None:
    module = DistillationLoss()
    with pytest.raises(wrong.error, match=wrong.says):
        module(**{"student_logits": STUDENT, "teacher_logits": TEACHER, **wrong.arguments})
    assert module(STUDENT, TEACHER) > 0


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_num_items_without_mean(reduction: str) -> None:
    with pytest.raises(ValueError, match=f"num_items.*7.*{reduction}"):
        distillation_loss(STUDENT, TEACHER, reduction=reduction, num_items=7)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        distillation_loss(STUDENT, TEACHER, None, "jsd")
    with pytest.raises(TypeError, match="positional"):
        DistillationLoss("jsd")


def test_every_option_is_checked() -> None:
    """A new option needs a row above."""
    tested = {name for wrong in (*TENSORS.values(), *OPTIONS.values()) for name in wrong.arguments}
    assert tested - {"temprature"} == set(inspect.signature(distillation_loss).parameters)


def test_valid_vocab_beyond_the_vocabulary() -> None:
    for teacher in (TEACHER, torch.randn(2, 3, 13)):
        with pytest.raises(ValueError, match=r"valid_vocab.*12.*\(2, 3, 11\)"):
            distillation_loss(STUDENT, teacher, valid_vocab=12)
    with pytest.raises(ValueError, match=r"same shape.*\(2, 4, 11\)"):
        distillation_loss(STUDENT, torch.randn(2, 4, 11), valid_vocab=5)


def test_hard_weight_without_labels() -> None:
    with pytest.raises(ValueError, match=r"labels.*None.*hard_weight=0\.5"):
        distillation_loss(STUDENT, TEACHER, hard_weight=0.5)


@pytest.mark.parametrize("label", [-1, 9, 2**40])
def test_labels_out_of_range(label: int) -> None:
    """On the CPU as F.cross_entropy; not where the position does not count, nor where no cross entropy is asked for."""
    labels = torch.tensor([[1, 2, label], [3, -100, 4]])
    options: dict[str, Any] = {"valid_vocab": 9, "hard_weight": 0.5}
    with pytest.raises(IndexError, match=rf"labels.*\[0, 9\).*{label}"):
        distillation_loss(STUDENT, TEACHER, labels, **options)
    assert distillation_loss(STUDENT, TEACHER, labels, mask=labels != label, **options) > 0
    assert distillation_loss(STUDENT, TEACHER, labels, weight=(labels != label).float(), **options) > 0
    assert distillation_loss(STUDENT, TEACHER, labels) > 0


IN_PLACE: dict[str, tuple[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]] = {
    "leaf": ("leaf", lambda: (STUDENT.clone().requires_grad_(), TEACHER)),
    "view of a leaf": ("view of a leaf", lambda: (STUDENT.clone().requires_grad_()[:, :2], TEACHER[:, :2])),
    "expanded": (
        r"strides \(0, 11, 1\)",
        lambda: ((STUDENT[:1].clone().requires_grad_() * 1).expand(2, 3, 11), TEACHER),
    ),
    "overlapping windows": (
        r"strides \(3, 1\)",
        lambda: ((torch.randn(30).requires_grad_() * 1).as_strided((4, 5), (3, 1)), torch.randn(4, 5)),
    ),
    "one tensor for both": ("share memory", lambda: (s := STUDENT.clone().requires_grad_() * 1, s)),
    "halves of one tensor": (
        "share memory",
        lambda: tuple((torch.randn(2, 22).requires_grad_() * 1).chunk(2, -1)),
    ),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_over_what_must_stay(case: str) -> None:
    says, make = IN_PLACE[case]
    student, teacher = make()
    with pytest.raises(ValueError, match=f"inplace_backward.*{says}"):
        distillation_loss(student, teacher, inplace_backward=True)
    assert distillation_loss(student, teacher) >= 0


@pytest.mark.parametrize("option", ["beta", "skew", "alpha"])
def test_unused_parameters_are_checked_too(option: str) -> None:
    """Rather than ignored until the divergence changes."""
    with pytest.raises(ValueError, match=option):
        distillation_loss(STUDENT, TEACHER, divergence="forward_kl", **{option: 2.0})


def test_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing CUDA kernels say so and what to do; any other device is named."""
    logits = torch.ones(2, 11, device="meta")
    assert distillation_loss(logits, logits).device.type == "meta"  # shapes alone: the fake kernels

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


OPTIONS_OF_OPERATORS = OperatorOptions(1.0, 0.5, None, "jsd", 0.5, 1.0, (1.0, 1.0), (0.0, 0.0), None)


LABELS = torch.zeros(2).long()


def forward(a: Any, b: Any, labels: Any = LABELS, row_scale: Any = None, **changed: Any) -> Any:
    options = OPTIONS_OF_OPERATORS._replace(**changed)
    return torch.ops.kldiv_ext.distillation_loss(a, b, labels, row_scale, *options, True, True, True)


def backward(a: Any, b: Any, grad_output: Any, row_constants: Any) -> Any:
    return torch.ops.kldiv_ext.distillation_loss_backward(
        grad_output, a, b, row_constants, LABELS, None, *OPTIONS_OF_OPERATORS, True, True
    )


@pytest.mark.parametrize("call", [
    lambda a, b: forward(a, b[:1]),
    lambda a, b: forward(a, b[:, :5]),
    lambda a, b: forward(a, b[:, :5], valid_vocab=6),
    lambda a, b: forward(a, b, valid_vocab=0),
    lambda a, b: forward(a, b[:1], valid_vocab=6),
    lambda a, b: forward(a, b, divisor=0),
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
    lambda a, b: torch.ops.kldiv_ext.scale_(a.t(), torch.ones(())),
    lambda a, b: torch.ops.kldiv_ext.scale_(a, torch.ones(2)),
])  # fmt: skip
def test_operators_called_directly_do_not_read_out_of_bounds(call: Any) -> None:
    """What Python checks beforehand; an operator repeats only what memory safety needs."""
    with pytest.raises(RuntimeError):
        call(torch.randn(2, 11), torch.randn(2, 11))
    still_works()


def test_operators_called_directly_for_a_gradient_that_was_not_wanted() -> None:
    """Nothing finite, rather than a number that lacks its sums."""
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    arguments = LABELS, None, *OPTIONS_OF_OPERATORS
    for wanted in ((True, False), (False, True)):
        _, row_constants, *_ = torch.ops.kldiv_ext.distillation_loss(student, teacher, *arguments, *wanted, False)
        gradients = torch.ops.kldiv_ext.distillation_loss_backward(
            torch.ones(2), student, teacher, row_constants, *arguments, True, True
        )
        assert [bool(g.isfinite().all()) for g in gradients] == list(wanted)
        assert [bool(g.isfinite().any()) for g in gradients] == list(wanted)


def test_divergences_are_listed() -> None:
    assert isinstance(kldiv_ext.DIVERGENCES, tuple) and len(kldiv_ext.DIVERGENCES) == 8
