"""What the compiled CUDA kernels take and do, read from the object: `python -m benchmarks.resources [OBJECT]`.

No GPU is needed. cuobjdump tells registers, stack, local and shared memory, and disassembles; the occupancy follows
from the launch shapes of csrc/cuda/shapes.h and from what a device has.

A row kernel has three hot loops, one for each phase of a row; of the divergences whose gradient needs no sum first
there is another, for phases 2 and 3 in one, and of those whose loss phase 1 can give another one of it. Instructions
per pair of logits are those of the shortest way through such a loop on which a group of pairs is read, has its
exponentials computed and, where the loop stores, is stored: without what is rare, what a cross entropy adds, sums that
only gradients need, and a second gradient. Where every way takes half a group at a time in a loop within it, none is
told. What a row takes once, such as the exchange between its threads, is not in them.
"""

import argparse
import ctypes
import heapq
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
OBJECT = "_C_cuda.abi3.so"

STREAMED, RESIDENT = "distil_rows", "distil_resident_rows"
ROW_KERNELS = (STREAMED, RESIDENT, "stats_of_rows")
DTYPES = {"BFloat16": "bfloat16", "Float16": "float16", "float": "float32", "double": "float64"}  # as kernels name them
SCALAR_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)  # Llama 2, GPT 2, Llama 3, Qwen 2.5, Gemma 3

Record = dict[str, Any]


# ---------------------------------------------------------------- from the object to text


def cuobjdump() -> str | None:
    """Of the CUDA toolkit, or the one that torch's Triton brings."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (triton and triton.submodule_search_locations) or []]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))


def dump(path: Path, *options: str) -> Iterator[str]:
    """What cuobjdump says of an object, by lines: hundreds of megabytes in all."""
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither on the PATH nor in torch's Triton")
    with tempfile.TemporaryFile("w+") as errors:
        command = [tool, *options, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            yield from process.stdout
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{tool}: {errors.read().strip()}")


def read_usage(path: Path) -> list[Record]:
    """Every kernel without its code: a matter of a second."""
    return parse(dump(path, "--dump-resource-usage"))


def read(path: Path) -> list[Record]:
    """Every kernel with its code: ten seconds or more for each architecture, most of them cuobjdump's."""
    return parse(dump(path, "--dump-resource-usage", "--dump-sass"))


# ---------------------------------------------------------------- from text to records


class Instruction(NamedTuple):
    address: int
    opcode: str  # with what is set of it: LDG.E.EF.128
    target: int | None  # of a branch
    conditional: bool  # whether a branch may not be taken


