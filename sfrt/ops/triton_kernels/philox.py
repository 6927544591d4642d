"""The normals of sfrt.noise, made in a kernel's registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(seed, first_frame, frame, step, group):
    """Philox's four words for a block of counters, uint32: those of `group` in a frame counted from the first."""
    number = (tl.load(first_frame) + frame).to(tl.uint32)
    return tl.philox(tl.load(seed), group, number, step, 0)


@triton.jit
def _normal_pair(first, second):
    radius = tl.sqrt_rn(-2.0 * tl.log(tl.maximum(tl.uint_to_uniform_float(first), 1.0e-7)))
    angle = 6.283185307179586 * tl.uint_to_uniform_float(second)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, first_frame, frame, step, group):
    """Elements 4i to 4i + 3 of a frame for each i of a block `group`, in order, float32."""
    w0, w1, w2, w3 = words(seed, first_frame, frame, step, group)
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
