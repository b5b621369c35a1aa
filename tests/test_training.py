"""Losses inside training: micro-batches, a moving teacher, mixed precision, several processes."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from oracle import assert_norm_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as ddp
from torch.utils.checkpoint import checkpoint

from kldiv_ext import distillation_loss, kl_div, reference

VOCABULARY, WIDTH = 96, 16
PROCESSES = 2

# ---------------------------------------------------------------- losses, model and data


class Loss(NamedTuple):
    """(student_logits, teacher_logits, labels, num_items=None) -> Tensor, by the kernels and by the reference."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def of_logits(**options: Any) -> Loss:
    ours, plain = (functools.partial(f, **options) for f in (distillation_loss, reference.distillation_loss))
    return Loss(ours, plain)


def of_probabilities(divergence: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A distillation_loss made of a kl_div."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
        counts = labels != -100
        total = divergence(student[counts].log_softmax(-1), teacher[counts].softmax(-1), reduction="sum")
        return total / (counts.sum() if num_items is None else num_items)

    return loss


LOSSES = {
    "forward_kl": of_logits(),
    "jsd": of_logits(divergence="jsd", beta=0.1, temperature=2.0, scale_by_temperature_squared=True),
    "alpha": of_logits(divergence="alpha"),
    "hard labels": of_logits(hard_weight=0.3, soft_weight=0.7, logit_softcap=20.0),
    "kl_div": Loss(of_probabilities(kl_div), of_probabilities(reference.kl_div)),
}


class Model(nn.Module):
    """The smallest language model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5, generator=generator)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.layer(self.embedding(ids)).tanh()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


class Batch(NamedTuple):
    ids: Tensor  # [N, L]
    teacher: Tensor  # [N, L, V]
    labels: Tensor  # [N, L]

    @property
    def num_items(self) -> Tensor:
        return (self.labels != -100).sum()

    def rows(self, first: int, last: int) -> Batch:
        return Batch(*(t[first:last] for t in self))


def make_batch(seed: int, device: str = "cpu") -> Batch:
    """Twelve sequences; a third of the positions and the last two sequences do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, VOCABULARY, (2, 12, 5), generator=generator)
    labels[torch.rand(12, 5, generator=generator) < 0.3] = -100
    labels[10:] = -100
    teacher = torch.randn(12, 5, VOCABULARY, generator=generator)
    return Batch(ids.to(device), teacher.to(device), labels.to(device))


STEPS = 3
MICRO_BATCHES = ((0, 1), (1, 7), (7, 10), (10, 12))  # unequal; in the last one no position counts


def assert_close(values: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-4) -> None:
    """Relative L2 error of each tensor; None where None is expected. Differences of float32 parameters lose digits."""
    assert len(values) == len(expected) > 0
    for value, other in zip(values, expected, strict=True):
        assert (value is None) == (other is None)
        if value is not None and other is not None:
            assert other.any(), "the test would not see a silent zero"
            assert_norm_close(value, other.double(), tolerance)


# ---------------------------------------------------------------- one process


def take_steps(loop: str, loss: Callable[..., Tensor], device: str) -> list[Tensor]:
    """The change of every parameter after some steps."""
    make_module, backward = LOOPS[loop]
    module = make_module().to(device)
    start = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    for seed in range(STEPS):
        backward(loss, module, make_batch(seed, device))
        optimizer.step()
        optimizer.zero_grad()
    return [after.detach() - before for after, before in zip(module.parameters(), start, strict=True)]


def accumulation(loss: Callable[..., Tensor], model: Model, batch: Batch) -> None:
    """Unequal micro-batches, which share the number of items; test_processes compares them with the whole batch."""
    for part in (batch.rows(*rows) for rows in MICRO_BATCHES):
        loss(model(part.ids), part.teacher, part.labels, num_items=batch.num_items).backward()


