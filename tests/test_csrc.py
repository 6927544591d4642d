"""The CUDA sources, as far as this machine can hold them to account.

The generator compiles as plain C++ and is compared with sfrt/noise.py; the kernels are compiled for every architecture
and must not spill; what lies in noise.cu, denoise.cu and frames.cu refuses the impossible before it touches a device.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
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
def test_kernels_compile_without_spills(nvcc: str, kernel: str, architecture: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    log = compile_with([nvcc, *flags, str(CSRC / kernel), "-o", str(tmp_path / "kernel.cubin")])
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", log)]
    assert len(spills) >= 2, f"ptxas reported no kernel:\n{log}"
    assert set(spills) == {0}, log


@pytest.fixture(scope="module")
def library(native_library: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(native_library))
    opened.sfrt_noise.argtypes = [*[c_void_p] * 3, *[c_int64] * 3, c_void_p]
    opened.sfrt_denoise.argtypes = [
        *(c_void_p, c_void_p, c_int, c_float, c_float, c_float, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    ]
    opened.sfrt_finish.argtypes = [c_void_p, c_void_p, c_int, c_float, *[c_int64] * 6, *[c_void_p] * 3]
    opened.sfrt_frames.argtypes = [c_void_p, c_int, *[c_int64] * 8, c_float, c_float, c_void_p, c_void_p]
    opened.sfrt_error_string.argtypes = [c_int]
    opened.sfrt_error_string.restype = c_char_p
    return opened


FLOAT32, BFLOAT16, E4M3 = 0, 1, 3

GOOD: dict[str, dict[str, float]] = {
    "sfrt_noise": {"out": 4096, "seed": 64, "first_frame": 72, "step": 0, "frames": 3, "elements": 64},
    "sfrt_denoise": {
        "x": 4096, "flow": 8192, "dtype": BFLOAT16, "follow": -0.9, "keep": 0.4, "fresh": 0.6, "seed": 64,
        "first_frame": 72, "step": 1, "frames": 3, "elements": 64, "out": 4096, "copy": 8192,
    },
    "sfrt_finish": {
        "x": 4096, "flow": 8192, "dtype": BFLOAT16, "sigma": 0.6, "frames": 3, "rows": 2, "columns": 5, "channels": 16,
        "patch_rows": 2, "patch_columns": 2, "tokens": 8192, "latents": 4096,
    },
    "sfrt_frames": {
        "pixels": 4096, "dtype": BFLOAT16, "frames": 2, "planes": 3, "rows": 4, "width": 8, "frame_stride": 96,
        "plane_stride": 32, "row_stride": 8, "column_stride": 1, "scale": 255.0, "shift": 0.0, "out": 8192,
    },
}  # fmt: skip

COUNTERS: list[dict[str, float]] = [
    {"seed": 0}, {"seed": 68}, {"first_frame": 0}, {"first_frame": 65}, {"step": -1}, {"step": 2**32}, {"frames": -1},
    {"frames": 65536}, {"elements": -4}, {"elements": 2**30 + 1}, {"elements": 2**62},
]  # fmt: skip
DTYPES: list[dict[str, float]] = [{"dtype": -1}, {"dtype": E4M3}]

WRONG: dict[str, list[dict[str, float]]] = {
    "sfrt_noise": [*COUNTERS, {"out": 0}, {"out": 4098}],
    "sfrt_denoise": [
        *COUNTERS, *DTYPES, {"x": 0}, {"x": 4098}, {"out": 0}, {"out": 4097}, {"flow": 8193}, {"copy": 8193},
        {"dtype": FLOAT32, "flow": 8194},
    ],
    "sfrt_finish": [
        *DTYPES, {"x": 0}, {"x": 4098}, {"flow": 0}, {"flow": 8193}, {"tokens": 0}, {"tokens": 8193}, {"latents": 0},
        {"latents": 4098}, {"frames": -1}, {"frames": 65536}, {"rows": 0}, {"rows": 65536}, {"columns": 0},
        {"columns": 2**40}, {"channels": 0}, {"channels": 129}, {"channels": 2**32}, {"patch_rows": 0},
        {"patch_columns": -2}, {"patch_rows": 512, "patch_columns": 512},
    ],
    "sfrt_frames": [
        *DTYPES, {"pixels": 0}, {"pixels": 4097}, {"out": 0}, {"frames": -1}, {"frames": 2**30}, {"planes": 2},
        {"rows": 0}, {"rows": 2**30}, {"width": 0}, {"width": 2**30}, {"frames": 2**29, "rows": 2**29},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrong"),
    [pytest.param(name, wrong, id=f"{name}-{wrong}") for name, cases in WRONG.items() for wrong in cases],
)
def test_bad_arguments_are_refused(library: ctypes.CDLL, name: str, wrong: dict[str, float]) -> None:
    status = getattr(library, name)(*{**GOOD[name], **wrong}.values(), None)
    assert status == INVALID_ARGUMENT
    assert library.sfrt_error_string(status) == b"invalid argument"


@pytest.mark.parametrize("name", GOOD)
def test_no_frames_are_nothing_to_do(library: ctypes.CDLL, name: str) -> None:
    assert getattr(library, name)(*{**GOOD[name], "frames": 0}.values(), None) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("name", "right"),
    [
        *((name, {}) for name in GOOD),
        ("sfrt_noise", {"out": 4100, "elements": 63}),
        ("sfrt_denoise", {"fresh": 0.0, "seed": 0, "first_frame": 0}),
        ("sfrt_denoise", {"flow": 0, "copy": 0, "dtype": FLOAT32}),
        ("sfrt_finish", {"channels": 128}),
        ("sfrt_frames", {"planes": 1, "width": 24, "row_stride": 40}),
        ("sfrt_frames", {"width": 7, "column_stride": 3, "plane_stride": 1}),
    ],
)
def test_good_arguments_reach_the_device(library: ctypes.CDLL, name: str, right: dict[str, float]) -> None:
    status = getattr(library, name)(*{**GOOD[name], **right}.values(), None)
    assert status > 0
    assert library.sfrt_error_string(status) != b"no error"
