"""The CUDA sources, as far as this machine can hold them to account.

The generator compiles as plain C++ and is compared with sfrt/noise.py; the kernels are compiled for every architecture
and must not spill; the C function refuses what is impossible before any device is touched; a GPU runs it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from ctypes import POINTER, c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfrt.noise import chunk_noise, philox

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
INVALID_ARGUMENT = -1

HOST_SOURCE = """
#include "philox.cuh"
extern "C" void host_words(const uint32_t *counter, uint64_t seed, uint32_t *out) {
  const sfrt::Words words = sfrt::philox({{counter[0], counter[1], counter[2], counter[3]}}, seed);
  for (int i = 0; i < 4; ++i) out[i] = words.w[i];
}
extern "C" void host_normals(uint64_t seed, uint32_t frame, uint32_t step, int64_t groups, float *out) {
  for (int64_t g = 0; g < groups; ++g) {
    const sfrt::Normals value = sfrt::normals(seed, static_cast<uint32_t>(g), frame, step);
    for (int i = 0; i < 4; ++i) out[4 * g + i] = value.n[i];
  }
}
"""


def architectures() -> list[str]:
    """The compute capabilities that CMakeLists.txt builds for."""
    found = re.search(r'set\(SFRT_CUDA_ARCHITECTURES "([^"]+)"', (ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert found is not None
    return [entry.removesuffix("-real") for entry in found[1].split(";")]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        pytest.skip("no CUDA compiler (nvcc) on this machine")
    return nvcc


def compile_with(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """philox.cuh as the host's C++ compiler sees it."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST_SOURCE)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
    compile_with([compiler, *flags, str(folder / "host.cpp"), "-o", str(folder / "host.so")])
    library = ctypes.CDLL(str(folder / "host.so"))
    library.host_words.argtypes = [POINTER(c_uint32), c_uint64, POINTER(c_uint32)]
    library.host_words.restype = None
    library.host_normals.argtypes = [c_uint64, c_uint32, c_uint32, c_int64, c_void_p]
    library.host_normals.restype = None
    return library


def host_words(host: ctypes.CDLL, counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    out = (c_uint32 * 4)()
    host.host_words((c_uint32 * 4)(*counter), seed, out)
    return tuple(out)


def python_words(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    return tuple(int(word) for word in philox((c0, c1, c2, c3), seed))


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [  # the known answers published with Random123
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(host: ctypes.CDLL, counter: tuple[int, ...], seed: int, expected: tuple[int, ...]) -> None:
    assert host_words(host, counter, seed) == expected
    assert python_words(counter, seed) == expected


@given(counter=st.tuples(*[st.integers(0, 2**32 - 1)] * 4), seed=st.integers(0, 2**64 - 1))
def test_words_match_python(host: ctypes.CDLL, counter: tuple[int, ...], seed: int) -> None:
    assert host_words(host, counter, seed) == python_words(counter, seed)


@pytest.mark.parametrize(
    ("seed", "frames", "step", "tokens", "token_dim"),
    [(0, range(3), 0, 64, 64), (2**64 - 1, range(700, 702), 3, 7, 9), (12345678901, range(2**20, 2**20 + 1), 1, 5, 5)],
)
def test_normals_match_python(
    host: ctypes.CDLL, seed: int, frames: range, step: int, tokens: int, token_dim: int
) -> None:
    steps = range(step, step + 1)
    expected = chunk_noise(seed, frames, steps, tokens, token_dim, torch.device("cpu")).view(len(frames), -1)
    elements = tokens * token_dim
    for row, frame in zip(expected, frames, strict=True):
        out = torch.empty(-(-elements // 4) * 4)
        host.host_normals(seed, frame, step, out.numel() // 4, out.data_ptr())
        torch.testing.assert_close(out[:elements], row, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", architectures())
@pytest.mark.parametrize("kernel", sorted(path.name for path in CSRC.glob("*.cu")))
def test_kernels_compile_without_spills(kernel: str, architecture: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    log = compile_with([find_nvcc(), *flags, str(CSRC / kernel), "-o", str(tmp_path / "kernel.cubin")])
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", log)]
    assert len(spills) >= 2, f"ptxas reported no kernel:\n{log}"
    assert set(spills) == {0}, log


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a shared library, for the GPU of this machine or, without one, for the oldest architecture."""
    architecture = architectures()[0]
    if torch.cuda.is_available():
        architecture = "".join(map(str, torch.cuda.get_device_capability()))
    path = tmp_path_factory.mktemp("library") / "libsfrt_kernels.so"
    sources = [str(source) for source in sorted(CSRC.glob("*.cu"))]
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{architecture}"]
    compile_with([find_nvcc(), *flags, *sources, "-o", str(path)])
    opened = ctypes.CDLL(str(path))
    opened.sfrt_noise.argtypes = [c_void_p, c_uint64, *[c_int64] * 5, c_void_p]
    opened.sfrt_noise.restype = c_int
    opened.sfrt_error_string.argtypes = [c_int]
    opened.sfrt_error_string.restype = c_char_p
    return opened


GOOD = {"out": 4096, "seed": 0, "first_frame": 0, "frames": 3, "first_step": 0, "steps": 4, "elements": 64}


@pytest.mark.parametrize(
    "wrong",
    [
        {"out": 0},
        {"out": 4098},
        {"first_frame": -1},
        {"first_frame": 2**32 - 2},
        {"frames": -1},
        {"frames": 65536},
        {"first_step": -1},
        {"first_step": 2**63 - 1},
        {"steps": -1},
        {"steps": 65536},
        {"elements": -4},
        {"elements": 2**34 + 1},
    ],
    ids=str,
)
def test_noise_refuses_bad_arguments(library: ctypes.CDLL, wrong: dict[str, int]) -> None:
    status = library.sfrt_noise(*{**GOOD, **wrong}.values(), None)
    assert status == INVALID_ARGUMENT
    assert library.sfrt_error_string(status) == b"invalid argument"


@pytest.mark.parametrize("empty", ["frames", "steps", "elements"])
def test_noise_of_nothing_is_nothing(library: ctypes.CDLL, empty: str) -> None:
    assert library.sfrt_noise(*{**GOOD, "out": 0, empty: 0}.values(), None) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_noise_without_a_gpu_is_cudas_error(library: ctypes.CDLL) -> None:
    status = library.sfrt_noise(*GOOD.values(), None)
    assert status > 0
    assert library.sfrt_error_string(status) != b"no error"


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "token_dim"), [(64, 64), (7, 9)])
def test_noise_on_the_gpu(library: ctypes.CDLL, tokens: int, token_dim: int) -> None:
    frames, steps, seed = range(5, 8), range(1, 3), 2**63 + 11
    out = torch.empty(len(steps), len(frames) * tokens, token_dim, device="cuda")
    numbers = (seed, frames.start, len(frames), steps.start, len(steps), tokens * token_dim)
    status = library.sfrt_noise(out.data_ptr(), *numbers, torch.cuda.current_stream().cuda_stream)
    assert status == 0, library.sfrt_error_string(status)
    expected = chunk_noise(seed, frames, steps, tokens, token_dim, torch.device("cpu"))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)
