"""What the compiled CUDA kernels use, read from the object without a GPU: registers, spills and instructions.

A row kernel has a hot loop for each phase of a row; some have one for phases 2 and 3 together, or for the loss in phase
1 alone. Instructions per pair of logits are those of the shortest way through a loop that reads a group of pairs and,
where the loop does so, computes exponentials and stores: without rare cases, cross entropies, sums that only gradients
need, second gradients and the work per row.
"""

import argparse
import ctypes
import heapq
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import kldiv_ext
from benchmarks.report import TABLES
from benchmarks.results import Record, dumps, loads, provenance, save
from kldiv_ext import _build_info

OBJECT = "_C_cuda.abi3.so"
STREAMED, RESIDENT = "distil_rows", "distil_resident_rows"
ROW_KERNELS = (STREAMED, RESIDENT, "stats_of_rows")
DTYPES = {"BFloat16": "bfloat16", "Float16": "float16", "float": "float32", "double": "float64"}
SCALAR_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
# In a result file: these divergences (structs of csrc/divergences.h) of these kernels.
SHOWN_DIVERGENCES = {"ForwardKL": "forward_kl", "JensenShannon": "jsd"}
SHOWN_KERNELS = {STREAMED: "streamed", RESIDENT: "resident"}


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one in torch's Triton."""
    triton = importlib.util.find_spec("triton")
    folders = [f"{path}/backends/nvidia/bin" for path in (triton and triton.submodule_search_locations) or []]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *folders]))


