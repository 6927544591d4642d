"""Compiled kernels as files: made where there is no GPU, and given back to Triton where there is one.

A kernel is two files. NAME.cubin is what the GPU runs; NAME.json says what Triton's compiler said of it, which of our
functions it is, with that function's hash, and what it is specialised for, in the words of Triton 3.6's own
`JITFunction.preload`. That puts it where a launch looks first, so nothing is compiled, and launches stay as they are.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfrt.errors import BundleError
from sfrt.ops.triton_kernels.launch import Specialised

_ROOM = __name__.rpartition(".")[0] + "."


@dataclass(frozen=True)
class StoredKernel:
    """A compiled kernel's name, and the content of its files by their suffix."""

    name: str
    content: dict[str, bytes]


def store(specialised: Specialised) -> StoredKernel:
    """Compile it. Its name says the function and, hashed, what it is specialised for; no path of this machine is in it.

    Raises what Triton's compiler raises.
    """
    from triton import knobs
    from triton.runtime.jit import serialize_specialization_data

    source, options = specialised.source, specialised.options
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # it says where the source lies
        compiled = specialised.compile()
    (described,) = (Path(path) for name, path in compiled.metadata_group.items() if name.endswith(".json"))
    data = serialize_specialization_data(
        source.fn._fn_name, source.signature, source.constants, source.attrs, options, specialised.key
    )
    specialization = json.loads(data)
    del specialization["options"]["extern_libs"]  # where Triton's own library lies
    metadata = {
        **json.loads(described.read_bytes()),
        "extern_libs": [],
        "function_hash": source.fn.cache_key,
        "specialization": specialization,
    }
    digest = hashlib.sha256(f"{source.hash()} {specialised.key}".encode()).hexdigest()
    name = f"{source.fn.__name__.strip('_')}-{digest[:16]}"
    text = json.dumps(metadata, indent=1, sort_keys=True) + "\n"
    return StoredKernel(name, {"json": text.encode(), "cubin": compiled.asm["cubin"]})


def restore(stem: Path) -> Any | None:
    """Put the kernel of the files STEM.json and STEM.cubin where its launches on the current device look first.

    Triton's compiled kernel; None where the function has changed since, so that this is another one's.
    Raises BundleError for files that are no stored kernel.
    """
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    files = {f"{stem.name}.{suffix}": f"{stem}.{suffix}" for suffix in ("json", "cubin")}
    try:
        metadata = json.loads(Path(f"{stem}.json").read_bytes())
        function = _function(metadata["specialization"]["name"])
        if function.cache_key != metadata["function_hash"]:
            return None
        data = json.dumps(metadata["specialization"])
    except (OSError, ValueError, LookupError, TypeError, ImportError, AttributeError) as error:
        raise BundleError(f"{stem}.json describes no kernel ({error}); compile the bundle's kernels again") from None
    _ = function.device_caches[driver.active.get_current_device()]  # made when asked for, and with it the compiler
    compiler, function.compile = function.compile, lambda source, **_: CompiledKernel(source, files, stem.name)
    try:
        return function.preload(data)
    finally:
        function.compile = compiler


def _function(name: str) -> Any:
    """One of our kernels by its full name."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith(_ROOM):
        raise LookupError(f"{name} is none of sfrt's")
    return getattr(importlib.import_module(module), attribute)
