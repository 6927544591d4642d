"""Graphs as TensorRT's parser takes them, and the sizes of plans: all of it without TensorRT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfrt import graphs
from sfrt.backends.tensorrt.plans import PlanInfo, Target, shortest_ring
from sfrt.bundle import Bundle, DTypeName, Manifest
from sfrt.config import ModelConfig, StreamConfig, WanVaeConfig
from sfrt.decoders.wan_vae import WanVae
from sfrt.errors import ConfigError
from sfrt.ring import BlockRing, ChunkSizes, ring_for

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from sfrt_export import onnx_graph  # noqa: E402
from sfrt_export.tensorrt_graph import StreamSizes, casts_weights, for_parser, own_profiles, profiles_of  # noqa: E402
from sfrt_export.tensorrt_operators import refusals  # noqa: E402

DTYPES: tuple[DTypeName, ...] = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


def test_the_parser_takes_every_graph(manifest: Manifest, tiny_bundle: Path, tmp_path: Path) -> None:
    vae = WanVaeConfig(dim=4, latent_channels=4, num_res_blocks=1, mean=(0.0,) * 4, std=(1.0,) * 4)
    save_file(WanVae(vae).state_dict(), tmp_path / "decoder.safetensors")
    assert manifest.decoder is not None and manifest.text_encoder is not None
    sizes = StreamSizes.of(manifest.model, manifest.stream, any_start=True)
    seen = set()
    for dtype in DTYPES:
        for name, model in (
            *onnx_graph.transformer_graphs(manifest.model, tiny_bundle, dtype),
            *onnx_graph.decoder_graphs(manifest.decoder.config, tiny_bundle, dtype),
            *(onnx_graph.decoder_graphs(vae, tmp_path, dtype) if dtype == "bfloat16" else ()),  # slow to make
            *onnx_graph.text_encoder_graphs(manifest.text_encoder, manifest.model.text_len, tiny_bundle, dtype),
        ):
            assert refusals(for_parser(model, own_profiles(model, profiles_of(name, sizes)))) == [], name
            seen.add(name)
    assert seen == {name for names in graphs.OF_PART.values() for name in names}


def test_as_exported_rings_would_be_refused(manifest: Manifest, tiny_bundle: Path) -> None:
    found = refusals(dict(onnx_graph.transformer_graphs(manifest.model, tiny_bundle, "float32"))["refresh"])
    assert any("nonpad_kv_seqlen" in reason for reason in found)
    assert any("the length of the cache must be a number" in reason for reason in found)


def node_model(kind: str, ranks: list[int], dtype: int = 1, opset: int = 24, **attributes: Any) -> Any:
    """A graph of one node."""
    inputs = [onnx.helper.make_tensor_value_info(f"x{i}", dtype, [2] * rank) for i, rank in enumerate(ranks)]
    node = onnx.helper.make_node(kind, [value.name for value in inputs], ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "one", inputs, [onnx.helper.make_empty_tensor_value_info("y")])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (node_model("Relu", [2]), None),
        (node_model("Relu", [2], opset=26), "opset 26"),
        (node_model("Det", [2]), "not among the operators"),
        (node_model("Conv", [4, 4], dtype=11), "does not take DOUBLE"),
        (node_model("Attention", [4, 4, 4, 2]), "4 dimensions"),
        (node_model("Attention", [4, 4, 4], softcap=1.0), "softcap"),
        (node_model("TensorScatter", [4, 4, 1], axis=-1), "axis -2"),
        (node_model("TensorScatter", [3, 3, 1]), "4 dimensions"),
        (node_model("TensorScatter", [4, 4, 1], mode="circular"), "linear mode"),
        (node_model("RotaryEmbedding", [4, 2, 2, 2]), "position_ids must be int64"),
        (node_model("Squeeze", [3, 1]), "axes must be a constant"),
        (node_model("Resize", [4, 1, 1], mode="cubic"), "mode b'cubic'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_names_the_reason(model: Any, reason: str | None) -> None:
    found = refusals(model)
    assert found == [] if reason is None else any(reason in one for one in found), found


@pytest.mark.parametrize("graph", ["refresh", "flow"])
def test_slices_of_the_ring_compute_the_same(
    manifest: Manifest, tiny_bundle: Path, tmp_path: Path, graph: graphs.GraphName
) -> None:
    """The graph as the parser is given it, under ONNX Runtime beside the exported one, for every fill of the ring."""
    onnxruntime = pytest.importorskip("onnxruntime")
    shutil.copy(tiny_bundle / "transformer.safetensors", tmp_path)
    exported = dict(onnx_graph.transformer_graphs(manifest.model, tmp_path, "float32"))[graph]
    sizes = StreamSizes.of(manifest.model, manifest.stream)
    rewritten = for_parser(exported, own_profiles(exported, profiles_of(graph, sizes)))
    sessions = []
    for model in (exported, rewritten):
        file = tmp_path / "graph.onnx"
        file.write_bytes(model.SerializeToString())
        sessions.append(onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]))
    assert sizes.ring is not None
    chunk, room = sizes.chunk * sizes.frame, sizes.ring * sizes.frame
    feeds = random_inputs(exported, {"tokens": chunk, "ring": room, "steps": 2})
    for valid in range(chunk, room + 1, chunk):
        places = {"step": np.array(1), "valid": np.array([valid]), "write_at": np.array([valid - chunk])}
        feeds = {name: places.get(name, value) for name, value in feeds.items()}
        for expected, got in zip(*(session.run(None, feeds) for session in sessions), strict=True):
            assert np.allclose(expected, got, atol=1e-5)


def random_inputs(model: Any, sizes: dict[str, int]) -> dict[str, Any]:
    normals = np.random.default_rng(0).standard_normal
    dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    shapes = {name: [sizes.get(dim.dim_param, dim.dim_value) for dim in dims[name]] for name in dims}
    return {name: normals(shape).astype(np.float32) for name, shape in shapes.items()}


@given(st.integers(1, 4), st.integers(0, 9), st.integers(0, 4), st.booleans(), st.data())
def test_profiles_serve_every_pass(chunk: int, more: int, sink: int, any_start: bool, data: st.DataObject) -> None:
    """Whatever chunk a stream comes to, some profile of the graph it runs serves it, and never two."""
    first = data.draw(st.integers(1, chunk))
    stream = StreamConfig(chunk=chunk, first_chunk=first, window=chunk + sink + more, sink=sink, height=32, width=48)
    sizes = StreamSizes.of(ModelConfig(), stream, any_start=any_start)
    starts = range(1, chunk + 1) if any_start else [first]
    blocks = BlockRing(ring_for(stream), ChunkSizes(data.draw(st.sampled_from(starts)), chunk))
    graph: graphs.GraphName = "refresh_masked" if blocks.has_holes else "refresh"
    assert graph in sizes.passes()
    info = PlanInfo(
        graph=graph,
        dtype="float32",
        target=Target("", "", ""),
        graph_sha256="",
        weights_sha256="",
        axes=dict.fromkeys(["tokens", "ring", "steps"], ("", 0)),
        profiles=profiles_of(graph, sizes),
    )
    room = shortest_ring([info], [blocks.sizes.first * sizes.frame, chunk * sizes.frame], blocks.slots * sizes.frame)
    assert room is not None
    for number in range(2 * blocks.slots):
        start = blocks.sizes.start(number)
        plan = blocks.ring.plan(start, blocks.sizes.start(number + 1) - start)
        asked = {"tokens": len(plan.frames) * sizes.frame, "ring": room, "steps": sizes.steps}
        if not blocks.has_holes:
            asked[graphs.VALID] = plan.visible * sizes.frame
        assert len(info.serving(asked)) == 1


def test_weights_of_another_dtype_are_seen(manifest: Manifest, tiny_bundle: Path) -> None:
    """They are stored in float32 here."""
    for dtype in DTYPES:
        model = dict(onnx_graph.transformer_graphs(manifest.model, tiny_bundle, dtype))["refresh"]
        assert casts_weights(model) is (dtype != "float32")


def test_a_stream_without_end_needs_a_limit() -> None:
    stream = StreamConfig(window=None)
    with pytest.raises(ConfigError, match="give it a limit"):
        StreamSizes.of(ModelConfig(), stream)
    assert StreamSizes.of(ModelConfig(), stream, frames=12).ring == 12


def test_a_size_nobody_gives(manifest: Manifest, tiny_bundle: Path) -> None:
    model = dict(onnx_graph.transformer_graphs(manifest.model, tiny_bundle, "float32"))["refresh"]
    with pytest.raises(ConfigError, match="has a size 'tokens' that no stream setting gives"):
        own_profiles(model, ({"steps": (1, 1, 1)},))
