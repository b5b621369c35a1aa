"""The main job on real text: distil a student with F.kl_div, with kldiv_ext from logits and from hidden states.

Read from top to bottom: corpus -> tokenizer -> model -> train the teacher -> distil -> report.
Run as `make demo` or `python -m benchmarks.demo` (`--quick` for a smoke test).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import math
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
WORKSPACE = {"cpu": 64_000_000, "cuda": 256_000_000}  # bytes for logits where none are kept
TOLERANCE = 0.01  # the loss curves may differ by this share of their height, at any step


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large the job is."""

    vocab: int
    teacher_seconds: float
    teacher: tuple[int, int]  # width, layers
    student: tuple[int, int]
    batch: int
    length: int
    steps: int


QUICK = Settings(2_048, 3, (64, 2), (32, 1), batch=4, length=64, steps=6)
ON_CPU = Settings(32_768, 100, (256, 4), (128, 2), batch=8, length=128, steps=50)
ON_CUDA = Settings(32_768, 60, (512, 8), (256, 4), batch=8, length=512, steps=200)


# Corpus


def documents() -> Iterator[Path]:
    """Text that every machine with Python and torch has, the most natural first."""
    skip = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(library.rglob("*.py"))
    yield from (f for f in sources if skip.isdisjoint(f.relative_to(library).parts))
    packages = sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"]))
    files = [f for package in packages for f in sorted(package.files or [])]
    prose = ("LICEN", "COPYING", "NOTICE", "METADATA", "README")
    yield from (Path(str(f.locate())) for f in files if f.name.upper().startswith(prose))
    # Some distributions ship a slim standard library: the packages' own sources make up for it.
    code = (f for f in files if f.suffix == ".py" and skip.isdisjoint(f.parts))
    yield from (Path(str(f.locate())) for f in code)


def read_corpus(size: int) -> list[str]:
    """The first `size` characters or so of `documents()`, without duplicates."""
    texts: dict[str, None] = {}  # a set that keeps the order
    total = 0
    for path in documents():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text not in texts:
            texts[text] = None
            total += len(text)
        if total >= size:
            break
    print(f"corpus: {len(texts)} files, {total / 1e6:.1f} million characters")
    return list(texts)


# Tokenizer


def tokenize(texts: list[str], vocab: int) -> Tensor:
    """Train a byte-level BPE on `texts` and return all of them as one row of token ids."""
    start = time.perf_counter()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise SystemExit(
            f"demo: {sum(map(len, texts)) / 1e6:.1f} million characters of text gave a vocabulary "
            f"of {tokenizer.get_vocab_size()} entries, not {vocab}: there is too little text in "
            "this machine's standard library and installed packages for this --vocab."
        )
    encoded = (e.ids for e in tokenizer.encode_batch([text + end for text in texts]))
    ids = torch.tensor(list(itertools.chain.from_iterable(encoded)))
    seconds = time.perf_counter() - start
    print(f"tokenizer: byte-level BPE of {vocab} entries, {len(ids)} tokens, {seconds:.0f} s")
    return ids


def batches(ids: Tensor, settings: Settings, seed: int) -> Iterator[Tensor]:
    """Random windows of the text, [batch, length + 1]; the same ones for the same seed."""
    random = torch.Generator().manual_seed(seed)
    window = torch.arange(settings.length + 1)
    while True:
        starts = torch.randint(len(ids) - settings.length, (settings.batch, 1), generator=random)
        yield ids[(starts + window).to(ids.device)]


