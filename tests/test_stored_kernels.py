"""Kernels compiled into a bundle: which, what is kept, and that a launch takes them without asking the compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sfrt.backends.kernels import kernels_for, kernels_loaded, load_kernels
from sfrt.bundle import Bundle
from sfrt.bundle.kernels import KernelSet, architecture_of, capability_of
from sfrt.bundle.writer import extend
from sfrt.errors import BundleError, ConfigError, DeviceError
from tests.bundles import FULL, MANIFEST, drop, edit_manifest, write
from tests.command_line import Run

KERNELS = KernelSet("sm_90a", "3.6.0", "bfloat16", ("gelu-01", "modulate-02"))

# A process of its own, as the kernels of this one may be interpreted. Its driver is a double of Triton's: a GPU of
# compute capability 9.0 that takes every binary, and notes every launch.
PLAYER = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_launcher
from triton.runtime import driver

loaded, launched, compiled = [], [], []

class Launcher:
    def __init__(self, source, metadata):
        make_launcher(source.constants, source.signature, None)  # the C source that a compiler would be given
        self.name = metadata.name

    def __call__(self, *given):
        launched.append(self.name)

def load_binary(name, code, shared, device):
    assert code[:4] == b"\\x7fELF"
    loaded.append(name)
    return object(), len(loaded), 0, 0, 1024

driver.set_active(SimpleNamespace(
    launcher_cls=Launcher,
    utils=SimpleNamespace(load_binary=load_binary, get_device_properties=lambda device: {"max_shared_mem": 232448}),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
))
torch.cuda.device = lambda device: nullcontext()
import triton.compiler.compiler, triton.compiler

def compile(source, **options):
    compiled.append(source.name)
    raise SystemExit(f"{source.name} is compiled")

triton.compiler.compile = triton.compiler.compiler.compile = compile

from sfrt.backends.kernels import kernels_for, load_kernels
from sfrt.bundle import Bundle
from sfrt.ops.triton_kernels import launch as plans
from sfrt.ops.triton_kernels.stored import restore
from sfrt_export.rehearsal import launches_of

plans._capability_under = lambda arguments: 90
bundle = Bundle.open(sys.argv[1])
kernels = kernels_for(bundle.manifest, 90, "bfloat16")
count = load_kernels(bundle, kernels, torch.device("cuda", 0), verify=True)
launches = launches_of(bundle.manifest)
for launch in launches:
    launch.run()
changed = restore(Path(sys.argv[2])) is None
print(json.dumps({
    "kernels": len(kernels.names), "restored": count, "loaded": len(loaded), "compiled": compiled,
    "launched": sorted(set(launched)), "calls": len(launched), "planned": len(launches), "changed": changed,
}))
"""


