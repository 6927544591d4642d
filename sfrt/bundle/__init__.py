"""The exported model on disk: a folder with manifest.json, safetensors files and the tokenizer.

Everything in sfrt runs from a bundle; `sfrt export` and the training recipe write them (sfrt/bundle/writer.py). Opening
one needs no torch, so that a bundle can be described anywhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal

from sfrt.bundle.manifest import (
    MANIFEST,
    TOKENIZER,
    DTypeName,
    FileInfo,
    Manifest,
    TaehvPart,
    WanVaePart,
    how_to_add,
    read_manifest,
)
from sfrt.bundle.quantization import Quantization, in_dtype
from sfrt.errors import BundleError
from sfrt.graphs import graph_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "BUILT_IN",
    "Bundle",
    "DTypeName",
    "FileInfo",
    "Manifest",
    "Part",
    "Quantization",
    "TaehvPart",
    "WanVaePart",
    "hash_file",
    "resolve_model",
]

BUILT_IN = "shapes"
"""Name of the model that comes with sfrt."""

Part = Literal["transformer", "decoder", "text_encoder"]

_STORED: dict[str, DTypeName] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HASH_BLOCK = 1 << 20
_HASHED_TOGETHER = 8


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest. Tensors are read when asked for."""

    path: Path
    manifest: Manifest
    _verified: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Read the manifest and check that the files are those it names.

        Sizes are always checked; verify also hashes every file. Pass False where only the manifest matters, or where
        `load` verifies the parts that are used. Raises BundleError, naming the file.
        """
        path = Path(path)
        manifest = read_manifest(path / MANIFEST)
        bundle = cls(path, manifest)
        for name, info in manifest.files.items():
            bundle._check_size(name, info)
        if verify:
            bundle.verify(*manifest.files)
        return bundle

    def verify(self, *names: str) -> None:
        """Hash these of its files, one thread each, and each file once: what was right before is not read again.

        A flipped bit is thus found before anything runs, not as a strange picture. A 1.3B model's 2.8 GB take about two
        seconds, and the pages read are those that `load` then maps, so much of that is reading that would come anyway.
        Raises BundleError for a file that the bundle lacks, or that is not what the manifest says.
        """
        with self._verifying(*names):
            pass

    def load(
        self,
        part: Part,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        verify: bool = False,
    ) -> dict[str, Tensor]:
        """One part's tensors by parameter name; dtype None leaves them as stored. verify hashes their file meanwhile.

        Quantised weights and their scales are left as stored in any case.

        On the CPU they are mapped from the file and take no memory until touched, unless dtype makes copies. To a GPU
        the file is read once (`sfrt.bundle.upload`).
        Raises BundleError when the bundle lacks the part, or its file is damaged or no safetensors file.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        path = self._file(f"{part}.safetensors")
        try:
            if torch.device(device).type == "cuda":
                return self._upload(path, torch.device(device), dtype, verify)
            with (
                self._verifying(*([path.name] if verify else [])),
                safe_open(path, framework="pt", device=str(device)) as file,
            ):
                return {name: in_dtype(name, file.get_tensor(name), dtype) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} cannot be read ({error}); copy or export the bundle again") from None

    def stored_dtype(self, part: Part) -> DTypeName:
        """The dtype that most of a part's tensors have in its file.

        Raises BundleError when the bundle lacks the part, or its file is no safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        path = self._file(f"{part}.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                counts = Counter(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} cannot be read ({error}); copy or export the bundle again") from None
        return _STORED[counts.most_common(1)[0][0]]

    def graph_folder(self, part: Part, dtype: DTypeName, *, verify: bool = False) -> Path:
        """Where the ONNX graphs of a part lie, beside the weights they refer to; verify hashes them all.

        Raises BundleError when the bundle lacks the part or has no graphs in this dtype, or a file is damaged.
        """
        self._file(f"{part}.safetensors")
        if dtype not in self.manifest.graph_dtypes(part):
            there = ", ".join(self.manifest.graph_dtypes(part))
            raise BundleError(
                f"the bundle {self.path} has {f'graphs in {there} only' if there else 'no ONNX graphs'}; "
                f"export the checkpoint again with --onnx --onnx-dtype {dtype}"
            )
        if verify:
            self.verify(f"{part}.safetensors", *graph_files(part, dtype))
        return self.path

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file. Raises BundleError where the bundle has none."""
        return self._file(TOKENIZER)

    def _upload(self, path: Path, device: torch.device, dtype: torch.dtype | None, verify: bool) -> dict[str, Tensor]:
        from sfrt.bundle.upload import CudaCopyQueue, upload

        digest = None if not verify or path.name in self._verified else hashlib.sha256()
        tensors = upload(path, CudaCopyQueue(device), dtype, digest.update if digest else None)
        if digest:
            self._compare(path.name, digest.hexdigest())
        return tensors

    @contextmanager
    def _verifying(self, *names: str) -> Iterator[None]:
        """As verify, while the body runs; what is wrong is raised at its end."""
        wanted = [name for name in dict.fromkeys(names) if name not in self._verified]
        with _hashing([self._file(name) for name in wanted]) as hashes:
            yield
        for name, found in zip(wanted, hashes, strict=True):
            self._compare(name, found)

    def _compare(self, name: str, found: str) -> None:
        """Raise BundleError where a file's hash is not the manifest's."""
        expected = self.manifest.files[name].sha256
        if found != expected:
            raise BundleError(
                f"{self.path / name} is damaged: its sha256 is {found[:12]}…, the manifest says "
                f"{expected[:12]}…; copy or export the bundle again"
            )
        self._verified.add(name)

    def _file(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise BundleError(f"the bundle {self.path} has no {name}; {how_to_add(name)}")
        return self.path / name

    def _check_size(self, name: str, info: FileInfo) -> None:
        file = self.path / name
        try:
            size = file.stat().st_size
        except OSError:
            raise BundleError(f"{file} is missing; copy or export the bundle again") from None
        if size != info.bytes:
            raise BundleError(
                f"{file} has {size} bytes but the manifest says {info.bytes}; copy or export the bundle again"
            )


def resolve_model(name_or_path: str | Path | None = None) -> Path:
    """The folder of a model: None or "shapes" is the built-in one, anything else a path to a bundle.

    Raises BundleError for a path that is no bundle.
    """
    if name_or_path is None or name_or_path == BUILT_IN:
        return Path(__file__).parent.parent / "models" / BUILT_IN
    path = Path(name_or_path)
    if (path / MANIFEST).is_file():
        return path
    if path.is_file():
        raise BundleError(f"{path} is a file, not a bundle; make one from a checkpoint: sfrt export {path} -o DIR")
    if path.is_dir():
        raise BundleError(f"{path} has no {MANIFEST}; a bundle is a folder that sfrt export wrote")
    raise BundleError(f"there is no model at {path}; give a folder that sfrt export wrote, or {BUILT_IN!r}")


def hash_file(path: Path, progress: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file, read in blocks whose sizes progress is told. Raises BundleError when it cannot be read."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_HASH_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
                progress(count)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    return digest.hexdigest()


@contextmanager
def _hashing(paths: list[Path]) -> Iterator[list[str]]:
    """SHA-256 of several files at a time, while the body runs: hashing releases the interpreter.

    The list is filled behind the body. What ends that early, such as Ctrl-C, ends hashing within a block of each.
    """
    hashes: list[str] = []
    stopped = Event()

    def go_on(count: int) -> None:
        if stopped.is_set():
            raise CancelledError

    with ThreadPoolExecutor(_HASHED_TOGETHER) as pool:
        running = [pool.submit(hash_file, path, go_on) for path in paths]
        try:
            yield hashes
            hashes += [each.result() for each in running]
        finally:
            stopped.set()
