"""The kernels compile for every architecture without spills, and the report says so truthfully."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cpp"
sys.path.insert(0, str(ROOT / "tools"))

import gpu_static  # noqa: E402


@pytest.fixture(scope="module")
def nvcc():
    found = gpu_static.find_nvcc()
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


def report(tmp_path, *arguments):
    output = tmp_path / "report.json"
    command = [sys.executable, ROOT / "tools" / "gpu_static.py", "--json", output, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    kernels = json.loads(output.read_text()) if output.exists() else None
    return done, kernels


def test_kernels_compile_without_spills(nvcc, tmp_path):
    done, kernels = report(tmp_path, "-I", HERE, HERE / "emulator_kernels.cu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {k["architecture"] for k in kernels} == set(gpu_static.ARCHITECTURES)
    assert all(k["spill_stores"] == k["spill_loads"] == k["stack"] == 0 for k in kernels)
    assert all(k["threads"] is not None for k in kernels)
    gemms = [k for k in kernels if k["name"].startswith("gemm_kernel<")]
    assert {k["name"] for k in gemms} == {"gemm_kernel<BFloat16>", "gemm_kernel<Half>"}
    for kernel in gemms:
        assert kernel["threads"] == 128 and kernel["static_shared"] == 19456
        assert kernel["blocks_per_sm"] >= 2
        if kernel["instructions"] is None:
            pytest.skip("cuobjdump is not installed: no instruction counts")
        # Two k steps of a 32 x 32 warp tile: 2 x 4 products, and 2 + 2 fragment loads.
        assert kernel["instructions"]["HMMA"] == 16
        assert kernel["instructions"]["LDSM"] == 8
        assert kernel["instructions"]["LDGSTS"] >= 4
    copy = next(k for k in kernels if k["name"] == "copy_vectors_kernel")
    assert copy["instructions"]["LDG.128"] == copy["instructions"]["STG.128"] == 1


def test_launchers_compile(nvcc, tmp_path):
    command = [nvcc, "-std=c++20", "-c", f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-Xcompiler=-Wall"]
    command += ["-gencode", "arch=compute_80,code=sm_80", str(HERE / "emulator_kernels.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


def test_local_memory_fails(nvcc, tmp_path):
    source = tmp_path / "local.cu"
    source.write_text(
        '#include "portable/device.h"\n'
        "PVF_KERNEL PVF_LAUNCH_BOUNDS(32, 1) lookup_kernel(const int* x, int* out) {\n"
        "    int table[64];\n"
        "    for (int i = 0; i < 64; ++i) table[x[i] & 63] = i;\n"
        "    out[0] = table[x[64] & 63] + table[x[65] & 63];\n"
        "}\n"
    )
    done, _ = report(tmp_path, "--arch", "90", source)
    assert done.returncode == 1
    assert "FAILED: lookup_kernel on sm_90" in done.stdout


def test_compile_error_is_shown(nvcc, tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("this is not C++\n")
    done, _ = report(tmp_path, "--arch", "80", source)
    assert done.returncode != 0
    assert "broken.cu" in done.stderr


def test_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(gpu_static, "find_nvcc", lambda: None)
    assert gpu_static.main([]) == 0
    assert "nvcc not found" in capsys.readouterr().out


def test_shorten():
    assert (
        gpu_static.shorten("void a::(anonymous namespace)::k<a::Half, 4>(a::P<(int)3>, float*)")
        == "k<Half, 4>"
    )
    assert gpu_static.shorten("a::b::plain_kernel(float const*)") == "plain_kernel"


def test_occupancy_against_cuda_header(nvcc, cxx, tmp_path):
    homes = [
        os.environ.get("CUDA_HOME", ""),
        "/usr/local/cuda",
        str(Path(nvcc).resolve().parents[1]),
    ]
    folders = [Path(home, "include") for home in homes if home]
    include = next((f for f in folders if (f / "cuda_occupancy.h").exists()), None)
    if include is None:
        pytest.skip("cuda_occupancy.h is not installed")
    generator = random.Random(0)
    cases = [
        (
            generator.choice(gpu_static.ARCHITECTURES),
            generator.randint(16, 255),
            generator.randint(1, 32) * 32,
            generator.randint(0, 48 * 1024),
        )
        for _ in range(300)
    ]
    cases = [case for case in cases if case[1] * case[2] <= 65536 * 0.9]
    source = tmp_path / "occupancy.cpp"
    source.write_text(
        "#include <cstddef>\n#include <cstdio>\n"
        "#include <cuda_occupancy.h>\n"
        "int main() {\n"
        "    int arch, registers, threads, shared;\n"
        '    while (std::scanf("%d %d %d %d", &arch, &registers, &threads, &shared) == 4) {\n'
        "        cudaOccDeviceProp p;\n"
        "        p.computeMajor = arch / 10; p.computeMinor = arch % 10;\n"
        "        p.maxThreadsPerBlock = 1024; p.maxThreadsPerMultiprocessor = 2048;\n"
        "        p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.warpSize = 32;\n"
        "        p.sharedMemPerBlock = 49152;\n"
        "        p.sharedMemPerMultiprocessor = arch == 80 ? 167936 : 233472;\n"
        "        p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024;\n"
        "        p.reservedSharedMemPerBlock = 1024; p.numSms = 1;\n"
        "        cudaOccFuncAttributes a;\n"
        "        a.maxThreadsPerBlock = 1024; a.numRegs = registers; a.sharedSizeBytes = shared;\n"
        "        cudaOccDeviceState s; s.carveoutConfig = 100;\n"
        "        cudaOccResult r;\n"
        "        if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, 0) != 0)\n"
        "            return 1;\n"
        '        std::printf("%d\\n", r.activeBlocksPerMultiprocessor);\n'
        "    }\n"
        "}\n"
    )
    program = tmp_path / "occupancy"
    subprocess.run([cxx, "-std=c++17", "-w", f"-I{include}", str(source), "-o", str(program)], check=True)
    text = "\n".join(" ".join(map(str, case)) for case in cases)
    done = subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True)
    expected = [int(line) for line in done.stdout.split()]
    assert len(expected) == len(cases)
    assert [gpu_static.blocks_per_sm(*case) for case in cases] == expected
