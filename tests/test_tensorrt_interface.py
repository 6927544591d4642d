"""Every name of TensorRT that sfrt uses, against the interface of its Python binding: there is no TensorRT to run here.

The data was read from the binding of TensorRT 11.4 itself. What a name refers to is followed from `trt` (the module, by
convention), from annotations, and from what methods are declared to return.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
INTERFACE: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/data/tensorrt-11.4.0.106.json").read_text("utf-8"))
SOURCES = sorted(
    [*(ROOT / "sfrt/backends/tensorrt").glob("*.py"), *(ROOT / "export/sfrt_export").glob("tensorrt_*.py")]
)

PROPERTY_TYPES = {
    ("IAttentionBoundaryLayer", "attention"): "IAttention",
    ("IExecutionContext", "engine"): "ICudaEngine",
}
"""What some properties are, which the data does not say."""


@dataclass(frozen=True)
class Kind:
    """What an expression is: the module, a class of it, an instance, a method, or a container of one of these."""

    form: str
    name: str = ""
    method: str = ""
    items: tuple[Kind | None, ...] = ()


MODULE = Kind("module")


def owner_of(cls: str, member: str) -> str | None:
    """The class that has a member, `cls` itself or one of its bases."""
    entry = INTERFACE.get(cls, {})
    if member in entry.get("methods", {}) or member in (*entry.get("properties", ()), *entry.get("members", ())):
        return cls
    return next((found for base in entry.get("bases", ()) if (found := owner_of(base, member))), None)


def signatures(cls: str, method: str) -> list[str]:
    return [text for text in INTERFACE[cls]["methods"][method] if "*args" not in text]


def parameters(signature: str) -> dict[str, bool]:
    """Names without self, and whether each has a default."""
    inner, depth, parts = signature[signature.index("(") + 1 : signature.rindex(")")], 0, [""]
    for letter in inner:
        depth += (letter in "([<") - (letter in ")]>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    named = {part.split(":")[0].split("=")[0].strip(): "=" in part for part in parts if part.strip()}
    named.pop("self", None)
    return named


def returned(signature: str) -> Kind | None:
    name = signature.rpartition("-> ")[2].removeprefix("tensorrt.").replace("nvonnxparser::I", "")
    return Kind("instance", name) if name in INTERFACE else None


class Checker:
    """Walks one module. `problems` are its wrong names; `seen` are the members it used, as Class.member."""

    def __init__(self, source: str) -> None:
        self.problems: list[str] = []
        self.seen: set[str] = set()
        self._types: dict[str, Kind | None] = {"trt": MODULE, "tensorrt": MODULE, "self._trt": MODULE}
        self._functions: dict[str, Kind | None] = {}
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "tensorrt":
                for alias in node.names:
                    self._class(alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self._functions[node.name] = self._annotated(node.returns)
                for argument in (*node.args.args, *node.args.kwonlyargs):
                    self._declare(argument.arg, self._annotated(argument.annotation))
            if isinstance(node, ast.ClassDef):
                self._subclass(node)
        assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)]
        for node in assignments * 2:  # twice: what one method sets another one reads
            self._assign(node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Call):
                self.kind(node)
        self.problems = list(dict.fromkeys(self.problems))

    def kind(self, node: ast.expr) -> Kind | None:
        if isinstance(node, ast.Name):
            return self._types.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Subscript):
            container = self.kind(node.value)
            return container.items[-1] if container and container.form == "mapping" else None
        return None

    def _attribute(self, node: ast.Attribute) -> Kind | None:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return self._types.get(f"self.{node.attr}")
        base = self.kind(node.value)
        if base is None or node.attr.startswith("__"):
            return None
        if base.form == "module":
            return self._class(node.attr)
        if base.form not in ("class", "instance"):
            return None
        owner = owner_of(base.name, node.attr)
        if owner is None:
            self.problems.append(f"{base.name} has no {node.attr}")
            return None
        self.seen.add(f"{base.name}.{node.attr}")
        if node.attr in INTERFACE[owner].get("members", ()):
            return Kind("instance", base.name)
        if node.attr in INTERFACE[owner].get("methods", {}):
            return Kind("method", owner, node.attr)
        known = PROPERTY_TYPES.get((owner, node.attr))
        return Kind("instance", known) if known else None

    def _call(self, node: ast.Call) -> Kind | None:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.kind(argument)
        callee = self.kind(node.func)
        if callee is None:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            own = isinstance(node.func, ast.Name) or (
                isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "self"
            )
            return self._functions.get(name) if own else None
        if callee.form == "class":
            self._arguments(node, callee.name, "__init__")
            return Kind("instance", callee.name)
        if callee.form == "method":
            self._arguments(node, callee.name, callee.method)
            return next(map(returned, signatures(callee.name, callee.method)), None)
        return None

    def _arguments(self, node: ast.Call, cls: str, method: str) -> None:
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        given = {keyword.arg for keyword in node.keywords}
        for signature in signatures(cls, method):
            names = parameters(signature)
            positional = set(list(names)[: len(node.args)])
            needed = {name for name, has_default in names.items() if not has_default}
            if len(node.args) <= len(names) and given <= names.keys() - positional and needed <= given | positional:
                return
        self.problems.append(f"{cls}.{method} does not take {ast.unparse(node)}")

    def _class(self, name: str) -> Kind | None:
        if name not in INTERFACE:
            self.problems.append(f"tensorrt has no {name}")
            return None
        self.seen.add(name)
        self._types.setdefault(name, Kind("class", name))
        return Kind("class", name)

    def _subclass(self, node: ast.ClassDef) -> None:
        """What a class of ours overrides must be there to be overridden, with the same arguments."""
        for base in node.bases:
            kind = self.kind(base)
            if kind is None or kind.form != "class":
                continue
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
                    continue
                arguments = [argument.arg for argument in method.args.args[1:]]
                if owner_of(kind.name, method.name) is None:
                    self.problems.append(f"{kind.name} has no {method.name}")
                elif arguments != list(parameters(signatures(kind.name, method.name)[0])):
                    self.problems.append(f"{kind.name}.{method.name} is not called with {arguments}")

    def _annotated(self, node: ast.expr | None) -> Kind | None:
        """What an annotation that names classes of TensorRT stands for."""
        if isinstance(node, ast.Name):
            known = self._types.get(node.id)
            return Kind("instance", node.id) if known and known.form == "class" else None
        if isinstance(node, ast.BinOp):
            return self._annotated(node.left) or self._annotated(node.right)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Tuple):
            form = {"tuple": "tuple", "dict": "mapping"}.get(node.value.id)
            items = tuple(self._annotated(item) for item in node.slice.elts)
            return Kind(form, items=items) if form and any(items) else None
        return None

    def _assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        if isinstance(node, ast.AnnAssign):
            self._declare(ast.unparse(node.target), self._annotated(node.annotation))
            return
        kind = self.kind(node.value)
        for target in node.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else []
            for index, name in enumerate(names):
                if values:
                    part = self.kind(values[index])
                elif isinstance(target, ast.Tuple):
                    part = kind.items[index] if kind and kind.form == "tuple" else None
                else:
                    part = kind
                self._declare(ast.unparse(name), part)

    def _declare(self, name: str, kind: Kind | None) -> None:
        """A name means one thing throughout a module, or nothing that is checked."""
        if kind is None:
            return
        if self._types.setdefault(name, kind) != kind:
            self.problems.append(f"{name} is of two kinds")


def checked(source: str) -> Checker:
    return Checker(source)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_name_is_there(path: Path) -> None:
    assert checked(path.read_text("utf-8")).problems == []


def test_what_is_used_is_seen() -> None:
    """A check that follows nothing would find nothing wrong."""
    seen = {name for path in SOURCES for name in checked(path.read_text("utf-8")).seen}
    for name in _calls_that_matter():
        assert name in seen, name


def _calls_that_matter() -> Iterator[str]:
    yield from (f"Builder.create_{what}" for what in ("network", "builder_config", "optimization_profile"))
    yield from ("Builder.build_serialized_network", "OnnxParser.parse", "OnnxParserRefitter.refit_from_bytes")
    yield from ("IOptimizationProfile.set_shape", "IOptimizationProfile.set_shape_input")
    yield from ("IBuilderConfig.set_timing_cache", "ITimingCache.combine", "ITimingCache.serialize")
    yield from ("IBuilderConfig.progress_monitor", "BuilderFlag.REFIT", "BuilderFlag.TF32", "MemoryPoolType.WORKSPACE")
    yield from ("INetworkDefinition.get_layer", "IAttentionInputLayer.attention", "IAttention.decomposable")
    yield from ("Refitter.refit_cuda_engine", "ICudaEngine.serialize_with_config", "ISerializationConfig.set_flag")
    yield from ("Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context")
    yield from (f"ICudaEngine.{name}" for name in ("num_io_tensors", "get_tensor_location", "get_aliased_input_tensor"))
    yield from (f"IExecutionContext.set_{name}" for name in ("tensor_address", "input_shape", "device_memory"))
    yield from ("IExecutionContext.set_optimization_profile_async", "IExecutionContext.execute_async_v3")
    yield from ("TensorIOMode.INPUT", "DataType.BF16", "IProgressMonitor", "ILogger")


FINE = """
from tensorrt import ICudaEngine
class Mine:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._config = trt.Builder(log).create_builder_config()
    def run(self):
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.STATIC)
        context.set_tensor_address('x', 0)
