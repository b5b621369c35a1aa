"""What benchmarks.resources reads from an object: on text as cuobjdump prints it, so without an object."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, report_resources, resources
from benchmarks.resources import DEVICES, Launch, blocks_per_multiprocessor

FORWARD_KL = (
    "_ZN5kldiv4cuda11distil_rowsINS0_9DenseSideINS_8BFloat16EEENS_8portable9ForwardKLEEEvNS_16DistillationArgsET0_i"
)
SUM_PARTS = "_ZN5kldiv4cuda9sum_partsIfEEvPKT_ldPS2_"
HEADER = """
Fatbin elf code:
================
arch = {}
code version = [1,8]
host = linux
compile_size = 64bit
compressed

Resource usage:
 Common:
  GLOBAL:0
 Function {}:
  REG:{} STACK:0 SHARED:{} LOCAL:0 CONSTANT[0]:928 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# A row of bfloat16 logits: phases 1, 2, both at once and 3 in a loop over rows, and code that left the first of them
# and the last.
CODE = """
	code for sm_90
	.target	sm_90

		Function : {}
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;              /* 0x0000000602047981 */
                                                                                 /* 0x000ea2000c1e1d00 */
        /*0020*/                   LDG.E.128 R8, desc[UR6][R2.64+0x10] ;
        /*0030*/               @P1 BRA 0x0190 ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/                   SHFL.DOWN PT, R6, R5, 0x1, 0x1f ;
        /*0070*/               @P0 BRA 0x60 ;
        /*0080*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0090*/                   LDG.E.128 R8, desc[UR6][R2.64+0x10] ;
        /*0098*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/              @!P0 BRA 0x80 ;
        /*00b0*/                   LDG.E.EF.128 R4, desc[UR6][R2.64] ;
        /*00c0*/                   LDG.E.EF.128 R8, desc[UR6][R2.64+0x10] ;
        /*00c8*/                   MUFU.EX2 R4, R4 ;
        /*00d0*/                   STG.E.EF.128 desc[UR6][R2.64], R4 ;
        /*00e0*/             @!UP0 BRA 0xb0 ;
        /*00f0*/                   LDG.E.EF.128 R4, desc[UR6][R2.64] ;
        /*0100*/                   LDG.E.EF.128 R8, desc[UR6][R2.64+0x10] ;
        /*0108*/                   MUFU.EX2 R4, R4 ;
        /*0110*/                   STG.E.EF.128 desc[UR6][R2.64], R4 ;
        /*0120*/               @P2 STG.E.EF.128 desc[UR6][R4.64], R4 ;
        /*0130*/              @!P0 BRA 0xf0 ;
        /*0140*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0150*/                   STG.E.U16 desc[UR6][R2.64], R4 ;
        /*0160*/              @!P0 BRA 0x140 ;
        /*0162*/                   LDG.E.EF.128 R4, desc[UR6][R2.64] ;
        /*0164*/                   LDG.E.EF.128 R8, desc[UR6][R2.64+0x10] ;
        /*0166*/                   STS.128 [R1], R4 ;
        /*0168*/              @!P0 BRA 0x162 ;
        /*0170*/               @P3 BRA 0x0 ;
        /*0180*/                   EXIT ;
        /*0190*/                   STL [R1], R4 ;
        /*01a0*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64] ;
        /*01b0*/                   LDS.128 R4, [R4] ;
        /*01c0*/                   BRA 0x0040 ;
        /*01d0*/                   BRA 0x1d0;
""".replace("{}", FORWARD_KL)
PTX = "\nFatbin ptx code:\n================\narch = sm_90\ncode version = [9,0]\n"
TEXT = HEADER.format("sm_90", FORWARD_KL, 96, 2560) + CODE + HEADER.format("sm_80", SUM_PARTS, 14, 256) + PTX


def records() -> list[dict[str, Any]]:
    return resources.parse(TEXT.splitlines(keepends=True))


def test_usage_and_names() -> None:
    """From sm_90 on, cuobjdump counts what CUDA takes of shared memory itself."""
    row, total = records()
    assert (row["architecture"], row["kernel"]) == ("sm_90", "distil_rows")
    assert row["arguments"] == ["DenseSide<BFloat16>", "ForwardKL"]
    assert resources.dense_dtype(row) == "bfloat16"
    assert [row[name] for name in ("registers", "stack", "shared", "local")] == [96, 0, 2560 - 1024, 0]
    assert (total["architecture"], total["kernel"], total["arguments"]) == ("sm_80", "sum_parts", ["float"])
    assert (total["registers"], total["shared"]) == (14, 256)
    assert resources.dense_dtype(total) is None and "loads_16" not in total


