"""What benchmarks.report makes of benchmarks.resources' run: a table of the kernels used most, a sentence on all."""

from typing import Any

from benchmarks.resources import DEVICES, RESIDENT, STREAMED, dense_dtype

Record = dict[str, Any]
Run = dict[str, Any]

FILE = "cuda-resources.json"
SHOWN = "sm_90"
KERNELS = {STREAMED: "streamed", RESIDENT: "resident"}
DIVERGENCES = {"ForwardKL": "forward_kl", "JensenShannon": "jsd"}  # the structs of csrc/divergences.h
NAMES = {False: "float", True: "double"}
COLUMNS = (
    "rows",
    "dtype",
    "variant",
    "registers",
    "static shared memory",
    "loads",
    "copies",
    "stores",
    "from shared memory",
    "spills",
    "phase 1",
    "phase 2",
    "phase 3",
    "phases 2 and 3 in one",
    "loss alone",
    "blocks x threads",
    "occupancy",
)


def markdown(run: Run) -> str:
    """For a document: the table and all that has to be said with it."""
    device = next(device.name for device in DEVICES if device.architecture == SHOWN)
    caption = (
        f"{SHOWN}. Loads and stores of global memory, asynchronous copies from there and loads from shared memory are "
        "instructions that move 16 bytes each. A phase's number is that of the instructions per pair of logits on the "
        "shortest way through its loop: without rare cases, labels, and sums and gradients not asked for. Blocks are "
        f"those that a multiprocessor of an {device} holds of the divergence that takes the most registers, for "
        f"{vocabularies(run)} columns."
    )
    return f"{table(run, SHOWN)}\n\n{caption}\n\n{summary(run)}"


def table(run: Run, architecture: str) -> str:
    """One line for each kernel kind, of two dtypes and two divergences."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for kernel in KERNELS:
        for dtype in ("bfloat16", "float32"):
            for struct, divergence in DIVERGENCES.items():
                for record in run["kernels"]:
                    if (record["architecture"], record["kernel"]) != (architecture, kernel):
                        continue
                    if dense_dtype(record) == dtype and struct in record["arguments"] and record["loops"]:
                        shape = launched(run["occupancy"], architecture, kernel, dtype)
                        labels = [KERNELS[kernel], dtype, f"`{divergence}`"]
                        lines.append([*labels, *numbers(record), *shape])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def numbers(record: Record) -> list[str]:
    per_pair = {x["phase"]: f"{x['instructions'] / x['pairs']:.0f}" for x in record["loops"] if x["instructions"]}
    counted = ("registers", "shared", "loads_16", "copies_16", "stores_16", "shared_loads_16", "spills")
    return [
        *(str(record[name]) for name in counted),
        *(per_pair.get(phase, "-") for phase in ("1", "2", "3", "2+3", "1 alone")),
    ]


def launched(occupancy: list[Record], architecture: str, kernel: str, dtype: str) -> list[str]:
    """Over the vocabularies, each shape once: "2 x 256, 1 x 512" and "25%"."""
    those = [r for r in occupancy if (r["architecture"], r["kernel"], r["dtype"]) == (architecture, kernel, dtype)]
    shapes = dict.fromkeys(f"{r['blocks']} x {r['threads']}" for r in those)
    shares = dict.fromkeys(f"{r['occupancy']:.0%}" for r in those)
    return [", ".join(shapes) or "-", ", ".join(shares) or "-"]


def vocabularies(run: Run) -> str:
    *most, last = sorted({record["vocab"] for record in run["occupancy"]})
    return f"{', '.join(map(str, most))} and {last}"


def summary(run: Run) -> str:
    """All kernels of all architectures."""
    kernels = run["kernels"]
    registers: dict[bool, int] = {}
    for record in kernels:
        wide = any(name == "double" or "<double>" in name for name in record["arguments"])
        registers[wide] = max(registers.get(wide, 0), record["registers"])
    spilled = sum(any(record[name] for name in ("stack", "local", "spills")) for record in kernels)
    most = " and ".join(f"{registers[wide]} where they compute in {NAMES[wide]}" for wide in sorted(registers))
    return (
        f"All {len(kernels)} kernels for {', '.join(run['architectures'])}: registers at most {most}; with spills or "
        f"a stack: {spilled or 'none'}. "
        f"CUDA {run['nvcc'] or 'unknown'}; {run['date'][:10]}, commit {(run['commit'] or 'unknown')[:12]}; "
        f"`{run['command']}`."
    )
