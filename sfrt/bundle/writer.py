"""Writing a bundle, all of it or nothing: into a hidden folder beside the target, renamed when complete.

Tensors go to disk one by one while their hash is taken, so a model is exported in the memory of its largest tensor. The
format is that of safetensors (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON header,
the tensors' bytes; written here because that library wants all tensors in memory before it writes the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from sfrt.bundle import Bundle, Part, hash_file
from sfrt.bundle.manifest import MANIFEST, TOKENIZER, FileInfo, Manifest
from sfrt.errors import BundleError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_JOURNAL = "journal.json"
_DTYPE_NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int8": "I8",
    "torch.float8_e4m3fn": "F8_E4M3",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known before its values are made."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class BundleWriter:
    """A context manager that writes one bundle.

    Add the files, then `finish` with a manifest; leaving the context without it leaves nothing behind, but for a Ctrl-C
    after `resume`. Raises BundleError where the target exists, its parent does not, or the disk is full.
    """

    def __init__(self, directory: str | Path) -> None:
        self._target = Path(directory)
        self._work = self._target.parent / f".{self._target.name}.{os.getpid()}.partial"
        self._interrupted = self._target.parent / f".{self._target.name}.interrupted"
        self._contents: str | None = None
        self._taken_over: dict[str, FileInfo] = {}
        self._files: dict[str, FileInfo] = {}

    def __enter__(self) -> BundleWriter:
        if self._target.exists() or self._target.is_symlink():
            raise BundleError(f"{self._target} exists already; choose another output folder or remove it first")
        if not self._target.parent.is_dir():
            raise BundleError(f"{self._target.parent} is not a folder; make it first, the bundle goes inside")
        try:
            self._work.mkdir()
        except OSError as error:
            raise self._failure(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self._contents is not None:
            self._keep({**self._taken_over, **self._files})
        shutil.rmtree(self._work, ignore_errors=True)  # gone already when it was renamed

    def resume(self, contents: str) -> None:
        """Take over the parts that an interrupted writer of the same contents finished; interrupted, leave them again.

        contents is text that says what the bundle is made of. What is left of other contents is removed.
        """
        self._contents = hashlib.sha256(contents.encode()).hexdigest()
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none there, or none that can be used
            journal = json.loads((self._interrupted / _JOURNAL).read_bytes())
            for name, info in journal["files"].items() if journal["contents"] == self._contents else ():
                (self._interrupted / name).rename(self._work / name)
                self._taken_over[name] = FileInfo(**info)
        shutil.rmtree(self._interrupted, ignore_errors=True)

    def _keep(self, finished: Mapping[str, FileInfo]) -> None:
        """Leave these files for the next writer of the same contents, as far as the disk allows."""
        with contextlib.suppress(OSError):
            for file in self._work.iterdir():
                if file.name not in finished:
                    file.unlink()
            journal = {"contents": self._contents, "files": {name: asdict(info) for name, info in finished.items()}}
            (self._work / _JOURNAL).write_text(json.dumps(journal))
            self._work.rename(self._interrupted)

    def add_tensors(
        self,
        part: Part,
        tensors: Mapping[str, Tensor | LazyTensor],
        progress: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Write PART.safetensors. Lazy tensors are made one at a time; progress is told the bytes of each.

        Raises BundleError when the disk has too little room, before writing.
        """
        name = f"{part}.safetensors"
        lazy = {key: _as_lazy(value) for key, value in tensors.items()}
        needed = sum(value.nbytes for value in lazy.values())
        if name in self._taken_over:
            self._files[name] = self._taken_over[name]
            progress(needed)
            return
        free = shutil.disk_usage(self._work).free
        if needed > free:
            raise BundleError(
                f"{self._target} needs {needed / 1e9:.1f} GB for {name} and its disk has {free / 1e9:.1f} GB free; "
                "make room or choose another disk"
            )
        try:
            with (self._work / name).open("wb") as file:
                self._files[name] = _write_safetensors(file, lazy, progress)
        except OSError as error:
            raise self._failure(error) from None

    def add_graphs(self, write: Callable[[Path], Iterable[str]]) -> None:
        """Take in the files that `write` makes in the folder it is given, where the tensors lie; it names them."""
        try:
            names = write(self._work)
            for name in names:
                file = self._work / name
                self._files[name] = FileInfo(file.stat().st_size, hash_file(file))
        except OSError as error:
            raise self._failure(error) from None

    def add_tokenizer(self, source: str | Path) -> None:
        """Copy a tokenizer file in."""
        self.add_file(TOKENIZER, Path(source))

    def add_file(self, name: str, source: Path) -> None:
        """Copy a file in as it is. Raises BundleError where it cannot be read."""
        info = FileInfo(source.stat().st_size, hash_file(source)) if source.is_file() else None
        if info is None:
            raise BundleError(f"{source} is not a file; check its path")
        try:
            shutil.copyfile(source, self._work / name)
        except OSError as error:
            raise self._failure(error) from None
        self._files[name] = info

    def finish(self, manifest: Manifest) -> Bundle:
        """Write the manifest, its `files` filled in, and move the bundle to its place.

        Raises BundleError when the files added are not those that the manifest's parts need.
        """
        expected = manifest.expected_files()
        if set(expected) != set(self._files):
            raise BundleError(
                f"{self._target} would hold {sorted(self._files)} but its manifest describes {sorted(expected)}; "
                "add each part's files and no others"
            )
        manifest = replace(manifest, files={name: self._files[name] for name in expected})
        try:
            (self._work / MANIFEST).write_text(manifest.dumps(), encoding="utf-8")
            self._work.rename(self._target)
        except OSError as error:
            raise self._failure(error) from None
        return Bundle(self._target, manifest)

    def _failure(self, error: OSError) -> BundleError:
        return BundleError(
            f"{self._target} cannot be written ({error.strerror}); nothing was left there, "
            "make room or choose another place"
        )


