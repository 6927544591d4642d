"""What a model and a stream take, stated before anything is allocated: arithmetic on a manifest, without torch.

Weights, rings and decoder states are exact, up to the headers of files; the work space is what the largest moment of a
pass or of a decode was seen to hold (tests/test_memory.py measures it again).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from sfrt.backends import Grid
from sfrt.bundle.manifest import DTypeName, Manifest, dtype_beside
from sfrt.config import ModelConfig, StreamConfig, TaehvConfig, WanVaeConfig
from sfrt.ring import BlockRing, Ring, chunk_sizes, ring_for

if TYPE_CHECKING:
    import torch

FRAMES_WITHOUT_WINDOW = 21
"""Latent frames of the clips that models without a window were trained on."""

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

_CELL = 8
"""Pixels along one side of a latent."""
_PAST = 2
"""Frames that a causal convolution of the Wan 2.1 VAE keeps."""
_IN_TIME = 4


@dataclass(frozen=True)
class Setting:
    """What a model runs on, as far as memory goes."""

    backend: str
    dtype: str
    on_gpu: bool

    @property
    def bytes(self) -> int:
        """Of a number."""
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Such as "8.91 GiB: transformer 2.64 GiB, ring 5.62 GiB, work space 663.0 MiB"."""
        return f"{in_words(self.total)}: {self.listed()}"

    def listed(self) -> str:
        """Its parts alone."""
        return ", ".join(f"{name} {in_words(size)}" for name, size in self.parts.items())

    def __or__(self, other: Need) -> Need:
        return Need({**self.parts, **other.parts})

    def without(self, *names: str) -> Need:
        """Less these parts."""
        return Need({name: size for name, size in self.parts.items() if name not in names})

    def require(self, what: str, device: torch.device) -> None:
        """Raise DeviceError, part by part, where so much cannot be had on the device."""
        from sfrt.device import require_memory

        require_memory(self.total, what, device, parts=self.listed())


