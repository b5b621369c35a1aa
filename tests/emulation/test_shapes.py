"""csrc/cuda/shapes.h: blocks, threads and shared memory of launches."""

import pytest
import torch

from emulation.cases import A100, B200, DTYPES, H200, KB, RTX_4090, RTX_5090, assert_same, logits
from emulation.harness import Device, Kernels

VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)  # Llama 2, GPT 2, Llama 3, Qwen 2.5, Gemma 3

# Blocks that share a row, by the length of rows; 0 where they are streamed.
BLOCKS_PER_ROW = [
    (H200, torch.bfloat16, {1024: 0, 1025: 1, 26_000: 1, 32_000: 2, 50_257: 2, 128_256: 5, 151_936: 6, 262_144: 16}),
    (H200, torch.float32, {4096: 1, 32_000: 3, 50_257: 5, 128_256: 16, 151_936: 16, 262_144: 16, 500_000: 0}),
    (RTX_5090, torch.bfloat16, {1032: 1, 32_000: 4, 128_256: 8, 262_144: 0}),
    # Without clusters more blocks may share a row.
    (A100, torch.bfloat16, {1032: 1, 32_000: 2, 50_257: 3, 128_256: 7, 262_144: 16}),
    (RTX_4090, torch.bfloat16, {1032: 1, 32_000: 3, 50_257: 5, 128_256: 16, 262_144: 32, 900_000: 0}),
]


@pytest.mark.parametrize(("device", "dtype", "per_row"), BLOCKS_PER_ROW)
def test_resident_rows(kernels: Kernels, device: Device, dtype: torch.dtype, per_row: dict[int, int]) -> None:
    """As many clusters as fit, however many rows there are."""
    kernels.keep_rows(device)
    for columns, expected in per_row.items():
        blocks, threads, cluster, shared = kernels.resident_shape(10_000, columns, dtype)
        assert cluster * (blocks > 0) == expected, columns
        if expected == 0:
            continue
        assert threads in (128, 160, 256) and blocks % cluster == 0
        assert shared * cluster >= 2 * columns * dtype.itemsize
        assert kernels.resident_shape(1, columns, dtype) == (cluster, threads, cluster, shared)
        if device.clusters:  # the emulated device holds two blocks per multiprocessor
            assert device.multiprocessors - cluster < blocks <= 2 * device.multiprocessors, columns
        else:  # more have no room to meet
            assert cluster == 1 or blocks <= 3 * device.multiprocessors, columns
    kernels.stream_rows(device)
    assert kernels.resident_shape(99, 32_000, dtype)[0] == 0


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


@pytest.mark.parametrize("device", [A100, RTX_4090, H200, B200, RTX_5090])
def test_launches_fit_their_devices(kernels: Kernels, device: Device) -> None:
    """Launch bounds leave 128 registers per thread; streamed rows use up to 4 KB of static shared memory."""
    kernels.keep_rows(device)
    assert kernels.resident_shape(4096, VOCABULARIES[0], torch.bfloat16)[0] > 0
    for dtype in (torch.bfloat16, torch.float32):
        for columns in VOCABULARIES:
            launches = [(kernels.row_shape(4096, columns, dtype)[1], 4 * KB)]
            blocks, threads, _, shared = kernels.resident_shape(4096, columns, dtype)
            if blocks > 0:
                launches.append((threads, shared))
            for threads, shared in launches:
                fitting = blocks_per_multiprocessor(device, threads, shared)
                assert fitting >= 1, (dtype, columns, threads, shared)
                if (device, dtype) == (H200, torch.bfloat16):
                    assert fitting == {160: 3, 256: 2, 512: 1}[threads], (columns, threads, shared)


def test_a_device_may_be_too_small(kernels: Kernels) -> None:
    student, teacher = logits(2, 300, torch.float32)
    expected = kernels.distillation(student, teacher)
    kernels.set_device(*Device(shared_bytes_per_block=8))
    with pytest.raises(RuntimeError, match="more shared memory than a block can have"):
        kernels.distillation(student, teacher)
    kernels.set_device(*Device())
    assert_same(kernels.distillation(student, teacher), expected)
