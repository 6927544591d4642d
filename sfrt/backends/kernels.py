"""A bundle's compiled kernels on a GPU, ready before anything asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from sfrt import machine
from sfrt.bundle import Bundle, Manifest
from sfrt.bundle.kernels import KernelSet, architecture_of
from sfrt.device import dtype_name
from sfrt.errors import DeviceError, SfrtError


def kernels_for(manifest: Manifest, capability: int, dtype: str) -> KernelSet | str:
    """The kernels of a bundle that fit a GPU, this machine's Triton and a dtype; else why none do."""
    architecture = architecture_of(capability)
    if not manifest.kernels:
        return f"the bundle has none; add them with sfrt export BUNDLE --kernels {architecture}"
    fitting = [each for each in manifest.kernels if each.architecture == architecture]
    if not fitting:
        there = ", ".join(sorted({each.architecture for each in manifest.kernels}))
        return f"they are for {there}, and this GPU is {architecture}"
    version = machine.version_of("triton")
    if version is None:
        return "Triton is not installed, which launches them"
    for each in fitting:
        if (each.triton, each.dtype) == (version, dtype):
            return each
    there = ", ".join(f"Triton {each.triton} in {each.dtype}" for each in fitting)
    return f"they are from {there}, and this is Triton {version} in {dtype}"


@contextmanager
def kernels_loaded(bundle: Bundle, device: torch.device, dtype: torch.dtype, *, verify: bool) -> Iterator[None]:
    """Load the kernels of a bundle that fit a GPU while the body runs; at its end they are ready to be launched.

    Where none fit, Triton compiles them when they are first launched. verify hashes their files before.
    Raises BundleError for a file that is damaged, DeviceError for a kernel that the GPU refuses. Unverified: no GPU has
    loaded any yet.
    """
    found = kernels_for(bundle.manifest, capability_under(device), dtype_name(dtype)) if device.type == "cuda" else ""
    if isinstance(found, str):
        yield
        return
    with ThreadPoolExecutor(1) as aside:
        loading = aside.submit(load_kernels, bundle, found, device, verify=verify)
        yield
        loading.result()


def load_kernels(bundle: Bundle, kernels: KernelSet, device: torch.device, *, verify: bool) -> int:
    """Load a bundle's kernels on a GPU, and build what launches them; how many of them are of this version of sfrt.

    Triton has a C compiler build a launcher for each kind of signature, once a machine; several run at a time here.
    """
    from sfrt.ops.triton_kernels.stored import restore

    if verify:
        bundle.verify(*kernels.files)

    def make_ready(kernel: Any) -> None:
        with torch.cuda.device(device):
            kernel._init_handles()

    try:
        with torch.cuda.device(device):
            restored = [kernel for stem in kernels.stems if (kernel := restore(bundle.path / stem)) is not None]
        with ThreadPoolExecutor() as pool:
            list(pool.map(make_ready, restored))
    except SfrtError:
        raise
    except Exception as error:  # Triton raises what its driver says
        raise DeviceError(f"the kernels of {bundle.path} cannot be loaded on {device}: {error}") from error
    return len(restored)


def capability_under(device: torch.device) -> int:
    """The compute capability of a GPU, 90 meaning 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