def process(*command: object) -> str:
    """What a Python process says in which Triton compiles."""
    surroundings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    surroundings["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=surroundings, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with kernels for one kind of GPU, made by the command line."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("compiled") / "model"
    shutil.copytree(tiny_bundle, folder)
    said = process("-m", "sfrt", "export", folder, "--kernels", "9.0")
    assert "for sm_90a" in said and "kernels in bfloat16" in said and ".cubin" not in said
    return folder


def test_launches_find_what_the_bundle_brings(compiled: Path, tmp_path: Path) -> None:
    """Every launch of its stream, at every fill of the ring, on a GPU that has never compiled anything.

    A kernel that another version of its function was compiled to is left to Triton.
    """
    (kernels,) = Bundle.open(compiled).manifest.kernels
    metadata = json.loads((compiled / f"{kernels.stems[0]}.json").read_bytes())
    (tmp_path / "other.json").write_text(json.dumps({**metadata, "function_hash": "0" * 64}))
    told = json.loads(process("-c", PLAYER, compiled, tmp_path / "other"))
    assert told["changed"]
    assert told["compiled"] == []
    assert told["restored"] == told["loaded"] == told["kernels"] > 10
    assert told["calls"] == told["planned"] > 100
    wanted = {"_rolling_kv", "_attention", "_modulate", "_qk_norm", "_noise", "_denoise", "_finish", "_frames"}
    assert wanted <= set(told["launched"])


def test_nothing_in_it_tells_of_the_machine(compiled: Path) -> None:
    bundle = Bundle.open(compiled)
    for name in (name for kernels in bundle.manifest.kernels for name in kernels.files):
        data = (compiled / name).read_bytes()
        assert not any(os.fsencode(path) in data for path in (Path.home(), sys.prefix, Path(__file__).parent.parent))


def test_files_that_are_no_kernel(tmp_path: Path) -> None:
    from sfrt.ops.triton_kernels.stored import restore

    for name, content in {
        "empty": "",
        "list": "[]",
        "foreign": json.dumps({"specialization": {"name": "os.system"}, "function_hash": ""}),
        "gone": json.dumps({"specialization": {"name": "sfrt.ops.triton_kernels.gone.x"}, "function_hash": ""}),
    }.items():
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises(BundleError, match=rf"{name}\.json describes no kernel \("):
            restore(tmp_path / name)


def test_a_damaged_kernel(compiled: Path, tmp_path: Path) -> None:
    shutil.copytree(compiled, tmp_path / "model")
    (kernels,) = Bundle.open(tmp_path / "model").manifest.kernels
    path = tmp_path / "model" / f"{kernels.stems[0]}.cubin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"\.cubin is damaged"):
        Bundle.open(tmp_path / "model", verify=False).verify(*kernels.files)


@pytest.fixture
def with_kernels(tmp_path: Path) -> Bundle:
    bundle = write(tmp_path / "model", FULL)
    manifest = replace(bundle.manifest, kernels=(KERNELS,))
    return extend(bundle, manifest, {name: name.encode() for name in KERNELS.files})


def test_a_bundle_is_extended(with_kernels: Bundle) -> None:
    bundle = Bundle.open(with_kernels.path)
    assert bundle == with_kernels and bundle.manifest.kernels == (KERNELS,)
    assert (bundle.path / "kernels" / "sm_90a" / "gelu-01.cubin").read_bytes() == b"kernels/sm_90a/gelu-01.cubin"
    fewer = replace(KERNELS, names=("gelu-01",))
    extend(bundle, replace(bundle.manifest, kernels=(fewer,)), {})
    assert Bundle.open(bundle.path).manifest.kernels == (fewer,)
    assert sorted(path.name for path in (bundle.path / "kernels" / "sm_90a").iterdir()) == [
        "gelu-01.cubin",
        "gelu-01.json",
    ]


def test_a_bundle_that_cannot_be_extended(with_kernels: Bundle) -> None:
    more = replace(KERNELS, names=("noise-03",))
    with pytest.raises(BundleError, match=r"would lack \['kernels/sm_90a/noise-03.cubin', "):
        extend(with_kernels, replace(with_kernels.manifest, kernels=(more,)), {})
    (with_kernels.path / "kernels" / "sm_100a").write_text("in the way")
    more = replace(more, architecture="sm_100a")
    with pytest.raises(BundleError, match="cannot be written"):
        extend(with_kernels, replace(with_kernels.manifest, kernels=(KERNELS, more)), dict.fromkeys(more.files, b""))
    assert Bundle.open(with_kernels.path) == with_kernels


def test_which_kernels_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = replace(MANIFEST, kernels=(KERNELS, replace(KERNELS, architecture="sm_100a", triton="3.7.0")))
    monkeypatch.setattr("sfrt.machine.version_of", lambda name: "3.6.0")
    assert kernels_for(manifest, 90, "bfloat16") is KERNELS
    reasons = {
        kernels_for(MANIFEST, 90, "bfloat16"): "the bundle has none; add them with sfrt export BUNDLE --kernels sm_90a",
        kernels_for(manifest, 89, "bfloat16"): "they are for sm_100a, sm_90a, and this GPU is sm_89",
        kernels_for(manifest, 90, "float16"): (
            "they are from Triton 3.6.0 in bfloat16, and this is Triton 3.6.0 in float16"
        ),
        kernels_for(manifest, 100, "bfloat16"): (
            "they are from Triton 3.7.0 in bfloat16, and this is Triton 3.6.0 in bfloat16"
        ),
    }
    assert all(found == expected for found, expected in reasons.items())
    monkeypatch.setattr("sfrt.machine.version_of", lambda name: None)
    assert kernels_for(manifest, 90, "bfloat16") == "Triton is not installed, which launches them"


def test_a_cpu_loads_none(with_kernels: Bundle) -> None:
    """Those here are no kernels, and nobody looks at them."""
    with kernels_loaded(with_kernels, torch.device("cpu"), torch.bfloat16, verify=True):
        pass


def test_a_gpu_that_refuses_them(with_kernels: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def _init_handles(self) -> None:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    monkeypatch.setattr("sfrt.ops.triton_kernels.stored.restore", lambda stem: Refused())
    with pytest.raises(DeviceError, match=r"the kernels of .*model cannot be loaded on cuda:0: out of resource"):
        load_kernels(with_kernels, KERNELS, torch.device("cuda", 0), verify=True)


def test_a_bundle_without_the_files_of_its_kernels(with_kernels: Bundle) -> None:
    (with_kernels.path / KERNELS.files[0]).unlink()
    with pytest.raises(BundleError, match=r"kernels/sm_90a/gelu-01\.json is missing"):
        Bundle.open(with_kernels.path)
    edit_manifest(with_kernels.path, drop("files", KERNELS.files[0]))
    with pytest.raises(BundleError, match="is missing; compile them again with sfrt export BUNDLE --kernels GPUS"):
        Bundle.open(with_kernels.path)


@pytest.mark.parametrize(("text", "capability"), [("sm_90a", 90), ("sm_90", 90), ("9.0", 90), ("12.0", 120)])
def test_kinds_of_gpu(text: str, capability: int) -> None:
    assert capability_of(text) == capability
    assert capability_of(architecture_of(capability)) == capability


@pytest.mark.parametrize("text", ["", "9", "90", "sm90", "h100", "9.0a", "sm_9"])
def test_what_is_no_kind_of_gpu(text: str) -> None:
    with pytest.raises(ConfigError, match="is no kind of GPU; give its architecture, as sm_90a"):
        capability_of(text)


@pytest.mark.parametrize("changes", [{"architecture": "sm_90"}, {"names": ("../x",)}])
def test_a_set_that_makes_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(KERNELS, **changes)


def test_the_command_line_refuses(run: Run, tiny_bundle: Path) -> None:
    """Before anything is compiled: what is no GPU, and an interpreter in the compiler's place."""
    assert "'h100' is no kind of GPU" in run("export", tiny_bundle, "--kernels", "h100").complaint
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert "TRITON_INTERPRET is set" in run("export", tiny_bundle, "--kernels", "9.0").complaint


def test_info_says_what_becomes_of_them(run: Run, with_kernels: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    for version, expected in {"3.6.0": "compiles no kernels here", "3.7.0": "and this is Triton 3.7.0"}.items():
        monkeypatch.setattr("sfrt.machine.version_of", lambda name, version=version: version)
        assert expected in run("info", with_kernels.path).out


GPU_PLAYER = """
import hashlib, sys
from triton import knobs

asked = []
knobs.compilation.listener = lambda **told: asked.append(told["src"].name)

import torch
from sfrt import Runtime

runtime = Runtime(sys.argv[1], device="cuda")
model = runtime.manifest.model
with runtime.session(torch.ones(model.text_len, model.text_dim), limit=5) as session:
    frames = b"".join(chunk.frames.tobytes() for chunk in session)
print(hashlib.sha256(frames).hexdigest(), *asked)
"""


@pytest.mark.gpu
def test_a_gpu_compiles_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    """And shows what it shows with kernels that it compiles by itself."""
    major, minor = torch.cuda.get_device_capability()
    shutil.copytree(tiny_bundle, tmp_path / "model")
    process("-m", "sfrt", "export", tmp_path / "model", "--kernels", f"{major}.{minor}")
    frames, *asked = process("-c", GPU_PLAYER, tmp_path / "model").split()
    assert asked == []
    assert process("-c", GPU_PLAYER, tiny_bundle).split()[0] == frames
