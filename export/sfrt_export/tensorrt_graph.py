"""A bundle's ONNX graphs as TensorRT's parser takes them, and the sizes that plans are built for. No TensorRT needed.

A ring fills while a stream starts, and a pass attends to its first VALID tokens alone. The parser does not take ONNX
Attention's nonpad_kv_seqlen, which says that (onnx-tensorrt, docs/operators.md); it leaves it out without a word. What
TensorRT has instead is IAttention.key_value_lengths: it would need no profiles at all, but users report kernels that
read the cache beyond it, and nothing here could show that ours do not. So attention is given a slice of the ring, and
VALID, the slice's end, is an input on the host (a shape tensor). Two optimisation profiles are enough for any ring:
one for the full ring, which is where a stream stays, with every size exact; one for whatever comes before. One each
for every fill would be built as many times longer, to speed up a few chunks at the start of a stream.

Rings in which what is visible has holes run the …_masked graphs: a mask over the whole ring from the first chunk on,
and profiles for the lengths of chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sfrt import graphs
from sfrt.backends import Grid
from sfrt.backends.tensorrt.plans import Profile, Range
from sfrt.config import ModelConfig, StreamConfig
from sfrt.decoders import ENCODED_TOGETHER
from sfrt.errors import ConfigError
from sfrt.graphs import GraphName
from sfrt.ring import BlockRing, ChunkSizes, chunk_sizes, ring_for
from sfrt.timesteps import timesteps_of

_VALID_INPUT = 6
"""Where ONNX Attention has nonpad_kv_seqlen."""

_START, _AXIS = "slice_start", "slice_axis"
_INTEGERS = {_START: 0, _AXIS: 2}

_MORE_STEPS = 16
"""Tables of as many timesteps are taken too: a schedule can be changed without building plans again."""


@dataclass(frozen=True)
class StreamSizes:
    """Every size of a stream that plans are built for.

    frame is a latent frame's tokens, height and width its cells; chunks and rings count latent frames. Only a stream's
    first chunk is shorter than `chunk`, at least `shortest`. ring is None where no stream has a ring without holes,
    masked_ring where none has one with them.
    """

    frame: int
    height: int
    width: int
    chunk: int
    shortest: int
    ring: int | None
    masked_ring: int | None
    steps: int
    text_len: int

    @classmethod
    def of(
        cls, model: ModelConfig, stream: StreamConfig, frames: int | None = None, *, any_start: bool = False
    ) -> StreamSizes:
        """A model's stream; frames limits its length in latent frames.

        any_start adds streams that go on from pictures or clips, however many frames those have. Raises ConfigError
        for a stream without window and without limit.
        """
        grid, ring, own = Grid.of(model, stream), ring_for(stream, frames), chunk_sizes(stream)
        firsts = {own.first, *(range(1, own.later + 1) if any_start else ())}
        blocks = [BlockRing(ring, ChunkSizes(first, own.later)) for first in firsts]
        _, rows, columns = model.patch_size
        return cls(
            frame=grid.tokens,
            height=grid.rows * rows,
            width=grid.columns * columns,
            chunk=own.later,
            shortest=min(firsts),
            ring=max((block.slots for block in blocks if not block.has_holes), default=None),
            masked_ring=max((block.slots for block in blocks if block.has_holes), default=None),
            steps=len(timesteps_of(stream)),
            text_len=model.text_len,
        )

    def passes(self) -> tuple[GraphName, ...]:
        """The graphs that a stream's passes run."""
        plain: tuple[GraphName, ...] = ("refresh", "flow") if self.ring else ()
        masked: tuple[GraphName, ...] = ("refresh_masked", "flow_masked") if self.masked_ring else ()
        return (*plain, *masked)


def profiles_of(graph: GraphName, sizes: StreamSizes) -> tuple[Profile, ...]:
    """What a graph's plan serves, the most used first; sizes that the graph does not have may be among them."""
    steps = {"steps": (1, sizes.steps, max(sizes.steps, _MORE_STEPS))}
    chunk, shortest = sizes.chunk * sizes.frame, sizes.shortest * sizes.frame
    if graph in ("refresh", "flow", "step") and sizes.ring is not None:
        room = sizes.ring * sizes.frame
        passes = {**steps, "tokens": _exactly(chunk), "ring": _exactly(room)}
        full = [{**passes, graphs.VALID: _exactly(room)}]
        filling = [{**passes, graphs.VALID: (chunk, room - chunk, room - chunk)}] if room > chunk else []
        return (*full, *filling)
    if graph in ("refresh_masked", "flow_masked") and sizes.masked_ring is not None:
        passes = {**steps, "ring": _exactly(sizes.masked_ring * sizes.frame)}
        shorter = [{**passes, "tokens": (shortest, shortest, chunk - sizes.frame)}] if shortest < chunk else []
        return ({**passes, "tokens": _exactly(chunk)}, *shorter)
    if graph == "modulation":
        return (steps,)
    if graph == "text_encoder":
        return ({"length": (1, min(64, sizes.text_len), sizes.text_len)},)
    if graph in graphs.OF_PART["decoder"]:
        return ({**_cells(sizes), **_clips(sizes)[graph]},)
    return ({},)


