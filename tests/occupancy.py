"""How many blocks of the CUDA kernels fit a multiprocessor, for the launch shapes of csrc/cuda/shapes.h."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.resources import RESERVED_SHARED, RESIDENT, STREAMED


class Device(NamedTuple):
    """A device and its limits per multiprocessor, from the CUDA C++ Programming Guide."""

    name: str
    architecture: str
    multiprocessors: int
    threads: int
    shared: int
    shared_per_block: int
    clusters: bool


KB = 1024
DEVICES = (
    Device("A100", "sm_80", 108, 2048, 164 * KB, 163 * KB, clusters=False),
    Device("RTX 4090", "sm_89", 128, 1536, 100 * KB, 99 * KB, clusters=False),
    Device("H200", "sm_90", 132, 2048, 228 * KB, 227 * KB, clusters=True),
    Device("B200", "sm_100", 148, 2048, 228 * KB, 227 * KB, clusters=True),
    Device("RTX 5090", "sm_120", 170, 1536, 100 * KB, 99 * KB, clusters=True),
)
REGISTERS = 65536  # of a multiprocessor, a quarter of them for each quarter of its warps
REGISTER_UNIT, SHARED_UNIT, WARP = 256, 128, 32
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)  # Llama 2, GPT 2, Llama 3, Qwen 2.5, Gemma 3


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def blocks_per_multiprocessor(device: Device, threads: int, registers: int, shared: int) -> int:
    """cudaOccupancyMaxActiveBlocksPerMultiprocessor; `shared` is static plus dynamic.

    Blocks of at least 128 threads never meet the limit on the number of blocks.
    """
    warps = round_up(threads, WARP) // WARP
    by_registers = 4 * (REGISTERS // 4 // round_up(registers * WARP, REGISTER_UNIT)) // warps
    by_shared = device.shared // round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    return min(by_registers, by_shared, device.threads // threads) if shared <= device.shared_per_block else 0


class Launch(NamedTuple):
    kernel: str
    dtype: str
    vocab: int
    threads: int
    cluster: int
    dynamic_shared: int


def launches(kernels: Any, device: Device) -> Iterator[Launch]:
    """The launches of row kernels for real vocabularies; `kernels` is an emulation.harness.Kernels."""
    capability = int(re.sub(r"\D", "", device.architecture))
    kernels.set_device(capability, device.multiprocessors, device.shared_per_block, device.clusters)
    rows = 4096  # more than run at a time
    for dtype in ("bfloat16", "float32"):
        for vocab in VOCABULARIES:
            _, threads, *_ = kernels.row_shape(rows, vocab, getattr(torch, dtype))
            yield Launch(STREAMED, dtype, vocab, threads, 1, 0)
            blocks, threads, cluster, shared = kernels.resident_shape(rows, vocab, getattr(torch, dtype))
            if blocks > 0:
                yield Launch(RESIDENT, dtype, vocab, threads, cluster, shared)
