"""What benchmarks.resources reads, from text as cuobjdump prints it."""

import re
from pathlib import Path

import pytest

from benchmarks import resources

FORWARD_KL = "_ZN5kldiv4cuda11distil_rowsINS0_9DenseSideINS_8BFloat16EEENS_8portable9ForwardKLEEEvi"
SUM_PARTS = "_ZN5kldiv4cuda9sum_partsIfEEvPKT_ldPS2_"
USAGE = """
arch = {}
Resource usage:
 Common:
  GLOBAL:0
 Function {}:
  REG:{} STACK:0 SHARED:{} LOCAL:0 CONSTANT[0]:928 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = f"""
	code for sm_90
		Function : {FORWARD_KL}
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
"""
PTX = "\nFatbin ptx code:\n================\narch = sm_90\ncode version = [9,0]\n"
# One instruction after the other; a branch names its target's index. Loops over a row: phase 1, a shuffle, phases 2,
# 2+3 and 3, one side alone, reads alone; a loop over rows around them; then code moved out of phase 1.
ROW = """
LDC R1, c[0x0][0x28]; LDG.E.128 R4, desc[UR6][R2.64]; LDG.E.128 R8, desc[UR6][R2.64+0x10]; @P1 BRA 32; MUFU.EX2 R4, R4;
@!P0 BRA 1; SHFL.DOWN PT, R6, R5, 0x1, 0x1f; @P0 BRA 6;
LDG.E.128 R4, [R2]; LDG.E.128 R8, [R2]; MUFU.EX2 R4, R4; @!P0 BRA 8;
LDG.E.EF.128 R4, [R2]; LDG.E.EF.128 R8, [R2]; MUFU.EX2 R4, R4; STG.E.EF.128 [R2], R4; @!UP0 BRA 12;
LDG.E.EF.128 R4, [R2]; LDG.E.EF.128 R8, [R2]; MUFU.EX2 R4, R4; STG.E.EF.128 [R2], R4; @P2 STG.E.EF.128 [R4], R4;
@!P0 BRA 17; LDG.E.128 R4, [R2]; STG.E.U16 [R2], R4; @!P0 BRA 23;
LDG.E.EF.128 R4, [R2]; LDG.E.EF.128 R8, [R2]; STS.128 [R1], R4; @!P0 BRA 26; @P3 BRA 0; EXIT;
STL [R1], R4; LDGSTS.E.BYPASS.128 [R4], [R2]; LDS.128 R4, [R4]; BRA 4; BRA 36"""


def dump(program: str) -> str:
    """The text of a kernel with this program. cuobjdump prints every instruction's encoding as well."""
    lines = [line.strip() for line in program.split(";")]
    lines = [re.sub(r"(BRA .*?)(\d+)$", lambda m: f"{m[1]}{16 * int(m[2]):#x}", line) for line in lines]
    sass = [f"        /*{16 * i:04x}*/  {line} ;  /* 0x00017b82 */\n /* 0x0fe2 */\n" for i, line in enumerate(lines)]
    return USAGE.format("sm_90", FORWARD_KL, 96, 2560) + CODE + "".join(sass)


def instructions(program: str) -> list[resources.Instruction]:
    found: list[resources.Instruction] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "describe", lambda _record, code: found.extend(code) or {})
        resources.parse(dump(program).splitlines(keepends=True))
    return found


def test_names() -> None:
    assert resources.name_of("main") == ("main", [])
    assert resources.name_of("_ZN5kldiv4cuda5plainEPKfl") == ("plain", [])
    assert resources.name_of(FORWARD_KL) == ("distil_rows", ["DenseSide<BFloat16>", "ForwardKL"])
    nested = "_ZN5kldiv4cuda36_GLOBAL__N__ecf14d0d_4_a_cu_728f41e24rowsILb1ENS0_9ExchangedINS0_9ForwardKLEEEEEvi"
    assert resources.name_of(nested) == ("rows", ["true", "Exchanged<ForwardKL>"])


