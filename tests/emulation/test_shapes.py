"""csrc/cuda/shapes.h: blocks, threads and shared memory of launches."""

from __future__ import annotations

import os

import pytest
import torch

from emulation.cases import A100, B200, H200, KB, RTX_4090, RTX_5090, assert_same, logits
from emulation.harness import DTYPES, Device, Kernels

DEVICES = {"A100": A100, "RTX 4090": RTX_4090, "H200": H200, "B200": B200, "RTX 5090": RTX_5090}
VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)  # Llama 2, GPT 2, Llama 3, Qwen 2.5, Gemma 3


def test_resident_rows(kernels: Kernels) -> None:
    """Blocks per cluster for real vocabularies; as many clusters as fit, however many rows there are."""
    kernels.keep_rows(H200)
    clusters = {
        torch.bfloat16: {1024: 0, 1025: 1, 26_000: 1, 32_000: 2, 50_257: 2, 128_256: 5, 151_936: 6, 262_144: 16},
        torch.float32: {4096: 1, 32_000: 3, 50_257: 5, 128_256: 16, 151_936: 16, 262_144: 16, 500_000: 0},
    }
    for dtype, expected in clusters.items():
        for columns, cluster in expected.items():
            blocks, threads, per_cluster, shared = kernels.resident_shape(10_000, columns, dtype)
            assert per_cluster * (blocks > 0) == cluster, (dtype, columns, per_cluster)
            if cluster == 0:
                continue
            assert threads in (128, 160, 256) and blocks % cluster == 0
            assert shared * cluster >= 2 * columns * dtype.itemsize
            assert 132 - cluster < blocks <= 132 * 2  # the emulated device holds two blocks per multiprocessor
            assert kernels.resident_shape(1, columns, dtype) == (cluster, threads, cluster, shared)
    kernels.keep_rows(RTX_5090)
    sizes = {1032: 1, 32_000: 4, 128_256: 8, 262_144: 0}
    assert {v: kernels.resident_shape(99, v, torch.bfloat16)[2] * (v < 2e5) for v in sizes} == sizes
    # Without clusters more blocks may share a row, and no more of them run than have room to meet.
    for device, sizes in (
        (A100, {1032: 1, 32_000: 2, 50_257: 3, 128_256: 7, 262_144: 16}),
        (RTX_4090, {1032: 1, 32_000: 3, 50_257: 5, 128_256: 16, 262_144: 32, 900_000: 0}),
    ):
        kernels.keep_rows(device)
        assert {v: kernels.resident_shape(1, v, torch.bfloat16)[0] for v in sizes} == sizes
        for columns in sizes:
            blocks, _, cluster, _ = kernels.resident_shape(10_000, columns, torch.bfloat16)
            assert cluster == 1 or blocks <= 3 * device.multiprocessors
    kernels.keep_rows(H200)
    os.environ["KLDIV_EXT_CUDA_TIER"] = "streamed"
    assert kernels.resident_shape(99, 32_000, torch.bfloat16)[0] == 0


def test_streamed_rows(kernels: Kernels) -> None:
    """Several short rows share a block. Several blocks share one of few rows where nothing is summed over them,
    and each of them has something to do."""
    for dtype in DTYPES:
        for columns in (1, 64, 65, 128, 256, 257, 1024, 65_536, 65_537, 10**7):
            for rows in (1, 3, 100, 10**6):
                blocks, threads, width, per_row = kernels.row_shape(rows, columns, dtype)
                assert threads % width == 0 and threads % 32 == 0 and width in (8, 16, 32, 64, 128, 256, 512)
                assert threads == width or width <= 32
                assert blocks == min(-(-rows * width // threads), 65_536) and per_row == 1
                *shape, per_row = kernels.row_shape(rows, columns, dtype, sums=False)
                assert shape == [blocks * per_row, threads, width]
                assert per_row == 1 or (blocks * per_row <= 1024 and (per_row - 1) * width * 8 < columns)
                assert per_row == 1 or width > 32
    assert [kernels.row_shape(8, v, torch.bfloat16, sums=False)[3] for v in (1024, 32_000, 10**7)] == [1, 16, 128]


def blocks_per_multiprocessor(device: Device, threads: int, shared: int) -> int:
    """At 128 registers per thread, of which a multiprocessor has 65,536, as CUDA's occupancy functions compute it."""
    by_shared = (device.shared_bytes_per_block + KB) // (-(-shared // 128) * 128 + KB)  # CUDA reserves 1 KB per block
    return min(65_536 // 128 // threads, by_shared) if shared <= device.shared_bytes_per_block else 0


@pytest.mark.parametrize("name", DEVICES)
def test_launches_fit_their_devices(kernels: Kernels, name: str) -> None:
    """Launch bounds leave 128 registers per thread; streamed rows use up to 4 KB of static shared memory."""
    device = DEVICES[name]
    kernels.keep_rows(device)
    resident = 0
    for dtype in (torch.bfloat16, torch.float32):
        for columns in VOCABULARIES:
            _, threads, *_ = kernels.row_shape(4096, columns, dtype)
            launches = [(threads, 4 * KB)]
            blocks, threads, _, shared = kernels.resident_shape(4096, columns, dtype)
            if blocks > 0:
                launches.append((threads, shared))
                resident += 1
            for threads, shared in launches:
                fitting = blocks_per_multiprocessor(device, threads, shared)
                assert fitting >= 1, (dtype, columns, threads, shared)
                if name == "H200" and dtype == torch.bfloat16:
                    assert fitting == {160: 3, 256: 2, 512: 1}[threads], (columns, threads, shared)
    assert resident > 0


def test_a_device_may_be_too_small(kernels: Kernels) -> None:
    student, teacher = logits(2, 300, torch.float32)
    expected = kernels.distillation(student, teacher)
    kernels.set_device(*Device(shared_bytes_per_block=8))
    with pytest.raises(RuntimeError, match="more shared memory than a block can have"):
        kernels.distillation(student, teacher)
    kernels.set_device()
    assert_same(kernels.distillation(student, teacher), expected)
