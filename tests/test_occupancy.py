"""tests/occupancy.py, which says how many blocks of the CUDA kernels fit a multiprocessor."""

from __future__ import annotations

import pytest
import torch
from occupancy import DEVICES, VOCABULARIES, Launch, blocks_per_multiprocessor, launches


@pytest.mark.parametrize(
    ("device", "threads", "registers", "shared", "blocks"),
    [
        ("H200", 256, 128, 0, 2),
        ("H200", 512, 128, 0, 1),
        ("H200", 512, 129, 0, 0),  # 136 to a thread
        ("H200", 256, 96, 0, 2),  # 5 warps to a quarter
        ("H200", 256, 80, 0, 3),
        ("H200", 256, 33, 0, 6),  # 40 to a thread
        ("H200", 256, 32, 0, 8),
        ("RTX 4090", 256, 32, 0, 6),
        ("H200", 256, 128, 113 * 1024, 2),
        ("H200", 256, 128, 113 * 1024 + 1, 1),
        ("H200", 256, 128, 227 * 1024, 1),
        ("H200", 256, 128, 227 * 1024 + 1, 0),
        ("A100", 256, 128, 100 * 1024, 1),
        ("RTX 5090", 256, 128, 99 * 1024, 1),
    ],
)
def test_blocks_per_multiprocessor(device: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    (found,) = (d for d in DEVICES if d.name == device)
    assert blocks_per_multiprocessor(found, threads, registers, shared) == blocks


class FakeKernels:
    """Shapes of harness.Kernels, in which bfloat16 rows of one vocabulary are resident where there are clusters."""

    def set_device(self, _capability: int, _multiprocessors: int, _shared: int, clusters: bool) -> None:
        self.clusters = clusters

    def row_shape(self, _rows: int, columns: int, _dtype: torch.dtype) -> tuple[int, int, int, int]:
        threads = 256 if columns <= 65536 else 512
        return 1, threads, threads, 1

    def resident_shape(self, _rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
        resident = self.clusters and dtype == torch.bfloat16 and columns == 32000
        return (264, 256, 2, 65536) if resident else (0, 0, 1, 0)


def test_launches() -> None:
    a100, _, h200, *_ = DEVICES
    streamed = [
        Launch("distil_rows", dtype, vocab, 256 if vocab <= 65536 else 512, 1, 0)
        for dtype in ("bfloat16", "float32")
        for vocab in VOCABULARIES
    ]
    assert list(launches(FakeKernels(), a100)) == streamed
    resident = Launch("distil_resident_rows", "bfloat16", 32000, 256, 2, 65536)
    assert list(launches(FakeKernels(), h200)) == [streamed[0], resident, *streamed[1:]]