def in_words(size: int) -> str:
    """MiB below a GiB, so that a small model's parts are not all 0.00."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def whole_need(manifest: Manifest, stream: StreamConfig, setting: Setting, text_encoder: bool = True) -> Need:
    """All that a stream of these settings takes with its model, and with the text encoder where that is kept by it."""
    reading = text_encoder_need(manifest) if text_encoder else Need({})
    return weights_need(manifest, setting) | stream_need(manifest, stream, setting) | reading


def weights_need(manifest: Manifest, setting: Setting) -> Need:
    """The model's weights in the dtype that they run in; the autoencoder's as stored, which is no less."""
    growth = setting.bytes / ITEM_BYTES[manifest.dtype]
    if manifest.quantization is not None:  # a byte a weight, which ONNX Runtime has no products for: it unfolds them
        growth = setting.bytes if setting.backend.startswith("onnx") else 1.0
    parts = {"transformer": round(_file_bytes(manifest, "transformer") * growth)}
    if manifest.decoder is not None:
        parts["decoder"] = _file_bytes(manifest, "decoder")
    return Need(parts)


def text_encoder_need(manifest: Manifest) -> Need:
    """The text encoder's weights, which stay as they are stored; nothing where there is none.

    Of a quantised one, its widest layer as well: while it runs, that is there in float32 and in 16 bits.
    """
    size, config = _file_bytes(manifest, "text_encoder"), manifest.text_encoder
    parts = {"text encoder": size} if size else {}
    if config is not None and manifest.text_quantization is not None:
        parts["text layer"] = 6 * config.dim * max(config.dim_attn, config.dim_ffn)
    return Need(parts)


def stream_need(manifest: Manifest, stream: StreamConfig, setting: Setting, ring: Ring | None = None) -> Need:
    """What one stream takes beside the weights; ring is its own where it is limited and so may be a shorter one.

    Raises ConfigError where there can be no such stream.
    """
    model, grid = manifest.model, Grid.of(manifest.model, stream)
    ring = ring or ring_for(stream, FRAMES_WITHOUT_WINDOW if stream.window is None else None)
    slots = ring.slots if setting.backend == "torch" else BlockRing(ring, chunk_sizes(stream)).slots
    scores = model.num_heads * stream.chunk * slots * grid.tokens**2 * 4 if setting.backend.startswith("onnx") else 0
    captured = _pass_bytes(model, stream.chunk * grid.tokens, setting.bytes)
    work = captured + scores
    item = setting.bytes
    if ring.dtype == "float8":
        item = 1
        if not setting.on_gpu:  # plain torch puts a layer's keys and values into the model's dtype
            work += 2 * slots * grid.tokens * model.dim * setting.bytes
    parts = {"ring": ring_bytes(model, ring, slots, grid.tokens, item)}
    parts["prompt"] = 2 * model.num_layers * model.text_len * model.dim * setting.bytes
    if manifest.decoder is not None:
        config = manifest.decoder.config
        size = ITEM_BYTES[dtype_beside(config, cast("DTypeName", setting.dtype), on_gpu=setting.on_gpu)]
        height, width = stream.height // _CELL, stream.width // _CELL
        state = decoder_state_values(config, height, width) * size
        decode = _decode_bytes(config, stream.chunk, stream.height * stream.width, size)
        parts["decoder state"] = 2 * state  # that before a chunk is there until the chunk is delivered
        captured += decode + 2 * state if isinstance(config, TaehvConfig) else 0
        work = work + decode if setting.on_gpu else max(work, decode)  # there a refresh pass runs beside it
    if setting.on_gpu and setting.backend == "torch":
        parts["graphs"] = captured  # memory that is theirs between their runs, too
    return Need({**parts, "work space": work})


def ring_bytes(model: ModelConfig, ring: Ring, slots: int, tokens: int, item: int) -> int:
    """Keys and values of every layer, and of sinks that move along the frame axis their keys as they were written."""
    frame = model.num_layers * model.num_heads * tokens * item
    moving = ring.sink * 2 * model.rotary_pairs[0] if ring.positions == "window" else 0
    return frame * (2 * slots * model.head_dim + moving)


def decoder_state_values(config: TaehvConfig | WanVaeConfig, height: int, width: int) -> int:
    """Numbers in the state that a decoder carries between two chunks of latents [height, width]."""
    area = height * width
    if isinstance(config, TaehvConfig):  # a frame for each of three blocks a stage
        return sum(3 * channels * area * 4**stage for stage, channels in enumerate(config.decoder_widths[:3]))
    return sum(_PAST * channels * area * 4**level for channels, level in _causal_inputs(config))


def _causal_inputs(config: WanVaeConfig) -> list[tuple[int, int]]:
    """(channels, times that the size was doubled) of what each causal convolution of the decoder reads, in order."""
    widths = [config.dim * factor for factor in reversed(config.dim_mult)]
    channels = widths[0]
    inputs = [(config.latent_channels, 0), *[(channels, 0)] * 4]  # the first one, and two blocks in the middle
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks + 1):
            inputs += [(channels, level), (width, level)]
            channels = width
        if level < len(widths) - 1:
            if tuple(reversed(config.temporal_downsample))[level]:
                inputs.append((channels, level))
            channels //= 2
    return [*inputs, (channels, len(widths) - 1)]


def _pass_bytes(model: ModelConfig, tokens: int, item: int) -> int:
    """The largest moment of a pass: the feed-forward's hidden features, or queries, keys and values while they turn."""
    return tokens * item * (9 * model.dim + max(model.ffn_dim, 5 * model.dim))


def _decode_bytes(config: TaehvConfig | WanVaeConfig, chunk: int, pixels: int, item: int) -> int:
    """The largest moment of a decode, which is at full size; pixels come in float32, and once more as they leave."""
    widest = max(config.decoder_widths[2:]) if isinstance(config, TaehvConfig) else 3 * config.dim
    return chunk * _IN_TIME * pixels * (2 * widest * item + 2 * 3 * 4)


def _file_bytes(manifest: Manifest, part: str) -> int:
    info = manifest.files.get(f"{part}.safetensors")
    return 0 if info is None else info.bytes
