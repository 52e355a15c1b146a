"""Static report on the compiled kernels: registers, spills, occupancy and instruction counts.

Compiles each .cu file for each architecture and needs no GPU. Exits with status 1 if a kernel
spills registers or uses local memory, and with 0 and a message if there is no nvcc.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)

# CUDA C++ Programming Guide, table of technical specifications by compute capability.
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED_SHARED_PER_BLOCK = 1024
THREADS_PER_SM = 2048
BLOCKS_PER_SM = 32
REGISTERS_PER_PARTITION = 16384
PARTITIONS_PER_SM = 4
REGISTER_ALLOCATION_UNIT = 256  # registers, by warp
SHARED_ALLOCATION_UNIT = 128

# Column title and the instructions that it counts.
INSTRUCTIONS = {
    "HMMA": r"HMMA\b",
    "LDGSTS": r"LDGSTS\b",
    "LDSM": r"LDSM\b",
    "LDG.128": r"LDG\b.*\.128\b",
    "STG.128": r"STG\b.*\.128\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
}

EIATTR_MAX_THREADS = 0x05
EIATTR_REQUIRED_THREADS = 0x10
EIFMT_SIZED_VALUE = 0x04


@dataclass
class Kernel:
    file: str
    name: str
    architecture: int
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    static_shared: int = 0
    threads: int | None = None  # the launch bound; None where the kernel has none
    blocks_per_sm: int | None = None
    instructions: dict[str, int] | None = field(default=None)  # None without cuobjdump

    def problems(self) -> list[str]:
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills {self.spill_stores} B out, {self.spill_loads} B in")
        if self.instructions is None:
            if self.stack:
                found.append(f"has a stack frame of {self.stack} B")
        elif self.instructions["LDL"] or self.instructions["STL"]:
            loads, stores = self.instructions["LDL"], self.instructions["STL"]
            found.append(f"uses local memory ({loads} LDL, {stores} STL)")
        return found


def find_nvcc() -> str | None:
    candidates = [os.environ.get("CUDACXX")]
    candidates += [
        str(Path(os.environ[name], "bin", "nvcc"))
        for name in ("CUDA_HOME", "CUDA_PATH")
        if name in os.environ
    ]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def find_cuobjdump(nvcc: str) -> str | None:
    candidates = [Path(nvcc).resolve().parent / "cuobjdump"]
    spec = importlib.util.find_spec("nvidia")
    if spec is not None:
        for folder in spec.submodule_search_locations or []:
            candidates += sorted(Path(folder).glob("cu*/bin/cuobjdump"))
    return next((str(c) for c in candidates if os.access(c, os.X_OK)), shutil.which("cuobjdump"))


def torch_include_flags() -> list[str]:
    spec = importlib.util.find_spec("torch")  # does not import it
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "include"
    return ["-isystem", str(folder), "-isystem", str(folder / "torch/csrc/api/include")]


def blocks_per_sm(architecture: int, registers: int, threads: int, shared: int) -> int:
    """Resident blocks on one multiprocessor, as cudaOccupancyMaxActiveBlocksPerMultiprocessor."""
    warps = -(-threads // 32)
    unit = REGISTER_ALLOCATION_UNIT
    registers_per_warp = -(-max(registers, 1) * 32 // unit) * unit
    warps_by_registers = REGISTERS_PER_PARTITION // registers_per_warp * PARTITIONS_PER_SM
    unit = SHARED_ALLOCATION_UNIT
    shared_per_block = -(-(shared + RESERVED_SHARED_PER_BLOCK) // unit) * unit
    return min(
        BLOCKS_PER_SM,
        THREADS_PER_SM // (warps * 32),
        warps_by_registers // warps,
        SHARED_PER_SM[architecture] // shared_per_block,
    )


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Resource usage by mangled kernel name, from the output of ptxas -v."""
    usage: dict[str, dict[str, int]] = {}
    entry = function = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entry = match[1]
            usage[entry] = {}
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if function in usage:
                stack, stores, loads = map(int, match.groups())
                usage[function].update(stack=stack, spill_stores=stores, spill_loads=loads)
        elif entry is not None and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            usage[entry].update(registers=int(match[1]), static_shared=int(shared[1]) if shared else 0)
    return usage


