"""Distil a student from a teacher on real text: with F.kl_div, with kldiv_ext from logits and from hidden states.

Read from top to bottom: text -> tokenizer -> model -> teacher -> distillation -> report.
Run `make demo` or `python -m examples.demo` (`--quick` for a smoke test).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import kldiv_ext

SEED = 0
TEMPERATURE = 2.0
WORKSPACE = {"cpu": 64_000_000, "cuda": 256_000_000}  # bytes for chunks of logits in the run from hidden states
TOLERANCE = 0.01  # largest difference of the loss curves, as a share of their height


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of the job."""

    vocab: int
    teacher_seconds: float
    teacher: tuple[int, int]  # width, layers
    student: tuple[int, int]
    batch: int
    length: int
    steps: int


QUICK = Settings(2_048, 3, (64, 2), (32, 1), batch=4, length=64, steps=6)
ON_CPU = Settings(32_768, 30, (128, 2), (64, 2), batch=4, length=128, steps=30)
ON_CUDA = Settings(32_768, 40, (512, 8), (256, 4), batch=8, length=512, steps=200)


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Print what is being done, and how long it took."""
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    yield
    print(f"  done in {time.perf_counter() - start:.0f} s", flush=True)


def documents() -> Iterator[Path]:
    """Text that every machine with Python and torch has, the most natural first."""
    skip = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    library = Path(sysconfig.get_path("stdlib"))
    yield from (f for f in sorted(library.rglob("*.py")) if skip.isdisjoint(f.relative_to(library).parts))
    packages = sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"]))
    files = [f for package in packages for f in sorted(package.files or [])]
    prose = ("LICEN", "COPYING", "NOTICE", "METADATA", "README")
    yield from (Path(str(f.locate())) for f in files if f.name.upper().startswith(prose))
    yield from (Path(str(f.locate())) for f in files if f.suffix == ".py" and skip.isdisjoint(f.parts))


def read_text(size: int) -> list[str]:
    """About the first `size` characters of `documents()`, without duplicates."""
    texts: dict[str, None] = {}  # an ordered set
    total = 0
    for path in documents():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            total += len(text) if text not in texts else 0
            texts[text] = None
        if total >= size:
            break
    print(f"  {len(texts)} files, {total / 1e6:.1f} million characters")
    return list(texts)


def tokenize(texts: list[str], vocab: int) -> Tensor:
    """Train a byte-level BPE on the texts and return all of them as one row of token ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    options: dict[str, Any] = {
        "special_tokens": [end],
        "initial_alphabet": alphabet,
        "show_progress": sys.stderr.isatty(),
    }
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, **options))
    if tokenizer.get_vocab_size() != vocab:
        raise SystemExit(f"demo: this machine holds too little text for a vocabulary of {vocab} entries, see --vocab")
    encoded = (e.ids for e in tokenizer.encode_batch([text + end for text in texts]))
    ids = torch.tensor(list(itertools.chain.from_iterable(encoded)))
    print(f"  {len(ids)} tokens")
    return ids