def moving_teacher(loss: Callable[..., Tensor], both: nn.ModuleList, batch: Batch) -> None:
    """An exponential moving average of the student as teacher, updated between forward and backward."""
    student, teacher = both
    value = loss(student(batch.ids), teacher(batch.ids), batch.labels)
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs.detach(), 0.1)
    value.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def learning_teacher(loss: Callable[..., Tensor], both: nn.ModuleList, batch: Batch) -> None:
    """Both sides learn, and share their embedding."""
    student, teacher = both
    loss(student(batch.ids), teacher(batch.ids), batch.labels).backward()


def sharing_models() -> nn.ModuleList:
    both = nn.ModuleList([Model(0), Model(1)])
    both[1].embedding = both[0].embedding
    return both


# {name: (the modules that learn, a backward pass of loss, modules and batch)}
LOOPS: dict[str, tuple[Callable[[], nn.Module], Callable[..., None]]] = {
    "accumulation": (Model, accumulation),
    "moving teacher": (lambda: nn.ModuleList([Model(0), Model(1).requires_grad_(False)]), moving_teacher),
    "learning teacher": (sharing_models, learning_teacher),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("loop", LOOPS)
def test_loop(device: str, loop: str, loss: str) -> None:
    """Parameters change as with the plain loss."""
    assert_close(*(take_steps(loop, function, device) for function in LOSSES[loss]))


def mixed_precision(loss: Callable[..., Tensor], device: str) -> tuple[list[Tensor], list[float]]:
    """(changes of the parameters, scales) with float16 logits and a GradScaler whose first scale overflows. With this
    num_items the unscaled gradients of the logits underflow in float16.
    """
    model = Model().to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**64, backoff_factor=2.0**-40)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e6)
    scales = []
    for seed in range(STEPS):
        batch = make_batch(seed, device)
        with torch.autocast(device, torch.float16):
            logits = model(batch.ids)
        assert logits.dtype == torch.float16
        value = loss(logits, batch.teacher.half(), batch.labels, num_items=10**7)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
    start = Model().to(device).parameters()
    return [(after - before).detach() for after, before in zip(model.parameters(), start, strict=True)], scales


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "kl_div"])  # a float16 kl_div overflows
def test_gradient_scaler(device: str, loss: str) -> None:
    """A step that overflows is skipped; the other steps are as accurate as float16."""
    (ours, our_scales), (plain, plain_scales) = (mixed_precision(function, device) for function in LOSSES[loss])
    assert our_scales == plain_scales == [2.0**24] * STEPS, "not the first step alone overflowed"
    assert_close(ours, plain, tolerance=2e-3)


# ---------------------------------------------------------------- several processes


class Step(nn.Module):
    """Student and loss in one module, which is distributed."""

    def __init__(self, loss: Callable[..., Tensor], reentrant: bool | None = None, spare: bool = False) -> None:
        super().__init__()
        self.model = Model()
        self.loss = loss
        self.reentrant = reentrant  # the kind of checkpoint around head and loss, or None
        if spare:
            self.spare = nn.Linear(2, 2)

    def forward(self, batch: Batch, num_items: Tensor) -> Tensor:
        def from_hidden(hidden: Tensor) -> Tensor:
            return self.loss(self.model.head(hidden), batch.teacher, batch.labels, num_items=num_items)

        hidden = self.model.hidden(batch.ids)
        if self.reentrant is None:
            return from_hidden(hidden)
        return checkpoint(from_hidden, hidden, use_reentrant=self.reentrant)