# Model


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 products on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, -1, 32).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, n, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class Transformer(nn.Module):
    """A small decoder-only language model with tied embeddings."""

    def __init__(self, vocab: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head is applied to, flattened to [batch * length, width]."""
        with mixed_precision(ids.device):
            x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
            return self.norm(self.blocks(x)).flatten(0, 1)

    @property
    def head(self) -> Tensor:
        """[vocab, width]"""
        return self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, flattened to [batch * length, vocab]; bf16 on a GPU."""
        with mixed_precision(ids.device):
            return F.linear(self.hidden(ids), self.head)


# Teacher


def train_teacher(ids: Tensor, settings: Settings) -> Transformer:
    """Next-token training for a fixed time: the one part whose result depends on the machine."""
    torch.manual_seed(SEED)
    teacher = Transformer(settings.vocab, settings.length, *settings.teacher).to(ids.device)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.0)
    start, done, losses = time.perf_counter(), 0.0, list[float]()
    with tqdm(total=100, unit="%", desc="teacher", disable=None, leave=False) as bar:
        for step, batch in enumerate(batches(ids, settings, SEED), start=1):
            for group in optimizer.param_groups:  # a short warm-up, then down to a tenth
                group["lr"] = 2e-3 * min(1, step / 20) * (1 - 0.9 * done)
            loss = F.cross_entropy(teacher(batch[:, :-1]).float(), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            reported = done
            done = min(1.0, (time.perf_counter() - start) / settings.teacher_seconds)
            bar.update(round(100 * done) - bar.n)
            if step == 1 or int(5 * done) > int(5 * reported):
                bar.write(f"teacher: {done:4.0%}, step {step}, loss {losses[-1]:.3f}")
            if done == 1:
                return teacher.requires_grad_(False)
    raise AssertionError("the batches never end")


# Distillation


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


OPTIONS: dict[str, Any] = {
    "temperature": TEMPERATURE,
    "scale_by_temperature_squared": True,
    "reduction": "batchmean",
}


def with_kldiv_ext(models: Models) -> Tensor:
    """The same loss in one fused call."""
    student_logits = F.linear(models.student, models.student_head)
    teacher_logits = F.linear(models.teacher, models.teacher_head)
    return kldiv_ext.distillation_loss(student_logits, teacher_logits, **OPTIONS)


def without_logits(models: Models) -> Tensor:
    """The same loss, and never the logits of more than a few tokens."""
    workspace = WORKSPACE[models.student.device.type]
    return kldiv_ext.linear_distillation_loss(*models, **OPTIONS, max_workspace=workspace)


def memory_mb(device: torch.device, *, restart: bool = False) -> float:
    """The peak memory since the last call with `restart`; NaN where the system does not tell."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts anew
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(s.split()[1]) * 1024 / 1e6 for s in status if s.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return float("nan")


@dataclasses.dataclass
class Run:
    """What one distillation run measured: one entry per step, and the peak over all steps."""

    name: str
    losses: list[float]
    loss_ms: list[float]
    step_ms: list[float]
    peak_mb: float


def distil(
    name: str,
    loss_function: Callable[[Models], Tensor],
    teacher: Transformer,
    ids: Tensor,
    settings: Settings,
) -> Run:
    """Train a student against `teacher`; everything but the loss function is the same each time."""
    torch.manual_seed(SEED + 1)
    student = Transformer(settings.vocab, settings.length, *settings.student).to(ids.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    data = batches(ids, settings, SEED + 1)
    run = Run(name, [], [], [], 0.0)

    def now_ms() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    for _ in tqdm(range(settings.steps), desc=name, unit="step", disable=None):
        step_start = now_ms()
        batch = next(data)[:, :-1]
        with torch.no_grad():
            teacher_hidden = teacher.hidden(batch)
        student_hidden = student.hidden(batch)

        # The graph is cut before the head, so that head and loss are measured apart from the rest of the model.
        leaf = student_hidden.detach().requires_grad_()
        optimizer.zero_grad()
        before = memory_mb(ids.device, restart=True)
        loss_start = now_ms()
        with mixed_precision(ids.device):
            loss = loss_function(Models(leaf, student.head, teacher_hidden, teacher.head))
        loss.backward()  # type: ignore[no-untyped-call]
        loss_end = now_ms()
        run.peak_mb = max(memory_mb(ids.device) - before, run.peak_mb)  # NaN stays NaN

        student_hidden.backward(leaf.grad)
        optimizer.step()
        run.step_ms.append(now_ms() - step_start)
        run.loss_ms.append(loss_end - loss_start)
        run.losses.append(loss.item())
        del teacher_hidden, student_hidden, leaf, loss  # or the next step's would come on top
    return run


# Report


def print_table(runs: list[Run]) -> None:
    """One line per form of the loss."""
    print(f"\n{'':22}{'final loss':>12}{'head + loss ms':>16}{'step ms':>10}{'peak extra MB':>15}")
    for run in runs:
        peak = f"{run.peak_mb:.0f}" if math.isfinite(run.peak_mb) else "not available"
        loss_ms, step_ms = statistics.median(run.loss_ms), statistics.median(run.step_ms)
        print(f"{run.name:22}{run.losses[-1]:12.5f}{loss_ms:16.1f}{step_ms:10.1f}{peak:>15}")
    print("Head + loss: forward, and backward down to the hidden states. Times are medians over the steps.")


def draw(runs: list[Run], title: str, path: Path) -> None:
    """The loss curves, the time of head and loss and the memory they need."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title)
    curves, times, memory = figure.subplots(1, 3, width_ratios=(2.4, 1, 1))
    styles = [("tab:orange", "-", 5), ("tab:blue", "--", 2), ("tab:green", ":", 2)]
    for run, (color, line, width) in zip(runs, styles, strict=True):
        steps = range(1, len(run.losses) + 1)
        curves.plot(steps, run.losses, line, color=color, linewidth=width, label=run.name)
        for axes, value in ((times, statistics.median(run.loss_ms)), (memory, run.peak_mb)):
            axes.bar_label(axes.bar(run.name.replace(", ", ",\n"), value, color=color), fmt="{:,.0f}")
    curves.set(title="loss curves", xlabel="step", ylabel="nats per token")
    curves.legend()
    times.set(title="time of head + loss", ylabel="ms per step")
    memory.set(title="peak memory of head + loss", ylabel="extra MB")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the demo; return 0 if the loss curves agree."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--seconds-teacher", type=float, help="how long to train the teacher")
    parser.add_argument("--steps", type=int, help="steps of each distillation run")
    parser.add_argument("--vocab", type=int, help="vocabulary entries (default 32768)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the plot")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny vocabulary, a few steps")
    options = parser.parse_args()

    device = torch.device(options.device)
    settings = QUICK if options.quick else ON_CUDA if device.type == "cuda" else ON_CPU
    settings = dataclasses.replace(
        settings,
        vocab=options.vocab or settings.vocab,
        steps=options.steps or settings.steps,
        teacher_seconds=options.seconds_teacher or settings.teacher_seconds,
    )
    threads = f"{torch.get_num_threads()} CPU threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    tokens = settings.batch * settings.length
    title = f"distillation: {tokens} tokens x {settings.vocab} vocabulary entries, {where}"
    print(title)

    # 400 characters of text for each entry are plenty for the BPE and a few seconds' work.
    ids = tokenize(read_corpus(400 * settings.vocab), settings.vocab).to(device)
    teacher = train_teacher(ids, settings)
    forms = {"F.kl_div": with_pytorch, "kldiv_ext": with_kldiv_ext, "kldiv_ext, no logits": without_logits}
    runs = [distil(name, form, teacher, ids, settings) for name, form in forms.items()]

    print_table(runs)
    curves = [run.losses for run in runs]
    largest = max(abs(a - b) for curve in curves[1:] for a, b in zip(curves[0], curve, strict=True))
    share = largest / max(runs[0].losses)
    print(f"largest difference of the loss curves: {largest:.3e} nats per token", end="")
    print(f" ({share:.4%} of their height; tolerance {TOLERANCE:.0%})")
    draw(runs, title, options.output)
    print(f"plot: {options.output.resolve()}\ntotal: {time.perf_counter() - start:.0f} s")
    if share <= TOLERANCE and all(map(math.isfinite, itertools.chain(*curves))):
        return 0
    print("demo: the loss curves do not agree", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
