"""The exported graphs: their files, their inputs, their outputs. Export writes them, backends bind them.

Every graph exists once per dtype it computes in, as NAME.DTYPE.onnx beside the safetensors file that holds its weights.
Shapes: L tokens of a chunk, R tokens that the ring has room for, N steps, S text slots, H heads of d, P token features,
D model features; C × h × w latents; B = 1 throughout.

    refresh           a pass over a chunk as far as the last layer's keys and values: all that a refresh pass is
    flow              what a denoising pass does after that, with what refresh has left for it
    step              both in one, a whole denoising pass: for other runtimes, as sfrt runs the two
    …_masked          refresh and flow for rings in which what is visible is not simply the first so many tokens
    modulation        timestep embeddings → the adaptive norms of every layer
    text_kv           prompt embeddings → every layer's text keys and values
    text_encoder      token ids → prompt embeddings
    decoder_first     the first chunk of a video → pixels, state
    decoder           a later chunk and the state before it → pixels, state
    encoder_first, encoder    the same from pixels to latents

No weight of the transformer is in two graphs that a stream runs: ONNX Runtime packs a graph's weights for its kernels
and TensorRT builds them into its plan, so that what two graphs had in common would lie in memory twice.
"""

from __future__ import annotations

from typing import Final, Literal

GraphName = Literal[
    "refresh",
    "refresh_masked",
    "flow",
    "flow_masked",
    "step",
    "modulation",
    "text_kv",
    "text_encoder",
    "decoder_first",
    "decoder",
    "encoder_first",
    "encoder",
]

OF_PART: Final[dict[str, tuple[GraphName, ...]]] = {
    "transformer": ("refresh", "refresh_masked", "flow", "flow_masked", "step", "modulation", "text_kv"),
    "decoder": ("decoder_first", "decoder", "encoder_first", "encoder"),
    "text_encoder": ("text_encoder",),
}
"""The graphs of each part of a bundle; they refer to the weights in PART.safetensors."""

Kind = Literal["k", "v"]
KINDS: tuple[Kind, Kind] = ("k", "v")

OPSET: Final = 24

# inputs of refresh and step; flow has all but the tokens and where to write, the rings and text of the last layer
TOKENS: Final = "tokens"  # float32 [L, P]
STEP: Final = "step"  # int64 []: row of the modulation tables
ROTARY_COS: Final = "rotary_cos"  # float32 [1, L, d/2]
ROTARY_SIN: Final = "rotary_sin"
WRITE_AT: Final = "write_at"  # int64 [1]: the ring's token where the chunk's first one goes
VALID: Final = "valid"  # int64 [1]: how many of the ring's first tokens are visible
VISIBLE: Final = "visible"  # bool [1, R], in the masked variants instead of it

# refresh's outputs beside the rings, and inputs of flow
HIDDEN: Final = "hidden"  # [L, D]: what comes into the last layer
QUERIES: Final = "queries"  # [L, D]: that layer's, before their norm

# flow's and step's output
FLOW: Final = "flow"  # float32 [L, P]

# modulation; its outputs are inputs of refresh and flow
TIMESTEP_EMBEDDING: Final = "timestep_embedding"  # float32 [N, freq_dim]
MODULATION_BLOCKS: Final = "modulation_blocks"  # [N, 6 · layers, D]
MODULATION_HEAD: Final = "modulation_head"  # [N, 2, D]

# text_encoder and text_kv
TOKEN_IDS: Final = "token_ids"  # int64 [1, S'], without padding
EMBEDS: Final = "embeds"  # float32 [S, text_dim]

# decoder and encoder; state tensors are state.0, state.1, …, and come out as next_state.0, …
LATENTS: Final = "latents"  # float32 [1, T, C, h, w]
PIXELS: Final = "pixels"  # float32 [1, F, 3, H, W] in [0, 1]


def ring_in(kind: Kind, layer: int) -> str:
    """A layer's ring before the pass, [1, H, R, d]."""
    return f"ring_{kind}.{layer}"


def ring_out(kind: Kind, layer: int) -> str:
    """The same ring after it; bound to the same memory, so that it is written in place."""
    return f"ring_{kind}_out.{layer}"


def text(kind: Kind, layer: int) -> str:
    """A layer's text keys or values, [1, H, S, d]: out of text_kv, into refresh and flow."""
    return f"text_{kind}.{layer}"


def state_in(index: int) -> str:
    """What a decoder or encoder carries from chunk to chunk, in running order."""
    return f"state.{index}"


def state_out(index: int) -> str:
    """What it leaves for the next chunk."""
    return f"next_state.{index}"


def graph_file(name: GraphName, dtype: str) -> str:
    """The graph's file in a bundle."""
    return f"{name}.{dtype}.onnx"


def graph_files(part: str, dtype: str) -> tuple[str, ...]:
    """The files of all graphs of a bundle's part in one dtype."""
    return tuple(graph_file(name, dtype) for name in OF_PART[part])