ARCHITECTURE = re.compile(r"\s*(?:arch = |code for )(sm_\w+)$")
USAGE_OF = re.compile(r"\s*Function (\w+):$")
USAGE = re.compile(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
CODE_OF = re.compile(r"\s*Function : (\w+)$")
# /*0a30*/   @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;   /* the first half of its 16 bytes */
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")


def parse(lines: Iterable[str]) -> list[Record]:
    """The kernels of cuobjdump's text, with their code where that is in it."""
    architecture = symbol = ""
    records: dict[tuple[str, str], Record] = {}  # of equal kernels in several files, the last
    code: list[Instruction] = []
    codes: dict[tuple[str, str], list[Instruction]] = {}
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
            describe_all(records, codes)  # all but the one that begins: code takes much memory
            code = codes[architecture, found[1]] = []
    describe_all(records, codes)
    return list(records.values())


def describe_all(records: dict[tuple[str, str], Record], codes: dict[tuple[str, str], list[Instruction]]) -> None:
    for key in list(codes):
        records[key].update(describe(records[key], codes.pop(key)))


def usage(architecture: str, symbol: str, registers: int, stack: int, shared: int, local: int) -> Record:
    if not architecture:
        raise ValueError("no architecture is named before the first kernel: a cubin, where an object is expected")
    kernel, arguments = name_of(symbol)
    return {
        "architecture": architecture,
        "kernel": kernel,
        "arguments": arguments,
        "symbol": symbol,
        "registers": registers,
        "stack": stack,
        "local": local,
        # From sm_90 on it is told with what CUDA takes itself.
        "shared": shared - RESERVED_SHARED * (number(architecture) >= 90 and shared > 0),
    }


def number(architecture: str) -> int:
    """90 for sm_90 and sm_90a."""
    return int(re.sub(r"\D", "", architecture))


def demangled(symbol: str) -> str:
    """By the C++ library that torch has loaded anyway."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p  # never freed: a few kilobytes
    text: bytes | None = library.__cxa_demangle(symbol.encode(), None, None, None)
    return text.decode() if text else symbol


def name_of(symbol: str) -> tuple[str, list[str]]:
    """The kernel's name and its template arguments, without namespaces: ("distil_rows", ["DenseSide<float>", …])."""
    text = demangled(symbol).replace("(anonymous namespace)::", "").removeprefix("void ")
    text = re.sub(r"\b(?:\w+::)+", "", text)
    name = re.match(r"\w+", text)
    assert name, symbol
    arguments, depth = [""], 0
    for c in text[name.end() :]:
        depth += (c == "<") - (c == ">")
        if depth == 0:
            break
        if c == "," and depth == 1:
            arguments.append("")
        elif depth > 1 or c != "<":
            arguments[-1] += c
    return name[0], [a.strip().replace(" >", ">") for a in arguments if a.strip()]


def dense_dtype(record: Record) -> str | None:
    """Of a row kernel for logits that lie side by side as they are."""
    side = re.fullmatch(r"DenseSide<(\w+)>", record["arguments"][0]) if record["arguments"] else None
    return DTYPES.get(side[1]) if side and record["kernel"] in ROW_KERNELS else None


def kind(opcode: str) -> str:
    """Of the instructions that are counted."""
    name, *modifiers = opcode.split(".")
    wide = {"LDG": "loads_16", "LDGSTS": "copies_16", "STG": "stores_16", "LDS": "shared_loads_16"}
    if "128" in modifiers and name in wide:
        return wide[name]
    if name == "MUFU" and "EX2" in modifiers:
        return "exponentials"
    return "spills" if name in ("LDL", "STL") else ""


COUNTED = ("loads_16", "copies_16", "stores_16", "shared_loads_16", "spills", "exponentials")


def describe(record: Record, code: list[Instruction]) -> Record:
    """What is counted in the code of a kernel."""
    counts = Counter(kind(instruction.opcode) for instruction in code)
    dtype = dense_dtype(record)
    return {
        "instructions": len(code),
        **{name: counts[name] for name in COUNTED},
        **({"loops": hot_loops(code, dtype)} if dtype else {}),
    }


def hot_loops(code: list[Instruction], dtype: str) -> list[Record]:
    """The innermost loops that read a group of both sides in steps of 16 bytes and compute with it, in the order of
    addresses."""
    group = 4 if dtype == "float64" else 8  # pairs; groups.h's kGroup
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = {(index[c.target], i) for i, c in enumerate(code) if c.target in index and c.target < c.address}
    found: list[tuple[int, int, Counter[str]]] = []
    for begin, end in sorted(spans, key=lambda span: span[1] - span[0]):
        # Code that was moved out of a loop and branches back into it spans others.
        if any(begin <= other_end and other_begin <= end for other_begin, other_end, _ in found):
            continue
        counts = Counter(kind(instruction.opcode) for instruction in code[begin : end + 1])
        # Without exponentials, which double has none of, a row is only brought to shared memory.
        if pairs_of(counts, dtype) >= group and (dtype == "float64" or counts["exponentials"]):
            found.append((begin, end, counts))
    found.sort(key=lambda f: f[0])
    loops = []
    for (begin, end, counts), phase in zip(found, phases([counts["stores_16"] for *_, counts in found]), strict=True):
        reads = "shared_loads_16" if counts["shared_loads_16"] else "loads_16"
        needed = {reads: 2 * group * SCALAR_BYTES[dtype] // 16, "exponentials": 2 * group, "stores_16": 1}
        needed = {name: min(count, counts[name]) for name, count in needed.items()}
        loop = code[begin : end + 1]
        # A loop within phase 1 is what a new base repeats; within others it takes half a group at a time.
        shortest = shortest_way(loop, needed, set() if phase.startswith("1") else loops_within(loop))
        loops.append({"phase": phase, "instructions": shortest, "pairs": group, "size": len(loop)})
    return loops


def pairs_of(counts: Counter[str], dtype: str) -> int:
    """How many logits of each side a loop reads: from shared memory where it reads that."""
    return 16 * (counts["shared_loads_16"] or counts["loads_16"]) // (2 * SCALAR_BYTES[dtype])


def loops_within(loop: list[Instruction]) -> set[int]:
    """The places of the instructions that are in a loop within a loop."""
    index = {instruction.address: i for i, instruction in enumerate(loop)}
    spans = [range(index[c.target], i + 1) for i, c in enumerate(loop[:-1]) if c.target in index]
    return {i for span in spans for i in span}


def shortest_way(loop: list[Instruction], needed: dict[str, int], no_way: set[int]) -> int | None:
    """The fewest instructions from the first to the last with as many as needed of each kind; None if there is none."""
    index = {instruction.address: i for i, instruction in enumerate(loop)}
    kinds = [kind(instruction.opcode) for instruction in loop]
    ends = {i for i, c in enumerate(loop) if c.opcode.startswith("BRA")} | {len(loop) - 1}
    ends |= {index[c.target] - 1 for c in loop if c.target in index}
    last_of = {}  # a block's last instruction, by its first
    begin = 0
    for end in sorted(ends - {-1}):
        last_of[begin] = end
        begin = end + 1
    missing = tuple(needed.values())
    queue: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, missing)]
    seen = set()
    while queue:
        length, begin, missing = heapq.heappop(queue)
        if (begin, missing) in seen or begin in no_way:
            continue
        seen.add((begin, missing))
        end = last_of[begin]
        counts = Counter(kinds[begin : end + 1])
        missing = tuple(max(m - counts[name], 0) for name, m in zip(needed, missing, strict=True))
        length += end - begin + 1
        if end == len(loop) - 1:
            if not any(missing):
                return length
            continue
        branch = loop[end]
        follows = [] if branch.opcode == "BRA" and not branch.conditional else [end + 1]
        if branch.target in index:
            follows.append(index[branch.target])
        for follow in follows:
            heapq.heappush(queue, (length, follow, missing))
    return None


