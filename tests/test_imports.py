"""Imports go one way, and importing sfrt costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room imports rooms of earlier lines only, and its own files.
LAYERS = (
    {"errors", "machine", "nvml", "user_cache"},
    {"config", "graphs"},
    {
        "ring",
        "timesteps",
        "noise",
        "bundle",
        "weights",
        "device",
        "metrics",
        "capture",
        "video",
        "plot",
        "prompt_cache",
    },
    {"ops"},
    {"cache"},
    {"transformer", "decoders", "text"},
    {"prompts"},
    {"backends", "source", "switching"},
    {"snapshot", "delivery"},
    {"stage"},
    {"context"},
    {"denoising", "chunk"},
    {"session"},
    {"scheduler"},
    {"runtime"},
    {"engine"},
    {"server", "doctor", "benchmark"},
    {"cli"},
    {"__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

NO_TORCH = {
    *("errors", "machine", "nvml", "user_cache", "config", "graphs", "ring", "timesteps", "bundle", "scheduler"),
    *("doctor", "cli"),
}
"""Rooms that load no torch when they are imported: pure arithmetic, or the way to `sfrt --help`."""


@dataclass(frozen=True)
class Import:
    path: Path
    line: int
    target: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path, source: str) -> Iterator[Import]:
    """Every import of a module as a full dotted name, those inside functions and under TYPE_CHECKING too."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import; write it in full"
            for alias in node.names:
                yield Import(path, node.lineno, f"{node.module}.{alias.name}", lazy)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types_only(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(source, filename=str(path)), lazy=False)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_under(folder: str) -> list[Import]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [found for path in paths for found in imports_of(path, path.read_text("utf-8"))]


def room_of(dotted: str) -> str:
    """`sfrt.decoders.taehv.Taehv` → `decoders`; the package itself is its own room, named by an empty string."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else ""


def wrong_way(found: Import) -> bool:
    here, there = room_of(module_name(found.path)), room_of(found.target)
    if found.target.split(".")[0] != "sfrt" or here == there:
        return False
    if here == "":  # sfrt/__init__.py: the errors, and the rest only when a name is asked for
        return there != "errors" and not found.target.startswith(("sfrt.chunk.", "sfrt.runtime.", "sfrt.session."))
    if there == "":
        return found.target != "sfrt.__version__"
    return RANK[there] >= RANK[here]


def test_every_module_has_a_room() -> None:
    rooms = {path.stem for path in (ROOT / "sfrt").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "models"} <= RANK.keys()


def test_imports_go_one_way() -> None:
    assert [str(found) for found in imports_under("sfrt") if wrong_way(found)] == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("sfrt/ring.py", "from sfrt.errors import ConfigError", False),
        ("sfrt/ring.py", "def f():\n    from sfrt.session import Chunk", True),
        ("sfrt/ring.py", "import sfrt.timesteps", True),
        ("sfrt/decoders/taehv.py", "from sfrt.decoders.wan_vae import decode", False),
        ("sfrt/decoders/taehv.py", "if TYPE_CHECKING:\n    from sfrt.backends.torch import B", True),
        ("sfrt/session.py", "from sfrt import Runtime", True),
        ("sfrt/runtime.py", "from sfrt import __version__", False),
        ("sfrt/__init__.py", "from sfrt.runtime import Runtime", False),
        ("sfrt/__init__.py", "from sfrt.transformer import CausalDiT", True),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str, wrong: bool) -> None:
    assert any(wrong_way(found) for found in imports_of(ROOT / path, source)) is wrong


def test_only_the_command_line_reaches_out_and_only_lazily() -> None:
    outside = [
        found
        for found in imports_under("sfrt")
        if found.target.split(".")[0] in {"sfrt_export", "sfrt_train", "bench", "tests"}
    ]
    assert [str(found) for found in outside if room_of(module_name(found.path)) != "cli" or not found.lazy] == []
    assert {found.target.split(".")[0] for found in outside} <= {"sfrt_export"}


def test_export_does_not_import_the_recipe() -> None:
    assert [str(found) for found in imports_under("export") if found.target.startswith("sfrt_train")] == []


def test_rooms_without_torch() -> None:
    assert [
        str(found)
        for found in imports_under("sfrt")
        if room_of(module_name(found.path)) in NO_TORCH and not found.lazy and found.target.split(".")[0] == "torch"
    ] == []


def run_python(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["sfrt", "sfrt.cli", "sfrt.doctor", "sfrt.config", "sfrt.ring", "sfrt.bundle"])
def test_import_is_light(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*sys.modules)").split()
    heavy = {"torch", "numpy", "tokenizers", "safetensors", "av", "PIL", "transformers", "triton", "onnxruntime"}
    assert heavy.isdisjoint(loaded)


def test_lazy_names() -> None:
    out = run_python(
        "import sys, sfrt\n"
        "assert set(dir(sfrt)) == set(sfrt.__all__)\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(getattr(sfrt, name) is not None for name in sfrt.__all__)\n"
        "assert 'torch' in sys.modules\n"
        "try:\n    sfrt.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    assert out.strip() == "module 'sfrt' has no attribute 'nothing'"


def test_the_runtime_needs_few_packages() -> None:
    """Where only torch, numpy, safetensors, tokenizers, tqdm, pillow are, all but what extras are for imports."""
    out = run_python(
        "import sys, pkgutil, importlib\n"
        "absent = {'av', 'click', 'flash_attn', 'onnx', 'onnxruntime', 'prometheus_client', 'pynvml', 'starlette',\n"
        "          'tensorrt', 'transformers', 'triton', 'uvicorn', 'websockets'}\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in absent:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import sfrt\n"
        "names = [m.name for m in pkgutil.walk_packages(sfrt.__path__, 'sfrt.')]\n"
        "extras = ('sfrt.ops.triton_kernels.', 'sfrt.ops.cuda_kernels.', 'sfrt.server.')\n"
        "names = [n for n in names if n not in ('sfrt.cli', 'sfrt.__main__') and not n.startswith(extras)]\n"
        "for name in names:\n"
        "    importlib.import_module(name)\n"
        "print(len(names))"
    )
    assert int(out) >= 10


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_stream_starts_without_torchs_compiler(backend: str) -> None:
    """Its import takes seconds, and a division on the meta device is enough to bring it in."""
    out = run_python(
        "import sys\n"
        "from sfrt import Runtime\n"
        f"with Runtime(device='cpu', backend={backend!r}).session('a red circle', limit=1) as session:\n"
        "    next(session)\n"
        "print(*sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)))"
    )
    assert out.strip() == ""