def test_kernels_of_an_object() -> None:
    """Loops of a shuffle, of one side, of reads alone, over rows, or closed by code moved away are not hot."""
    text = dump(ROW) + USAGE.format("sm_80", SUM_PARTS, 14, 256) + PTX
    row, total = resources.parse(text.splitlines(keepends=True))
    usage = {"architecture": "sm_80", "registers": 14, "stack": 0, "local": 0, "shared": 256}
    assert total == {**usage, "kernel": "sum_parts", "arguments": ["float"]}
    assert resources.dense_dtype(total) is None and resources.dense_dtype(row) == "bfloat16"
    usage = {"architecture": "sm_90", "registers": 96, "stack": 0, "local": 0, "shared": 2560 - 1024}
    assert usage.items() <= row.items()  # from sm_90 on, cuobjdump counts the shared memory that CUDA reserves
    counts = {"loads_16": 11, "copies_16": 1, "stores_16": 3, "shared_loads_16": 1, "spills": 1, "exponentials": 4}
    assert {name: row[name] for name in resources.COUNTED} == counts
    ways = [("1", 5), ("2", 4), ("2+3", 5), ("3", 6)]
    assert row["loops"] == [{"phase": phase, "instructions": n, "pairs": 8} for phase, n in ways]
    # A result file keeps forward_kl and jsd for bfloat16 and float32 logits.
    jsd = {**row, "kernel": resources.RESIDENT, "arguments": ["DenseSide<float>", "JensenShannon"], "loops": []}
    others = [{**row, "arguments": ["DenseSide<double>", "ForwardKL"]}, {**row, "kernel": "stats_of_rows"}, total]
    found = {"architecture": "sm_90", "registers": 96, "stack": 0, "spills": 1}
    phases = {"phase 1": 5 / 8, "phase 2": 4 / 8, "phase 2+3": 5 / 8, "phase 3": 6 / 8}
    streamed = {"kernel": "streamed", "dtype": "bfloat16", "divergence": "forward_kl", **found, **phases}
    resident = {"kernel": "resident", "dtype": "float32", "divergence": "jsd", **found}
    shown = resources.shown([jsd, {**row, "architecture": "sm_100"}, *others, row])
    assert shown == [streamed | {"architecture": "sm_100"}, streamed, resident]


def test_pairs_of_loops() -> None:
    """A loop's pairs are those in shared memory if it reads that: its other loads serve rows that were not copied."""
    loads, rest = 4 * "LDG.E.128 R4, [R2]; ", "MUFU.EX2 R4, R4; @P0 BRA 0"
    for shared, dtype, hot in ((0, "float32", 1), (0, "float64", 1), (2, "float16", 1), (1, "float16", 0)):
        loops = resources.hot_loops(instructions(loads + shared * "LDS.128 R4, [R2]; " + rest), dtype)
        assert len(loops) == hot, (shared, dtype)
    assert resources.hot_loops(instructions(loads + "@P0 BRA 0"), "float64")[0]["pairs"] == 4


def test_shortest_way() -> None:
    """The way leaves out rare code (2 to 4) but nothing needed; 10 to 12 takes half a group at a time."""
    loop = instructions(
        "LDS.128 R4, [R2]; @P0 BRA 5; FADD R1, R1, R1; FADD R1, R1, R1; FADD R1, R1, R1; BRA P1, 9; MUFU.EX2 R4, R4;"
        "MUFU.EX2 R4, R4; BRA 13; FADD R1, R1, R1; MUFU.EX2 R4, R4; MUFU.EX2 R4, R4; @!P0 BRA 10; @!P1 BRA 0"
    )
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


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a cubin"):
        resources.parse(USAGE[USAGE.index("Resource") :].format("main", 14, 256).splitlines())
    tool = tmp_path / "cuobjdump"
    monkeypatch.setattr(resources, "cuobjdump", lambda: str(tool) if tool.exists() else None)
    with pytest.raises(FileNotFoundError, match="cuobjdump is neither"):
        resources.read_usage(tmp_path)
    tool.write_text("#!/bin/sh\necho no such object >&2\nexit 3\n")
    tool.chmod(0o755)
    with pytest.raises(RuntimeError, match="no such object"):
        resources.read_usage(tmp_path)
