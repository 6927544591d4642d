"""Every op there is, for those who go through all of them: tests, benchmarks, the doctor."""

from __future__ import annotations

from typing import Any

from sfrt.ops.attention import ATTENTION, ATTENTION_FLOAT8
from sfrt.ops.causal_input import CAUSAL_INPUT
from sfrt.ops.denoise import DENOISE, FINISH
from sfrt.ops.epilogue import EPILOGUE
from sfrt.ops.frames import FRAMES
from sfrt.ops.gelu import GELU, GELU_FLOAT8, QUANTIZE_ROWS
from sfrt.ops.interleave import INTERLEAVE
from sfrt.ops.memory_input import MEMORY_INPUT
from sfrt.ops.modulate import MODULATE, MODULATE_FLOAT8
from sfrt.ops.noise import NOISE
from sfrt.ops.op import Op
from sfrt.ops.qk_norm import QK_NORM
from sfrt.ops.rolling_kv import ROLLING_KV, ROLLING_KV_FLOAT8
from sfrt.ops.upsample import UPSAMPLE

OPS: tuple[Op[..., Any], ...] = (
    ROLLING_KV,
    ROLLING_KV_FLOAT8,
    QK_NORM,
    ATTENTION,
    ATTENTION_FLOAT8,
    MODULATE,
    MODULATE_FLOAT8,
    GELU,
    GELU_FLOAT8,
    QUANTIZE_ROWS,
    CAUSAL_INPUT,
    EPILOGUE,
    INTERLEAVE,
    MEMORY_INPUT,
    UPSAMPLE,
    NOISE,
    DENOISE,
    FINISH,
    FRAMES,
)