@pytest.mark.parametrize(
    ("symbol", "kernel", "arguments"),
    [
        (
            "_ZN5kldiv4cuda11distil_rowsINS0_9DenseSideIfEENS_8portable9ExchangedINS4_9ForwardKLEEEEEv"
            "NS_16DistillationArgsET0_NS4_7ScalingINT_5acc_tEEE",
            "distil_rows",
            ["DenseSide<float>", "Exchanged<ForwardKL>"],
        ),
        (
            "_ZN5kldiv4cuda45_GLOBAL__N__ecf14d0d_12_pointwise_cu_728f41e218pointwise_elementsILb1ENS1_13Dense"
            "ElementsIfEEEEvNS_13PointwiseArgsEb",
            "pointwise_elements",
            ["true", "DenseElements<float>"],
        ),
        ("_ZN5kldiv4cuda5plainEPKfl", "plain", []),
        ("main", "main", []),
    ],
)
def test_names(symbol: str, kernel: str, arguments: list[str]) -> None:
    assert resources.name_of(symbol) == (kernel, arguments)


def test_instructions_are_counted() -> None:
    row = records()[0]
    assert row["instructions"] == 37
    assert {name: row[name] for name in resources.COUNTED} == {
        "loads_16": 11,
        "copies_16": 1,
        "stores_16": 3,
        "shared_loads_16": 1,
        "spills": 1,
        "exponentials": 4,
    }


def test_hot_loops() -> None:
    """Neither a shuffle's loop, nor that of one side alone, nor one that only reads, nor the one over rows, nor what
    code moved away closes."""
    assert records()[0]["loops"] == [
        {"phase": "1", "instructions": 5, "pairs": 8, "size": 5},
        {"phase": "2", "instructions": 4, "pairs": 8, "size": 4},
        {"phase": "2+3", "instructions": 5, "pairs": 8, "size": 5},
        {"phase": "3", "instructions": 6, "pairs": 8, "size": 6},
    ]


def code(*lines: str) -> list[resources.Instruction]:
    """Of a kernel, each instruction at 16 times its number."""
    text = "".join(f"        /*{16 * i:04x}*/    {line} ;\n" for i, line in enumerate(lines))
    kernel = HEADER.format("sm_90", FORWARD_KL, 1, 0) + CODE[: CODE.index("        /*0000*/")] + text
    found: list[resources.Instruction] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "describe", lambda _record, instructions: found.extend(instructions) or {})
        resources.parse(kernel.splitlines(keepends=True))
    return found


BRANCHES = (
    "LDS.128 R4, [R2]",  # 0x00
    "@P0 BRA 0x50",  # past what is rare
    "FADD R1, R1, R1",
    "FADD R1, R1, R1",
    "FADD R1, R1, R1",
    "BRA P1, 0x90",  # 0x50: the long form of it
    "MUFU.EX2 R4, R4",
    "MUFU.EX2 R4, R4",
    "BRA 0xd0",
    "FADD R1, R1, R1",  # 0x90
    "MUFU.EX2 R4, R4",
    "MUFU.EX2 R4, R4",
    "@!P0 BRA 0xa0",  # half of it at a time
    "@!P1 BRA 0x0",  # 0xd0
)


def test_shortest_way() -> None:
    """Past what is rare, but not past what is needed."""
    loop = code(*BRANCHES)
    assert [c.conditional for c in loop if c.target is not None] == [True, True, False, True, True]
    assert resources.loops_within(loop) == {10, 11, 12}
    for exponentials, expected in ((0, 7), (2, 7), (3, 11), (4, 11), (5, 14)):
        needed = {"shared_loads_16": 1, "exponentials": exponentials}
        assert resources.shortest_way(loop, needed, set()) == expected, exponentials
    needed = {"shared_loads_16": 1, "exponentials": 3}
    assert resources.shortest_way(loop, needed, resources.loops_within(loop)) is None
    assert resources.shortest_way(loop, {"stores_16": 1}, set()) is None


def test_phases() -> None:
    assert resources.phases([0, 0, 0, 2, 4]) == ["1 alone", "1", "2", "2+3", "3"]
    assert resources.phases([0, 0, 2]) == ["1", "2", "3"]
    assert resources.phases([]) == []