def fsdp(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    options = {"auto_wrap_policy": ModuleWrapPolicy({nn.Linear}), "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(module, **options, use_orig_params=True)


def fully_shard(module: Step) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in (*module.model.children(), module):
        fully_shard(part, mesh=mesh)
    return module


class Job(NamedTuple):
    """A training run of all processes."""

    distribute: Callable[..., nn.Module]
    loss: str = "forward_kl"
    accumulate: bool = False  # communicate only after the last micro-batch
    step: dict[str, Any] = {}  # noqa: RUF012, never written


JOBS = {
    **{f"DDP, {loss}": Job(ddp, loss) for loss in LOSSES},
    "DDP, accumulation": Job(ddp, accumulate=True),
    "DDP, find_unused_parameters": Job(functools.partial(ddp, find_unused_parameters=True), step={"spare": True}),
    "DDP, static_graph": Job(functools.partial(ddp, static_graph=True)),
    "DDP, gradient_as_bucket_view": Job(functools.partial(ddp, gradient_as_bucket_view=True), "jsd", True),
    "DDP, checkpoint": Job(ddp, "jsd", step={"reentrant": False}),
    "DDP, reentrant checkpoint": Job(ddp, step={"reentrant": True}),
    "DDP, compiled": Job(lambda module: torch.compile(ddp(module), backend="aot_eager")),
    "FSDP": Job(fsdp),
    "FSDP, accumulation": Job(fsdp, "jsd", True),
    "FSDP, checkpoint": Job(fsdp, step={"reentrant": False}),
    "fully_shard": Job(fully_shard),
    "fully_shard, checkpoint": Job(fully_shard, "jsd", step={"reentrant": False}),
}


class Outcome(NamedTuple):
    losses: list[Tensor]  # one per step
    gradients: dict[str, Tensor | None]  # of the last step


def full_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """{name of the parameter before it was distributed: its whole gradient}"""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    whole: Any = contextlib.nullcontext()
    if isinstance(module, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(module, with_grads=True)
    gradients = {}
    with whole:
        for name, parameter in module.named_parameters():
            parts = [p for p in name.split(".") if p not in ("module", "_orig_mod", "_fsdp_wrapped_module")]
            gradient = parameter.grad
            full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[".".join(parts)] = None if full is None else full.clone()
    return gradients


def train(module: nn.Module, micro_batches: Any, processes: int = 1, accumulate: bool = False) -> Outcome:
    """The steps of one of `processes`, over whose gradients a distributed module averages."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for seed in range(STEPS):
        optimizer.zero_grad()
        batch = make_batch(seed)
        value = torch.zeros(())
        for rows in micro_batches:
            alone = accumulate and rows != micro_batches[-1]
            with module.no_sync() if alone else contextlib.nullcontext():
                loss = module(batch.rows(*rows), batch.num_items)
                (processes * loss).backward()
            value += loss.detach()
        losses.append(value)
        if seed + 1 < STEPS:
            optimizer.step()
    return Outcome(losses, full_gradients(module))


def run_jobs(rank: int, folder: Path) -> None:
    """One process: all jobs up to the first that raises. The outcomes are saved to a file."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name may not resolve
    torch.set_num_threads(1)
    outcomes: dict[str, Any] = {}
    try:
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, world_size=PROCESSES, rank=rank)
        half = len(MICRO_BATCHES) // PROCESSES
        for name, job in JOBS.items():
            outcomes[name] = f"{name}, process {rank}: not finished"
            module = job.distribute(Step(LOSSES[job.loss].ours, **job.step))
            mine = MICRO_BATCHES[rank * half : (rank + 1) * half]
            outcomes[name] = tuple(train(module, mine, PROCESSES, job.accumulate))
    except Exception:  # the next communication of the other process then raises too
        outcomes[list(outcomes)[-1] if outcomes else ""] = f"process {rank}: {traceback.format_exc()}"
    torch.save(outcomes, folder / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Per process {job: Outcome, or the text of an exception}"""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch is built without gloo")
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run_jobs, (folder,), PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", JOBS)
def test_processes(outcomes: list[dict[str, Any]], name: str) -> None:
    """The losses of the processes add up to that of one process, whose gradients each of them has."""
    errors = [text for results in outcomes for text in results.values() if isinstance(text, str)]
    if any(not isinstance(results.get(name), tuple) for results in outcomes):
        pytest.fail("\n".join(errors), pytrace=False)
    job = JOBS[name]
    expected = train(Step(LOSSES[job.loss].plain, spare=job.step.get("spare", False)), ((0, 12),))
    each = [Outcome(*results[name]) for results in outcomes]
    assert_close([sum(values) for values in zip(*(o.losses for o in each), strict=True)], expected.losses)
    for outcome in each:
        assert list(outcome.gradients) == list(expected.gradients)
        assert_close(list(outcome.gradients.values()), list(expected.gradients.values()))
