"""TensorRT plans as files: what each was built from and for, and which of them a machine and a bundle can use.

Neither TensorRT nor torch is needed to read this. A plan file is eight bytes of header length (little-endian), the
header (a PlanInfo as JSON) and the engine as TensorRT wrote it. Plans lie in the folder `plans` beside the graphs that
they are built from; they are no part of a bundle: each can be built again from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sfrt.bundle import Bundle, DTypeName, FileInfo
from sfrt.bundle.schema import SchemaError, from_json, to_json
from sfrt.errors import BundleError
from sfrt.graphs import OF_PART, GraphName, graph_file

FOLDER = "plans"
FORMAT = 1
HOW_TO_BUILD = (
    "build plans on this machine: sfrt export BUNDLE --tensorrt (with this stream's size and window, and --any-start "
    "where it goes on from a picture), or use the torch backend"
)

_LONGEST_HEADER = 1 << 20

Range = tuple[int, int, int]
"""The least, the most usual and the greatest value."""

Profile = dict[str, Range]
"""What one of TensorRT's optimisation profiles serves: the sizes of a graph by name, and values of inputs by theirs."""


@dataclass(frozen=True)
class Origin:
    """What plans are built from: a folder of graphs beside their weights, and what its files are."""

    folder: Path
    files: Mapping[str, FileInfo]

    @classmethod
    def of(cls, bundle: Bundle) -> Origin:
        """A bundle's graphs."""
        return cls(bundle.path, bundle.manifest.files)

    def graph(self, graph: GraphName, dtype: DTypeName) -> str:
        """The hash of a graph's file."""
        return self.files[graph_file(graph, dtype)].sha256

    def weights(self, graph: GraphName) -> str:
        """The hash of a graph's weights."""
        return self.files[weights_file(graph)].sha256

    @property
    def plans(self) -> Path:
        """The folder that plans are kept in."""
        return self.folder / FOLDER


@dataclass(frozen=True)
class Target:
    """The GPU and the library that a plan is for; it runs with no others."""

    gpu: str
    capability: str
    tensorrt: str

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.capability}) with TensorRT {self.tensorrt}"


@dataclass(frozen=True)
class PlanInfo:
    """A plan file's header.

    axes says in which input, and on which of its axes, each named size of the graph is found. A name in profiles that
    has no axis is an input whose value, kept on the host, decides what the plan computes.
    """

    graph: GraphName
    dtype: DTypeName
    target: Target
    graph_sha256: str
    weights_sha256: str
    axes: dict[str, tuple[str, int]]
    profiles: tuple[Profile, ...]
    engine_bytes: int = 0
    format: int = FORMAT

    @property
    def file(self) -> str:
        """The plan's name in the folder: the same for other weights, which a plan can be refitted with."""
        key = to_json(replace(self, weights_sha256="", engine_bytes=0))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return f"{self.graph}.{self.dtype}.{digest[:12]}.plan"

    @property
    def values(self) -> tuple[str, ...]:
        """The inputs that are read on the host."""
        return tuple(name for name in self.profiles[0] if name not in self.axes)

    def sizes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The named sizes of inputs of these shapes."""
        return {size: shapes[name][axis] for size, (name, axis) in self.axes.items()}

    def serving(self, sizes: Mapping[str, int]) -> list[int]:
        """The profiles, by number, that serve these sizes and values; those that are not given may be any."""
        return [
            number
            for number, profile in enumerate(self.profiles)
            if all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items())
        ]

    def differs(self, target: Target, origin: Origin) -> str | None:
        """What keeps the plan from running in place of the origin's graph on this target; None where nothing does."""
        if self.target != target:
            return f"was built for {self.target}, and here is {target}"
        if self.graph_sha256 != origin.graph(self.graph, self.dtype):
            return f"was built from another {graph_file(self.graph, self.dtype)} than the bundle's"
        if self.weights_sha256 != origin.weights(self.graph):
            return f"holds other weights than the bundle's {weights_file(self.graph)}"
        return None


def weights_file(graph: GraphName) -> str:
    """The file that holds a graph's weights."""
    return next(f"{part}.safetensors" for part, names in OF_PART.items() if graph in names)


def usable_plans(origin: Origin, graph: GraphName, dtype: DTypeName, target: Target) -> dict[Path, PlanInfo]:
    """The plans that can stand for a graph on this target.

    Raises BundleError where there are none, with the reason why one that is there is none of them.
    """
    usable: dict[Path, PlanInfo] = {}
    refused: list[str] = []
    for file in sorted(origin.plans.glob(f"{graph}.{dtype}.*.plan")):
        try:
            info = read_info(file)
        except BundleError as error:  # one that is damaged or of another sfrt keeps no other from being used
            refused.append(str(error))
            continue
        reason = info.differs(target, origin)
        if reason is None:
            usable[file] = info
        else:
            refused.append(f"{file} {reason}; {HOW_TO_BUILD}")
    if usable:
        return usable
    if refused:
        raise BundleError(refused[0])
    raise BundleError(f"the bundle {origin.folder} has no TensorRT plan of {graph} in {dtype}; {HOW_TO_BUILD}")


def shortest_ring(plans: Iterable[PlanInfo], chunks: Iterable[int], tokens: int) -> int | None:
    """The shortest ring that is long enough for so many tokens, of plans that serve chunks of all these tokens."""
    lengths = list(chunks)
    rings = [info.profiles[0]["ring"][2] for info in plans if all(info.serving({"tokens": n}) for n in lengths)]
    return min((ring for ring in rings if ring >= tokens), default=None)


def read_info(path: Path) -> PlanInfo:
    """The header of a plan file. Raises BundleError where it is damaged or of another format."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size) if size <= _LONGEST_HEADER else b""
            whole = 8 + size
            info = from_json(PlanInfo, json.loads(header))
            if info.format != FORMAT or path.stat().st_size != whole + info.engine_bytes:
                raise SchemaError("", "is cut off or of another format")
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except ValueError:  # not JSON, or not a PlanInfo
        raise BundleError(f"{path} is damaged, or from another sfrt; remove it and {HOW_TO_BUILD}") from None
    return info


def map_engine(path: Path) -> memoryview:
    """The engine in a plan file, mapped: nothing is read before it is used."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[start:]


def write_plan(folder: Path, info: PlanInfo, engine: memoryview) -> Path:
    """Write a plan file, all of it or nothing. Raises BundleError where the disk does not take it."""
    info = replace(info, engine_bytes=engine.nbytes)
    header = json.dumps(to_json(info)).encode()
    path = folder / info.file
    write_whole(path, (len(header).to_bytes(8, "little"), header, engine))
    return path


def write_whole(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a file that nobody sees before it is complete; its folder is made. Raises BundleError for a full disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            file.writelines(blocks)
        partial.replace(path)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be written ({error.strerror}); the bundle is as it was, make room or free the folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