def _exactly(size: int) -> Range:
    return (size, size, size)


def _clips(sizes: StreamSizes) -> dict[GraphName, Profile]:
    """How many frames an autoencoder is given; a video's first latent frame is one pixel frame, each later one four."""
    chunk, together = sizes.chunk, ENCODED_TOGETHER
    return {
        "decoder_first": {"frames": (sizes.shortest, chunk, chunk)},
        "decoder": {"frames": _exactly(chunk)},
        "encoder_first": {"pixel_frames": (1, 4 * together - 3, 4 * together - 3)},
        "encoder": {"pixel_frames": (4, 4 * together, 4 * together)},
    }


def _cells(sizes: StreamSizes) -> Profile:
    scales = {"": 1, "_x2": 2, "_x4": 4, "_x8": 8}
    sides = {"height": sizes.height, "width": sizes.width}
    return {side + name: _exactly(cells * scale) for side, cells in sides.items() for name, scale in scales.items()}


def size_axes(model: ModelProto) -> dict[str, tuple[str, int]]:
    """Every named size of the graph's inputs, with an input and an axis where it is found."""
    axes: dict[str, tuple[str, int]] = {}
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                axes.setdefault(dim.dim_param, (value.name, axis))
    return axes


def own_profiles(model: ModelProto, profiles: tuple[Profile, ...]) -> tuple[Profile, ...]:
    """The profiles without what this graph does not have. Raises ConfigError for a size that they lack."""
    axes = size_axes(model)
    names = {*axes, *(value.name for value in model.graph.input)}
    for name in axes:
        if name not in profiles[0]:
            raise ConfigError(f"the graph {model.graph.name} has a size {name!r} that no stream setting gives")
    return tuple({name: sizes for name, sizes in profile.items() if name in names} for profile in profiles)


def for_parser(model: ModelProto, profiles: tuple[Profile, ...]) -> ModelProto:
    """A copy of the graph that computes the same in words that TensorRT's parser knows.

    Sizes that all profiles agree on become numbers, as the rings' have to be, and attention sees slices of the rings.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    _fix_sizes(copy, {name: sizes[0] for name, sizes in profiles[0].items() if _is_fixed(name, profiles)})
    _slice_rings(copy)
    return copy


def input_shapes(model: ModelProto, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes that inputs with named sizes have at these."""
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if any(dim.dim_param for dim in dims):
            shapes[value.name] = tuple(sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims)
    return shapes


def casts_weights(model: ModelProto) -> bool:
    """Whether the graph computes in another dtype than some of its weights are stored in."""
    stored = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    return any(node.op_type == "Cast" and node.input[0] in stored for node in model.graph.node)


def _is_fixed(name: str, profiles: tuple[Profile, ...]) -> bool:
    least, _, greatest = profiles[0][name]
    return least == greatest and all(profile[name] == profiles[0][name] for profile in profiles)


def _fix_sizes(model: ModelProto, sizes: Mapping[str, int]) -> None:
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _slice_rings(model: ModelProto) -> None:
    """Attention(q, k, v, …, valid) → Attention(q, k[:, :, :valid], v[:, :, :valid])"""
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Attention" and len(node.input) > _VALID_INPUT:
            valid = node.input[_VALID_INPUT]
            for index in (1, 2):
                nodes.append(_prefix(node.input[index], valid))
                node.input[index] = nodes[-1].output[0]
            del node.input[3:]
        nodes.append(node)
    if len(nodes) == len(model.graph.node):
        return
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(np.array([n]), name) for name, n in _INTEGERS.items())


def _prefix(ring: str, valid: str) -> NodeProto:
    return helper.make_node("Slice", [ring, _START, valid, _AXIS], [f"{ring}.{valid}"], name=f"{ring}.{valid}")