def dump(path: Path, *options: str) -> Iterator[str]:
    """cuobjdump's output by lines: hundreds of megabytes in all."""
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither on the PATH nor in torch's Triton")
    command = [tool, *options, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        yield from process.stdout
        message = process.stderr.read().strip()
    if process.returncode != 0:
        raise RuntimeError(f"{tool}: {message}")


def read_usage(path: Path) -> list[Record]:
    """Every kernel without its code: about a second."""
    return parse(dump(path, "--dump-resource-usage"))


def read(path: Path) -> list[Record]:
    """Every kernel with counts of its code: ten seconds or more per architecture, most of them cuobjdump's."""
    return parse(dump(path, "--dump-resource-usage", "--dump-sass"))


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers: LDG.E.EF.128
    target: int | None  # of a branch
    conditional: bool  # whether a branch may not be taken


ARCHITECTURE = re.compile(r"\s*(?:arch = |code for )(sm_\w+)$")
USAGE_OF = re.compile(r"\s*Function (\w+):$")
USAGE = re.compile(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
CODE_OF = re.compile(r"\s*Function : (\w+)$")
# /*0a30*/   @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;   /* the first half of its 16 bytes */
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
RESERVED_SHARED = 1024  # per block, for CUDA itself


def parse(lines: Iterable[str]) -> list[Record]:
    """The kernels in cuobjdump's text, with counts of their code where the text has it."""
    architecture = symbol = ""
    records: dict[tuple[str, str], Record] = {}  # of equal kernels in several files, the last
    record: Record = {}
    code: list[Instruction] = []
    for line in lines:
        if found := INSTRUCTION.match(line):
            branch = found[3].startswith("BRA")
            target = TARGET.search(found[4]) if branch else None
            conditional = branch and (bool(found[2]) or "," in found[4])  # BRA P0, 0x10
            code.append(Instruction(int(found[1], 16), found[3], int(target[1], 16) if target else None, conditional))
        elif found := ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := USAGE_OF.match(line):
            symbol = found[1]
        elif found := USAGE.match(line):
            records[architecture, symbol] = usage(architecture, symbol, *map(int, found.groups()))
        elif found := CODE_OF.match(line):
            record |= describe(record, code) if code else {}
            record, code = records[architecture, found[1]], []
    record |= describe(record, code) if code else {}
    return list(records.values())


def usage(architecture: str, symbol: str, registers: int, stack: int, shared: int, local: int) -> Record:
    if not architecture:
        raise ValueError("no architecture is named before the first kernel: a cubin, where an object is expected")
    names = dict(zip(("kernel", "arguments"), name_of(symbol), strict=True))
    shared -= RESERVED_SHARED * (int(re.sub(r"\D", "", architecture)) >= 90 and shared > 0)  # included from sm_90 on
    usage = {"registers": registers, "stack": stack, "local": local, "shared": shared}
    return {"architecture": architecture, **names, **usage}


def name_of(symbol: str) -> tuple[str, list[str]]:
    """The kernel and its template arguments, without namespaces: ("distil_rows", ["DenseSide<float>", …])."""
    library = ctypes.CDLL("libstdc++.so.6")  # torch has loaded it
    library.__cxa_demangle.restype = ctypes.c_char_p  # never freed: a few kilobytes
    demangled: bytes | None = library.__cxa_demangle(symbol.encode(), None, None, None)
    text = demangled.decode() if demangled else symbol
    text = re.sub(r"\b(?:\w+::)+", "", text.replace("(anonymous namespace)::", "").removeprefix("void "))
    found = re.match(r"(\w+)(?:<(.*?)>)?(?:\(|$)", text.replace(" >", ">"))
    assert found, symbol
    return found[1], found[2].split(", ") if found[2] else []


def dense_dtype(record: Record) -> str | None:
    """The dtype of a row kernel for contiguous logits without a softcap."""
    side = re.fullmatch(r"DenseSide<(\w+)>", record["arguments"][0]) if record["arguments"] else None
    return DTYPES.get(side[1]) if side and record["kernel"] in ROW_KERNELS else None


# Accesses of 16 bytes by opcode: of global memory, asynchronous copies from there, and of shared memory.
WIDE = {"LDG": "loads_16", "LDGSTS": "copies_16", "STG": "stores_16", "LDS": "shared_loads_16"}
COUNTED = (*WIDE.values(), "spills", "exponentials")


def kind(opcode: str) -> str:
    """Which of COUNTED an instruction is, or ""."""
    name, *modifiers = opcode.split(".")
    if name == "MUFU" and "EX2" in modifiers:
        return "exponentials"
    return WIDE.get(name, "") if "128" in modifiers else "spills" if name in ("LDL", "STL") else ""


def describe(record: Record, code: list[Instruction]) -> Record:
    counts, dtype = Counter(kind(c.opcode) for c in code), dense_dtype(record)
    return {name: counts[name] for name in COUNTED} | ({"loops": hot_loops(code, dtype)} if dtype else {})


def hot_loops(code: list[Instruction], dtype: str) -> list[Record]:
    """The innermost loops that read a group of both sides in 16-byte steps and compute with it, by address."""
    group = 4 if dtype == "float64" else 8  # pairs; groups.h's kGroup
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = {(index[c.target], i) for i, c in enumerate(code) if c.target in index and c.target < c.address}
    found: list[tuple[int, int, Counter[str]]] = []
    for begin, end in sorted(spans, key=lambda span: span[1] - span[0]):
        # Code that was moved out of a loop and branches back into it spans others.
        if any(begin <= other_end and other_begin <= end for other_begin, other_end, _ in found):
            continue
        counts = Counter(kind(c.opcode) for c in code[begin : end + 1])
        pairs = 16 * (counts["shared_loads_16"] or counts["loads_16"]) // (2 * SCALAR_BYTES[dtype])
        # A loop without exponentials only copies a row to shared memory; double has none at all.
        if pairs >= group and (dtype == "float64" or counts["exponentials"]):
            found.append((begin, end, counts))
    found.sort(key=lambda span: span[0])
    loops = []
    for (begin, end, counts), phase in zip(found, phases([counts["stores_16"] for *_, counts in found]), strict=True):
        loop = code[begin : end + 1]
        reads = "shared_loads_16" if counts["shared_loads_16"] else "loads_16"
        needed = {reads: 2 * group * SCALAR_BYTES[dtype] // 16, "exponentials": 2 * group, "stores_16": 1}
        needed = {name: min(count, counts[name]) for name, count in needed.items()}
        # An inner loop in phase 1 runs for a new base only; in other phases it takes half a group at a time.
        shortest = shortest_way(loop, needed, set() if phase.startswith("1") else loops_within(loop))
        loops.append({"phase": phase, "instructions": shortest, "pairs": group})
    return loops


def loops_within(loop: list[Instruction]) -> set[int]:
    """The indices of the instructions in inner loops."""
    index = {instruction.address: i for i, instruction in enumerate(loop)}
    spans = [range(index[c.target], i + 1) for i, c in enumerate(loop[:-1]) if c.target in index]
    return {i for span in spans for i in span}


def shortest_way(loop: list[Instruction], needed: dict[str, int], barred: set[int]) -> int | None:
    """The fewest instructions from the first to the last with the needed number of each kind; None if impossible.

    Dijkstra's algorithm over (instruction, kinds still missing).
    """
    index = {instruction.address: i for i, instruction in enumerate(loop)}
    kinds_of = [kind(instruction.opcode) for instruction in loop]
    queue: list[tuple[int, int, tuple[int, ...]]] = [(1, 0, tuple(needed.values()))]
    seen = set()
    while queue:
        length, i, missing = heapq.heappop(queue)
        if (i, missing) in seen or i in barred:
            continue
        seen.add((i, missing))
        c = loop[i]
        missing = tuple(max(m - (kinds_of[i] == name), 0) for name, m in zip(needed, missing, strict=True))
        if i == len(loop) - 1:
            if not any(missing):
                return length
            continue
        ways = [] if c.opcode == "BRA" and not c.conditional else [i + 1]
        ways += [index[c.target]] if c.target in index else []
        for way in ways:
            heapq.heappush(queue, (length + 1, way, missing))
    return None


def phases(stores: list[int]) -> list[str]:
    """By the stores of each loop.

    Loops without any are phases 1 and 2, preceded by the loss from phase 1 alone; the most stores are those of phase 3,
    the gradients of both sides.
    """
    most = max(stores, default=0)
    without = ["1", "2"] if stores.count(0) < 3 else ["1 alone", "1", "2"]
    return [("3" if n == most else "2+3") if n else without.pop(0) if without else "2" for n in stores]


def shown(records: list[Record]) -> list[Record]:
    """What a result file keeps: registers, spills and instructions per pair of the kernels used most."""
    found = []
    for record in records:
        arguments, dtype, kernel = record["arguments"], dense_dtype(record), SHOWN_KERNELS.get(record["kernel"])
        if kernel and dtype in ("bfloat16", "float32") and arguments[-1] in SHOWN_DIVERGENCES:
            names = {"kernel": kernel, "dtype": dtype, "divergence": SHOWN_DIVERGENCES[arguments[-1]]}
            counts = {name: record[name] for name in ("architecture", "registers", "stack", "spills")}
            ways = {f"phase {x['phase']}": x["instructions"] / x["pairs"] for x in record["loops"] if x["instructions"]}
            found.append({**names, **counts, **ways})
    return sorted(found, key=lambda r: (r["architecture"], r["kernel"] == "resident", r["dtype"], r["divergence"]))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("object", type=Path, nargs="?", help=f"default: {OBJECT} of the package")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    path = args.object or Path(kldiv_ext.__file__).parent / OBJECT
    if not path.exists():
        parser.error(f"{path} does not exist: build with a CUDA toolkit")
    head = provenance(" ".join(["python -m benchmarks.resources", *argv]), "cpu")
    report = {**head, "nvcc": None if args.object else _build_info.cuda_version, "kernels": shown(read(path))}
    save(report, args.json)
    print(TABLES["resources"].make(loads(dumps(report))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
