"""The exported model on disk: a folder with manifest.json, safetensors files and the tokenizer.

Everything in sfrt runs from a bundle; `sfrt export` and the training recipe write them (sfrt/bundle/writer.py). Opening
one needs no torch, so that a bundle can be described anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfrt.bundle.manifest import (
    HOW_TO_ADD,
    MANIFEST,
    TOKENIZER,
    DTypeName,
    FileInfo,
    Manifest,
    TaehvPart,
    WanVaePart,
    read_manifest,
)
from sfrt.errors import BundleError

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
    "TaehvPart",
    "WanVaePart",
    "hash_file",
    "resolve_model",
]

BUILT_IN = "shapes"
"""Name of the model that comes with sfrt."""

Part = Literal["transformer", "decoder", "text_encoder"]

_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest. Tensors are read when asked for."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Read the manifest and check that the files are those it names.

        Sizes are always checked. verify also hashes every file, one thread each (hashing releases the interpreter): a
        1.3B model's 2.8 GB take about two seconds, once, and the pages read are those that `load` then maps, so much
        of that time is reading that would come anyway. A flipped bit is thus found before anything runs, not as a
        strange picture. Pass False where only the manifest matters or the files were checked a moment ago.
        Raises BundleError, naming the file.
        """
        path = Path(path)
        manifest = read_manifest(path / MANIFEST)
        bundle = cls(path, manifest)
        for name, info in manifest.files.items():
            bundle._check_size(name, info)
        if verify:
            with ThreadPoolExecutor() as pool:
                hashes = dict(zip(manifest.files, pool.map(bundle._hash, manifest.files), strict=True))
            for name, info in manifest.files.items():
                if hashes[name] != info.sha256:
                    raise BundleError(
                        f"{path / name} is damaged: its sha256 is {hashes[name][:12]}…, the manifest says "
                        f"{info.sha256[:12]}…; copy or export the bundle again"
                    )
        return bundle

    def load(
        self, part: Part, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """One part's tensors by parameter name; dtype None leaves them as stored.

        On the CPU they are mapped from the file and take no memory until touched, unless dtype makes copies.
        Raises BundleError when the bundle lacks the part or its file is no safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        path = self._file(f"{part}.safetensors")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                return {name: file.get_tensor(name).to(dtype=dtype) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} cannot be read ({error}); copy or export the bundle again") from None

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file. Raises BundleError where the bundle has none."""
        return self._file(TOKENIZER)

    def _file(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise BundleError(f"the bundle {self.path} has no {name}; {HOW_TO_ADD[name]}")
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

    def _hash(self, name: str) -> str:
        return hash_file(self.path / name)


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