def phases(stores: list[int]) -> list[str]:
    """By what each loop stores. Those that store nothing are phases 1 and 2, or the loss from phase 1 alone before
    them; what stores the most is phase 3, gradients of both sides."""
    most = max(stores, default=0)
    without = ["1", "2"] if stores.count(0) < 3 else ["1 alone", "1", "2"]
    return [("3" if n == most else "2+3") if n else without.pop(0) if without else "2" for n in stores]


# ---------------------------------------------------------------- occupancy


@dataclass(frozen=True)
class Device:
    """What of a device decides how many blocks a multiprocessor takes: CUDA C++ Programming Guide, "Technical
    Specifications per Compute Capability". Blocks of 128 threads and more never meet the limit on their number."""

    name: str
    architecture: str
    multiprocessors: int
    threads: int  # per multiprocessor, as is all that follows
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
REGISTER_UNIT = 256  # a warp gets whole ones
SHARED_UNIT = 128
RESERVED_SHARED = 1024  # of every block, for CUDA itself
WARP = 32


def up_to(multiple: int, n: int) -> int:
    return -(-n // multiple) * multiple


def blocks_per_multiprocessor(device: Device, threads: int, registers: int, shared: int) -> int:
    """As cudaOccupancyMaxActiveBlocksPerMultiprocessor has it; `shared` is static and dynamic together."""
    warps = -(-threads // WARP)
    by_registers = 4 * (REGISTERS // 4 // up_to(REGISTER_UNIT, registers * WARP)) // warps
    by_shared = device.shared // up_to(SHARED_UNIT, shared + RESERVED_SHARED)
    fits = shared <= device.shared_per_block
    return min(by_registers, by_shared, device.threads // threads) if fits else 0


class Launch(NamedTuple):
    kernel: str
    dtype: str
    vocab: int
    threads: int
    cluster: int
    dynamic_shared: int


def emulated_kernels() -> Any:
    """The library of tests/emulation, in which the launch shapes are those of the very same C++."""
    sys.path.insert(0, str(ROOT / "tests"))
    harness = importlib.import_module("emulation.harness")
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*harness.KERNELS, harness.HERE / "fibers.cpp", harness.HERE / "bindings.cpp"]
    return harness.Kernels(harness.build(folder, sources, "kernels.so", ["-O1", "-fPIC", "-shared"]))


def launches(kernels: Any, device: Device) -> Iterator[Launch]:
    """What a device is given for real vocabularies, wherever a kernel is used at all."""
    import torch

    kernels.set_device(number(device.architecture), device.multiprocessors, device.shared_per_block, device.clusters)
    rows = 4096  # more than fit at a time, as always
    for dtype in ("bfloat16", "float32"):
        for vocab in VOCABULARIES:
            _, threads, *_ = kernels.row_shape(rows, vocab, getattr(torch, dtype))
            yield Launch(STREAMED, dtype, vocab, threads, 1, 0)
            blocks, threads, cluster, shared = kernels.resident_shape(rows, vocab, getattr(torch, dtype))
            if blocks > 0:
                yield Launch(RESIDENT, dtype, vocab, threads, cluster, shared)


def occupancies(records: list[Record], kernels: Any) -> list[Record]:
    """Of every device whose architecture the object holds. Registers are those of the divergence that takes the most.

    Whether all blocks of a cluster find room at the same time is not asked."""
    found = []
    for device in DEVICES:
        for launch in launches(kernels, device):
            those = [
                record
                for record in records
                if (record["architecture"], record["kernel"]) == (device.architecture, launch.kernel)
                and dense_dtype(record) == launch.dtype
            ]
            if not those:
                continue
            registers, static = (max(record[what] for record in those) for what in ("registers", "shared"))
            blocks = blocks_per_multiprocessor(device, launch.threads, registers, static + launch.dynamic_shared)
            found.append(
                {
                    "device": device.name,
                    "architecture": device.architecture,
                    **launch._asdict(),
                    "static_shared": static,
                    "registers": registers,
                    "blocks": blocks,
                    "occupancy": round(blocks * launch.threads / device.threads, 3),
                }
            )
    return found


# ---------------------------------------------------------------- the command


def report(path: Path, nvcc: str | None, command: str) -> Record:
    from benchmarks.provenance import provenance

    os.environ.pop("KLDIV_EXT_CUDA_TIER", None)  # it would change the launch shapes
    records = read(path)
    return {
        **provenance(command, "cpu"),
        "nvcc": nvcc,
        "architectures": list(dict.fromkeys(record["architecture"] for record in records)),
        "occupancy": occupancies(records, emulated_kernels()),
        "kernels": [{name: value for name, value in record.items() if name != "symbol"} for record in records],
    }


def main(argv: list[str]) -> int:
    import kldiv_ext
    from benchmarks import report_resources
    from benchmarks.provenance import dumps
    from kldiv_ext import _build_info

    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("object", type=Path, nargs="?", help=f"default: {OBJECT} of the package")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    args = parser.parse_args(argv)
    path = args.object or Path(kldiv_ext.__file__).parent / OBJECT
    if not path.exists():
        parser.error(f"{path} does not exist: build with a CUDA toolkit")
    nvcc = None if args.object else _build_info.cuda_version
    run = report(path, nvcc, " ".join(["python -m benchmarks.resources", *argv]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(dumps(run, "kernels"))
    for architecture in run["architectures"]:
        print(f"{architecture}:\n\n{report_resources.table(run, architecture)}\n")
    print(report_resources.summary(run))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