def launch_bounds(cubin: bytes) -> dict[str, int]:
    """Most threads a block may have, by mangled kernel name, from the .nv.info sections."""
    section_offset = struct.unpack_from("<Q", cubin, 0x28)[0]
    count, names_index = struct.unpack_from("<HH", cubin, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", cubin, section_offset + 64 * i) for i in range(count)]
    names = headers[names_index][4]
    bounds = {}
    for name_offset, _, _, _, offset, size in headers:
        start = names + name_offset
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if not name.startswith(".nv.info."):
            continue
        at = offset
        while at < offset + size:
            kind, attribute, length = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if kind != EIFMT_SIZED_VALUE:  # the value is in the two bytes read as length
                continue
            if attribute in (EIATTR_MAX_THREADS, EIATTR_REQUIRED_THREADS):
                x, y, z = struct.unpack_from("<III", cubin, at)
                bounds[name.removeprefix(".nv.info.")] = x * y * z
            at += length
    return bounds


def count_instructions(sass: str) -> dict[str, dict[str, int]]:
    """Counts by mangled kernel name, from the output of cuobjdump -sass."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in sass.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            current = counts.setdefault(match[1], Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            for title, pattern in INSTRUCTIONS.items():
                current[title] += bool(re.match(pattern, match[1]))
    return {name: {t: c[t] for t in INSTRUCTIONS} for name, c in counts.items()}


def demangle(names: list[str]) -> dict[str, str]:
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return {m: shorten(d) for m, d in zip(names, text.splitlines(), strict=True)}


def shorten(name: str) -> str:
    """Leaves out the return type, the namespaces before the kernel's name and its parameters."""
    name = re.sub(r"\((anonymous namespace|_GLOBAL__N_\w*|unnamed)\)::", "", name)
    depth = 0
    for i in range(len(name) - 1, -1, -1):  # the parameters are the last bracketed group
        depth += (name[i] == ")") - (name[i] == "(")
        if depth == 0:
            name = name[:i] or name
            break
    name = name.removeprefix("void ")
    head, bracket, arguments = name.partition("<")
    arguments = re.sub(r"\b(?:\w+::)+", "", arguments)
    return head.rpartition("::")[2] + bracket + arguments


def examine(
    nvcc: str, cuobjdump: str | None, source: Path, architecture: int, includes: list[str]
) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *includes]
        command += torch_include_flags()
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-Xptxas=-v", "-cubin", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        usage = parse_ptxas(done.stdout + done.stderr)
        bounds = launch_bounds(cubin.read_bytes())
        instructions = None
        if cuobjdump is not None:
            # cuobjdump calls nvdisasm, which is a package of its own.
            path = f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            dump = subprocess.run(
                [cuobjdump, "-sass", str(cubin)],
                capture_output=True,
                text=True,
                env={**os.environ, "PATH": path},
            )
            if dump.returncode != 0:
                raise SystemExit(f"{cuobjdump} -sass {cubin}\n{dump.stdout}{dump.stderr}")
            instructions = count_instructions(dump.stdout)
    names = demangle(list(usage))
    kernels = []
    for mangled, resources in usage.items():
        kernel = Kernel(str(source), names[mangled], architecture, **resources)
        kernel.threads = bounds.get(mangled)
        if kernel.threads is not None:
            kernel.blocks_per_sm = blocks_per_sm(
                architecture, kernel.registers, kernel.threads, kernel.static_shared
            )
        if instructions is not None:
            kernel.instructions = instructions[mangled]
        kernels.append(kernel)
    return sorted(kernels, key=lambda k: k.name)


def table(kernels: list[Kernel]) -> str:
    head = ["kernel", "sm", "regs", "spill", "stack", "shared", "threads", "blocks/SM"]
    head += list(INSTRUCTIONS)
    rows = [head]
    for k in kernels:
        cells = [k.name, k.architecture, k.registers, k.spill_stores + k.spill_loads, k.stack]
        cells += [k.static_shared, k.threads, k.blocks_per_sm]
        cells += [None if k.instructions is None else k.instructions[t] for t in INSTRUCTIONS]
        rows.append(["-" if c is None else str(c) for c in cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: csrc/ops/*/*.cu")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--include", "-I", action="append", default=[], help="include folder")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--jobs", "-j", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)

    nvcc = find_nvcc()
    if nvcc is None:
        print("gpu_static: nvcc not found (CUDACXX, CUDA_HOME, PATH); nothing was checked")
        return 0
    cuobjdump = find_cuobjdump(nvcc)
    files = options.files or sorted(ROOT.glob("csrc/ops/*/*.cu"))
    if not files:
        print("gpu_static: there are no .cu files; nothing was checked")
        return 0
    includes = [f"-I{folder}" for folder in options.include]
    tasks = [(file, arch) for file in files for arch in options.arch or ARCHITECTURES]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda task: examine(nvcc, cuobjdump, *task, includes), tasks)
        kernels = [kernel for result in results for kernel in result]

    for file in files:
        print(f"{file}\n{table([k for k in kernels if k.file == str(file)])}\n")
    print("blocks/SM counts static shared memory only; '-' is a kernel without launch bounds")
    if cuobjdump is None:
        print("cuobjdump not found: no instruction counts, stack frames count as local memory")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    bad = [(k, problem) for k in kernels for problem in k.problems()]
    for kernel, problem in bad:
        print(f"FAILED: {kernel.name} on sm_{kernel.architecture} {problem}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