def extend(bundle: Bundle, manifest: Manifest, content: Mapping[str, bytes]) -> Bundle:
    """The bundle with these files besides, and without those that the manifest, its `files` aside, no longer expects.

    The manifest is exchanged last, in one step, so that the bundle is whole at any moment. Raises BundleError where it
    cannot be written, or is not what the manifest expects.
    """
    added = {name: FileInfo(len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
    files = {**bundle.manifest.files, **added}
    expected = manifest.expected_files()
    if missing := set(expected) - files.keys():
        raise BundleError(f"{bundle.path} would lack {sorted(missing)}; add them with the manifest")
    manifest = replace(manifest, files={name: files[name] for name in expected})
    try:
        for name, data in content.items():
            _put(bundle.path / name, data)
        _put(bundle.path / MANIFEST, manifest.dumps().encode())
    except OSError as error:
        raise BundleError(f"{bundle.path} cannot be written ({error.strerror}); it is as it was") from None
    for name in bundle.manifest.files.keys() - manifest.files.keys():
        with contextlib.suppress(OSError):  # it is no part of the bundle any more
            (bundle.path / name).unlink()
    return Bundle(bundle.path, manifest)


def _put(path: Path, data: bytes) -> None:
    """A file in its place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _as_lazy(tensor: Tensor | LazyTensor) -> LazyTensor:
    if isinstance(tensor, LazyTensor):
        return tensor
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _write_safetensors(
    file: BinaryIO, tensors: Mapping[str, LazyTensor], progress: Callable[[int], object]
) -> FileInfo:
    # Wide types first, so that every tensor starts at a multiple of its own item size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    total = 0
    for block in _blocks(len(text).to_bytes(8, "little") + text, (tensors[name] for name in order)):
        digest.update(block)
        file.write(block)
        total += block.nbytes
        progress(block.nbytes)
    return FileInfo(total, digest.hexdigest())


def _blocks(header: bytes, tensors: Iterable[LazyTensor]) -> Iterable[memoryview]:
    import torch

    yield memoryview(header)
    for lazy in tensors:
        tensor = lazy.make()
        if tuple(tensor.shape) != lazy.shape or tensor.dtype != lazy.dtype:
            raise ValueError(f"made {tensor.dtype} {tuple(tensor.shape)}, announced {lazy.dtype} {lazy.shape}")
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