"""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("", ""), None),
        (("trt.Builder", "trt.Bilder"), "tensorrt has no Bilder"),
        (("import ICudaEngine", "import ICudaEngin"), "tensorrt has no ICudaEngin"),
        (("_strategy", ""), None),
        ((".STATIC", ".DYNAMIC"), "ExecutionContextAllocationStrategy has no DYNAMIC"),
        (("set_tensor_address", "set_binding"), "IExecutionContext has no set_binding"),
        (("'x', 0", "'x', address=0"), "IExecutionContext.set_tensor_address does not take"),
        (("'x', 0", "'x'"), "IExecutionContext.set_tensor_address does not take"),
        (("'x', 0", "'x', 0, 1"), "IExecutionContext.set_tensor_address does not take"),
        (
            ("context.set_tensor", "self._config.max_workspace_size = 1; context.set_tensor"),
            "IBuilderConfig has no max",
        ),
        (("class Mine:", "class Mine(trt.IProgressMonitor):"), "IProgressMonitor has no run"),
        (
            ("class Mine:", "class Log(trt.ILogger):\n    def log(self, level, msg): ...\nclass Mine:"),
            "is not called with",
        ),
    ],
)
def test_a_wrong_name_is_found(change: tuple[str, str], problem: str | None) -> None:
    problems = checked(FINE.replace(*change) if change[0] else FINE).problems
    assert (
        problems == [] if problem is None else any(found.startswith(problem) or problem in found for found in problems)
    )
