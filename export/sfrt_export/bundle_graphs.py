"""The ONNX graphs of a whole bundle; the libraries that make them are imported when they are asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sfrt.bundle import Manifest
from sfrt.errors import ConfigError


def bundle_graphs(manifest: Manifest, folder: Path) -> list[str]:
    """Write the ONNX graphs that the manifest names, for all its parts, beside their weights; the files' names."""
    from sfrt_export.onnx_graph import decoder_graphs, text_encoder_graphs, transformer_graphs, write_graphs

    model, decoder, text = manifest.model, manifest.decoder, manifest.text_encoder
    names = []
    for dtype in manifest.graphs:
        names += write_graphs(transformer_graphs(model, folder, dtype), folder, dtype)
        if text is not None and dtype in manifest.graph_dtypes("text_encoder"):
            names += write_graphs(text_encoder_graphs(text, model.text_len, folder, dtype), folder, dtype)
    if decoder is not None:
        for dtype in manifest.graph_dtypes("decoder"):
            names += write_graphs(decoder_graphs(decoder.config, folder, dtype), folder, dtype)
    return names


def require_onnx() -> None:
    """Raise ConfigError where the libraries that graphs are made with are missing."""
    for library in ("onnx", "onnx_ir"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(f"ONNX graphs are made with the library {library}; install it: pip install sfrt[onnx]")