def batches(ids: Tensor, settings: Settings, seed: int) -> Iterator[Tensor]:
    """Random windows of the text, [batch, length + 1]; the same ones for the same seed."""
    random = torch.Generator().manual_seed(seed)
    window = torch.arange(settings.length + 1)
    while True:
        starts = torch.randint(len(ids) - settings.length, (settings.batch, 1), generator=random)
        yield ids[(starts + window).to(ids.device)]


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 matrix products on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Transformer(nn.Module):
    """A small decoder-only language model; its head is `tokens.weight`, [vocab, width]."""

    def __init__(self, vocab: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """The hidden states before the head, [batch * length, width]."""
        with mixed_precision(ids.device):
            x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
            mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
            return self.blocks(x, mask=mask, is_causal=True).flatten(0, 1)


def train_teacher(ids: Tensor, settings: Settings) -> Transformer:
    """Next-token training for a fixed time: the one part whose result depends on the machine's speed."""
    torch.manual_seed(SEED)
    teacher = Transformer(settings.vocab, settings.length, *settings.teacher).to(ids.device)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.0)
    start, done = time.perf_counter(), 0.0
    with tqdm(total=100, unit="%", disable=None) as bar:
        for step, batch in enumerate(batches(ids, settings, SEED), start=1):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (1 - 0.9 * done)
            with mixed_precision(ids.device):
                logits = F.linear(teacher(batch[:, :-1]), teacher.tokens.weight)
            loss = F.cross_entropy(logits.float(), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            optimizer.step()
            done = min(1.0, (time.perf_counter() - start) / settings.teacher_seconds)
            bar.update(round(100 * done) - bar.n)
            bar.set_postfix(loss=f"{loss.item():.2f}")
            if done == 1:
                print(f"  {step} steps, cross entropy {loss.item():.3f}")
                return teacher.requires_grad_(False)
    raise AssertionError("the batches never end")


class Models(NamedTuple):
    """Hidden states [tokens, width] and heads [vocab, width]."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor


def with_pytorch(models: Models) -> Tensor:
    """The usual form, as people write it today."""
    student_logits = F.linear(models.student, models.student_head)
    teacher_logits = F.linear(models.teacher, models.teacher_head)
    log_q = F.log_softmax(student_logits.float() / TEMPERATURE, -1)
    p = F.softmax(teacher_logits.float() / TEMPERATURE, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


OPTIONS: dict[str, Any] = {"temperature": TEMPERATURE, "scale_by_temperature_squared": True, "reduction": "batchmean"}


def with_kldiv_ext(models: Models) -> Tensor:
    """The same loss in one fused call."""
    student_logits = F.linear(models.student, models.student_head)
    teacher_logits = F.linear(models.teacher, models.teacher_head)
    return kldiv_ext.distillation_loss(student_logits, teacher_logits, **OPTIONS)


def without_logits(models: Models) -> Tensor:
    """The same loss from hidden states: only chunks of the logits exist."""
    workspace = WORKSPACE[models.student.device.type]
    return kldiv_ext.linear_distillation_loss(*models, **OPTIONS, max_workspace=workspace)


def peak_mb(device: torch.device, *, restart: bool = False) -> float:
    """The peak memory since the last call with `restart`; NaN where the system does not tell."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
        return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024 / 1e6
    except (OSError, IndexError):
        return float("nan")


def now_ms(device: torch.device) -> float:
    """The time when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


class Run:
    """The measurements of one distillation: one entry per step, and the peak memory over all steps."""

    def __init__(self, name: str) -> None:
        self.name, self.peak_mb, self.losses, self.loss_ms = name, 0.0, list[float](), list[float]()


def distil(name: str, loss_function: Callable[[Models], Tensor], teacher: Transformer, ids: Tensor, s: Settings) -> Run:
    """Train a student against the teacher; everything but the loss function is the same each time."""
    torch.manual_seed(SEED + 1)
    student = Transformer(s.vocab, s.length, *s.student).to(ids.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    data = batches(ids, s, SEED + 1)
    run = Run(name)

    for _ in tqdm(range(s.steps), unit="step", disable=None):
        batch = next(data)[:, :-1]
        with torch.no_grad():
            teacher_hidden = teacher(batch)
        student_hidden = student(batch)

        # The graph is cut before the head, so that head and loss are measured without the rest of the model.
        leaf = student_hidden.detach().requires_grad_()
        optimizer.zero_grad()
        before, start = peak_mb(ids.device, restart=True), now_ms(ids.device)
        with mixed_precision(ids.device):
            loss = loss_function(Models(leaf, student.tokens.weight, teacher_hidden, teacher.tokens.weight))
        loss.backward()  # type: ignore[no-untyped-call]
        run.loss_ms.append(now_ms(ids.device) - start)
        run.peak_mb = max(peak_mb(ids.device) - before, run.peak_mb)  # NaN stays NaN

        student_hidden.backward(leaf.grad)
        optimizer.step()
        run.losses.append(loss.item())
        del teacher_hidden, student_hidden, leaf, loss  # or they would add to the next step's peak
    return run


def draw(runs: list[Run], title: str, path: Path) -> None:
    """The loss curves, and time and memory of head and loss."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title)
    curves, times, memory = figure.subplots(1, 3, width_ratios=(2.4, 1, 1))
    for run, color, line, width in zip(runs, ("C1", "C0", "C2"), ("-", "--", ":"), (5, 2, 2), strict=True):
        curves.plot(range(1, len(run.losses) + 1), run.losses, line, color=color, linewidth=width, label=run.name)
        for axes, value in ((times, statistics.median(run.loss_ms)), (memory, run.peak_mb)):
            axes.bar_label(axes.bar(run.name.replace(", ", ",\n"), value, color=color), fmt="{:,.0f}")
            axes.margins(y=0.1)
    curves.set(title="loss curves", xlabel="step", ylabel="loss (nats per token)")
    curves.legend()
    times.set(title="head + loss: time", ylabel="ms per step")
    memory.set(title="head + loss: memory", ylabel="peak extra MB")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the demo; return 0 if the loss curves agree."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seconds-teacher", type=float, help="how long to train the teacher")
    parser.add_argument("--steps", type=int, help="steps of each distillation")
    parser.add_argument("--vocab", type=int, help="vocabulary entries (default 32768)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the plot (default demo.png)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny vocabulary, a few steps")
    args = parser.parse_args()

    device = torch.device(args.device)
    s = QUICK if args.quick else ON_CUDA if device.type == "cuda" else ON_CPU
    asked = {"vocab": args.vocab, "steps": args.steps, "teacher_seconds": args.seconds_teacher}
    s = dataclasses.replace(s, **{name: value for name, value in asked.items() if value})
    machine = torch.cuda.get_device_name(device) if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    title = f"distillation: {s.batch * s.length} tokens x {s.vocab} vocabulary entries, {machine}"
    print(title)

    with stage(f"1/5 training a tokenizer of {s.vocab} entries on this machine's Python sources and licenses"):
        ids = tokenize(read_text(300 * s.vocab), s.vocab).to(device)
    with stage(f"2/5 training the teacher for {s.teacher_seconds:.0f} s"):
        teacher = train_teacher(ids, s)
    forms = {"F.kl_div": with_pytorch, "kldiv_ext": with_kldiv_ext, "kldiv_ext, no logits": without_logits}
    runs = []
    for i, (name, form) in enumerate(forms.items(), start=3):
        with stage(f"{i}/5 distilling a student with {name}, {s.steps} steps"):
            runs.append(distil(name, form, teacher, ids, s))

    print(f"\n{'':22}{'final loss':>12}{'head + loss ms':>16}{'peak extra MB':>15}")
    for run in runs:
        print(f"{run.name:22}{run.losses[-1]:12.5f}{statistics.median(run.loss_ms):16.1f}{run.peak_mb:15.0f}")
    print("Head + loss: forward, and backward to the hidden states and the head; the median over the steps.")
    curves = [run.losses for run in runs]
    largest = max(abs(a - b) for curve in curves[1:] for a, b in zip(curves[0], curve, strict=True))
    share = largest / max(curves[0])
    shares = f"{share:.4%} of their height; tolerance {TOLERANCE:.0%}"
    print(f"largest difference of the loss curves: {largest:.3e} nats per token ({shares})")
    draw(runs, title, args.output)
    print(f"plot: {args.output.resolve()}\ntotal: {time.perf_counter() - start:.0f} s")
    if share <= TOLERANCE and all(map(math.isfinite, itertools.chain(*curves))):
        return 0
    print("demo: the loss curves do not agree", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