def test_pairs_of_loops() -> None:
    """Of shared memory where that is read: loads of global memory are then for rows that could not be copied."""
    assert resources.pairs_of(Counter(loads_16=4), "float32") == 8
    assert resources.pairs_of(Counter(loads_16=4), "float64") == 4
    assert resources.pairs_of(Counter(loads_16=4, shared_loads_16=2), "float16") == 8


def test_text_without_an_architecture() -> None:
    with pytest.raises(ValueError, match="a cubin"):
        resources.parse(TEXT[TEXT.index("Resource") :].splitlines())


def test_absent_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "cuobjdump", lambda: None)
    with pytest.raises(FileNotFoundError, match="cuobjdump is neither"):
        resources.read_usage(tmp_path)


def test_failure_of_the_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "cuobjdump"
    tool.write_text("#!/bin/sh\necho no such object >&2\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setattr(resources, "cuobjdump", lambda: str(tool))
    with pytest.raises(RuntimeError, match="no such object"):
        resources.read_usage(tmp_path)


# ---------------------------------------------------------------- occupancy


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

    clusters = False

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
        for vocab in resources.VOCABULARIES
    ]
    assert list(resources.launches(FakeKernels(), a100)) == streamed
    resident = Launch("distil_resident_rows", "bfloat16", 32000, 256, 2, 65536)
    assert list(resources.launches(FakeKernels(), h200)) == [streamed[0], resident, *streamed[1:]]


# ---------------------------------------------------------------- the table


def run() -> dict[str, Any]:
    row = records()[0]
    resident = {**row, "kernel": resources.RESIDENT, "shared": 13312, "registers": 120, "spills": 0}
    wide = {**row, "arguments": ["DenseSide<double>", "ForwardKL"], "registers": 200, "spills": 0}
    kernels = [row, resident, wide, {**row, "architecture": "sm_100", "spills": 0}]
    return {
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python -m benchmarks.resources",
        "commit": "0123456789abcdef",
        "nvcc": "13.0",
        "machine": {"device": "cpu"},
        "architectures": ["sm_90", "sm_100"],
        "occupancy": resources.occupancies(kernels, FakeKernels()),
        "kernels": kernels,
    }


def test_occupancies() -> None:
    """Of devices whose architecture is there, and of kernels that are."""
    found = run()["occupancy"]
    assert {record["device"] for record in found} == {"H200", "B200"}
    assert {record["dtype"] for record in found} == {"bfloat16"}
    assert [record for record in found if record["kernel"] == resources.RESIDENT] == [
        {
            "device": "H200",
            "architecture": "sm_90",
            "kernel": "distil_resident_rows",
            "dtype": "bfloat16",
            "vocab": 32000,
            "threads": 256,
            "cluster": 2,
            "dynamic_shared": 65536,
            "static_shared": 13312,
            "registers": 120,
            "blocks": 2,
            "occupancy": 0.25,
        }
    ]


def test_table_of_resources(tmp_path: Path) -> None:
    assert report.generate("cuda-resources", tmp_path) == "What the compiled kernels take has not been recorded yet."
    (tmp_path / report_resources.FILE).write_text(json.dumps(run()))
    text = report.generate("cuda-resources", tmp_path)
    table, _, said = text.partition("\n\n")
    header, _, *lines = table.splitlines()
    cells = [dict(zip(header.split("|"), line.split("|"), strict=True)) for line in lines]
    streamed, resident = ({name.strip(): value.strip() for name, value in line.items()} for line in cells)
    assert streamed == {
        "": "",
        "rows": "streamed",
        "dtype": "bfloat16",
        "variant": "`forward_kl`",
        "registers": "96",
        "static shared memory": "1536",
        "loads": "11",
        "copies": "1",
        "stores": "3",
        "from shared memory": "1",
        "spills": "1",
        "phase 1": "1",
        "phase 2": "0",
        "phase 3": "1",
        "phases 2 and 3 in one": "1",
        "loss alone": "-",
        "blocks x threads": "2 x 256, 1 x 512",
        "occupancy": "25%",
    }
    assert (resident["rows"], resident["registers"]) == ("resident", "120")
    assert (resident["blocks x threads"], resident["occupancy"]) == ("2 x 256", "25%")
    assert "All 4 kernels for sm_90, sm_100: registers at most 120 where they compute in float and 200 where" in said
    assert "with spills or a stack: 1. CUDA" in said
    assert "CUDA 13.0; 2026-01-01, commit 0123456789ab; `python -m benchmarks.resources`." in said
    # The other tables do not take it for a run of theirs.
    assert report.generate("cpu-summary", tmp_path) == report.unmeasured("cpu", "speed")
