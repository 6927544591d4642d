"""A bundle's parts as ONNX graphs in standard operators; sfrt.graphs names their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from sfrt.bundle import DTypeName
from sfrt.config import DecoderConfig, ModelConfig, TaehvConfig, Umt5Config
from sfrt.errors import ConfigError
from sfrt.graphs import GraphName, graph_file
from sfrt_export.onnx_graph import taehv, wan_vae
from sfrt_export.onnx_graph.builder import ExternalWeights
from sfrt_export.onnx_graph.text_encoder import text_encoder_graph
from sfrt_export.onnx_graph.transformer import flow_graph, modulation_graph, refresh_graph, step_graph, text_kv_graph

Graphs = Iterator[tuple[GraphName, onnx.ModelProto]]


def transformer_graphs(config: ModelConfig, folder: Path, dtype: DTypeName) -> Graphs:
    """The graphs over transformer.safetensors in the folder."""
    weights = ExternalWeights(folder / "transformer.safetensors")
    yield "refresh", refresh_graph(config, weights, dtype, masked=False)
    yield "refresh_masked", refresh_graph(config, weights, dtype, masked=True)
    yield "flow", flow_graph(config, weights, dtype, masked=False)
    yield "flow_masked", flow_graph(config, weights, dtype, masked=True)
    yield "step", step_graph(config, weights, dtype)
    yield "modulation", modulation_graph(config, weights, dtype)
    yield "text_kv", text_kv_graph(config, weights, dtype)


def decoder_graphs(config: DecoderConfig, folder: Path, dtype: DTypeName) -> Graphs:
    """The graphs over decoder.safetensors in the folder."""
    weights = ExternalWeights(folder / "decoder.safetensors")
    if isinstance(config, TaehvConfig):
        yield "decoder_first", taehv.decoder_graph(config, weights, dtype, first=True)
        yield "decoder", taehv.decoder_graph(config, weights, dtype, first=False)
        yield "encoder_first", taehv.encoder_graph(config, weights, dtype, first=True)
        yield "encoder", taehv.encoder_graph(config, weights, dtype, first=False)
    else:
        yield "decoder_first", wan_vae.decoder_graph(config, weights, dtype, first=True)
        yield "decoder", wan_vae.decoder_graph(config, weights, dtype, first=False)
        yield "encoder_first", wan_vae.encoder_graph(config, weights, dtype, first=True)
        yield "encoder", wan_vae.encoder_graph(config, weights, dtype, first=False)


def text_encoder_graphs(config: Umt5Config, text_len: int, folder: Path, dtype: DTypeName) -> Graphs:
    """The graph over text_encoder.safetensors in the folder."""
    weights = ExternalWeights(folder / "text_encoder.safetensors")
    yield "text_encoder", text_encoder_graph(config, text_len, weights, dtype)


def write_graphs(graphs: Graphs, folder: Path, dtype: DTypeName) -> list[str]:
    """Write the graphs beside their weights, each fully checked; the names of their files.

    Raises ConfigError for a graph that ONNX's own checker finds fault with.
    """
    names = []
    for name, model in graphs:
        file = folder / graph_file(name, dtype)
        file.write_bytes(model.SerializeToString())
        try:
            onnx.checker.check_model(file, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ConfigError(f"the graph {file.name} of this model is not valid ONNX ({error}); report it") from None
        names.append(file.name)
    return names
