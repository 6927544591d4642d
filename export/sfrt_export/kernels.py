"""Kernels compiled into a bundle for GPUs that need not be here, so that nothing is compiled there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from sfrt.bundle import Bundle, DTypeName
from sfrt.bundle.kernels import KernelSet, architecture_of, capability_of
from sfrt.bundle.writer import extend
from sfrt.errors import ConfigError, DeviceError
from sfrt_export.progress import Progress, silent

if TYPE_CHECKING:
    from sfrt.ops.triton_kernels.launch import Launch
    from sfrt.ops.triton_kernels.stored import StoredKernel


def add_kernels(
    bundle: Bundle, targets: Iterable[str], dtype: DTypeName = "bfloat16", progress: Progress = silent
) -> Bundle:
    """The bundle with the Triton kernels that its own stream runs in `dtype`, compiled for some kinds of GPU.

    A target is an architecture, as sm_90a, or a compute capability, as 9.0; what was there for it is replaced.
    Raises ConfigError for a target that is none, or where Triton is missing; DeviceError for one that a kernel does not
    compile for; BundleError where the bundle cannot be written.
    """
    capabilities = sorted({capability_of(target) for target in targets})
    try:
        import triton
    except ModuleNotFoundError:
        raise ConfigError(
            "kernels are compiled with Triton, and it is not installed: pip install 'sfrt[cuda]'"
        ) from None
    from sfrt_export.rehearsal import launches_of

    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, with which Triton compiles nothing; unset it")
    launches = launches_of(bundle.manifest, dtype)
    for capability in capabilities:
        bundle = _with(bundle, launches, capability, triton.__version__, dtype, progress)
    return bundle


def _with(
    bundle: Bundle, launches: Iterable[Launch], capability: int, triton: str, dtype: DTypeName, progress: Progress
) -> Bundle:
    """The bundle with the kernels of these launches for one compute capability."""
    stored = _compiled(launches, capability, progress)
    kernels = KernelSet(architecture_of(capability), triton, dtype, tuple(kernel.name for kernel in stored))
    content = {
        f"{stem}.{suffix}": data
        for stem, kernel in zip(kernels.stems, stored, strict=True)
        for suffix, data in kernel.content.items()
    }
    others = [each for each in bundle.manifest.kernels if each.architecture != kernels.architecture]
    return extend(bundle, replace(bundle.manifest, kernels=(*others, kernels)), content)


def _compiled(launches: Iterable[Launch], capability: int, progress: Progress) -> list[StoredKernel]:
    """Each kernel that these launches need once, by name."""
    from sfrt.ops.triton_kernels.stored import store

    specialised = [launch.specialised(capability) for launch in launches if launch.needs <= capability]
    wanted = {(each.source.fn, each.key): each for each in specialised}
    stored = {}
    for done, each in enumerate(wanted.values(), start=1):
        try:
            kernel = store(each)
        except Exception as error:  # Triton's compiler raises what it likes
            raise DeviceError(
                f"the kernel {each.source.fn.__name__} does not compile for {architecture_of(capability)}: {error}"
            ) from error
        stored[kernel.name] = kernel
        progress("kernels", done, len(wanted))
    return [stored[name] for name in sorted(stored)]
