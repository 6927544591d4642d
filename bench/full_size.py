"""`python -m bench.full_size`: a random-weight 1.3B checkpoint in the published layout, exported with its ONNX graphs.

Time and peak memory of each stage, in a process of its own: the export; one denoising pass of the exported graphs at a
small resolution against the torch backend's, both in float32; and the bundle quantised to int8 with its quality gate.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sfrt.backends import Grid
from sfrt.backends.loading import transformer_of
from sfrt.benchmark.protocol import environment
from sfrt.bundle import Bundle
from sfrt.bundle.quantization import Method
from sfrt.config import ModelConfig, StreamConfig
from sfrt.machine import peak_memory
from sfrt.ring import chunk_sizes, ring_for
from sfrt_export.export import export_checkpoint
from sfrt_export.layout import published_shapes
from sfrt_export.quantized_bundle import quantize_bundle

SMALL: dict[str, Any] = {"height": 32, "width": 48, "window": 6}
STREAM = StreamConfig(**SMALL)
METHOD: Method = "int8"
TIMESTEP = 750.0


def main() -> None:
    """Run all stages, or the one named, which is how they come to processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    parser.add_argument("--folder", type=Path, help="for checkpoint and bundles, 10 GB; a temporary one by default")
    parser.add_argument("--without-gate", action="store_true", help="leave out what takes 20 minutes on one core")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        print(json.dumps(run(arguments.stage, arguments.folder)))
        return
    surroundings = environment("cpu")
    with TemporaryDirectory(dir=arguments.folder) as folder:
        stages = [stage for stage in STAGES if stage != "quantize" or not arguments.without_gate]
        figures = {stage: in_own_process(stage, Path(folder)) for stage in stages}
        size = (Path(folder) / "model.pt").stat().st_size
        difference = relative_difference(Path(folder))
        quality = {"quantized": quality_of(Path(folder))} if "quantize" in stages else {}
    report = {
        "environment": surroundings,
        "model": str(ModelConfig()),
        "checkpoint_bytes": size,
        "peak_over_file": (figures["export"]["peak_bytes"] - figures["export"]["before_bytes"]) / size,
        "stages": figures,
        "step_onnx_against_torch": {"relative_error": difference, "height": STREAM.height, "width": STREAM.width},
        **quality,
    }
    print(json.dumps(report, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def in_own_process(stage: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.full_size", "--stage", stage, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def run(stage: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of one stage; what was taken before it, by imports, apart."""
    before, started = peak_memory(), time.perf_counter()
    STAGES[stage](folder)
    return {
        "seconds": time.perf_counter() - started,
        "before_bytes": before or math.nan,
        "peak_bytes": peak_memory() or math.nan,
    }


def make(folder: Path) -> None:
    """Normals in bfloat16 under published names: products scaled by fan-in, biases small, norms about one."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in published_shapes(ModelConfig()).items():
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.02 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        weights[name] = (middle + torch.randn(shape, generator=generator) * scale).bfloat16()
    torch.save({"generator_ema": weights}, folder / "model.pt")


def export(folder: Path) -> None:
    export_checkpoint(
        folder / "model.pt", folder / "bundle", family="self-forcing", ema=True, stream=SMALL, onnx=("float32",)
    )


def with_torch(folder: Path) -> None:
    one_pass(folder, "torch")


def with_onnx(folder: Path) -> None:
    one_pass(folder, "onnx")


def one_pass(folder: Path, backend: str) -> None:
    """Two chunks: the second one's pass sees the first in the ring. The flow goes to a file."""
    generator = torch.Generator().manual_seed(1)
    bundle = Bundle.open(folder / "bundle", verify=False)
    model, ring = bundle.manifest.model, ring_for(STREAM)
    grid = Grid.of(model, STREAM)
    running = transformer_of(bundle, backend, torch.device("cpu"), torch.float32, verify=False)
    rollout = running.rollout(grid, ring, chunk_sizes(STREAM), (TIMESTEP, 0.0))
    rollout.set_text(torch.randn(model.text_len, model.text_dim, generator=generator))
    chunks = torch.randn(2, STREAM.chunk * grid.tokens, model.token_dim, generator=generator)
    rollout.place(ring.plan(0, STREAM.chunk))
    rollout.refresh(chunks[0], 0.0)
    rollout.place(ring.plan(STREAM.chunk, STREAM.chunk))
    torch.save(rollout.flow(chunks[1], TIMESTEP).float().clone(), folder / f"{backend}.flow")


def quantize(folder: Path) -> None:
    """With the whole gate, at the bundle's own small resolution."""
    quantize_bundle(Bundle.open(folder / "bundle"), folder / METHOD, METHOD)


STAGES = {"make": make, "export": export, "torch": with_torch, "onnx": with_onnx, "quantize": quantize}


def relative_difference(folder: Path) -> float:
    flow = {backend: torch.load(folder / f"{backend}.flow", weights_only=True) for backend in ("torch", "onnx")}
    return float((flow["onnx"] - flow["torch"]).norm() / flow["torch"].norm())


def quality_of(folder: Path) -> dict[str, Any]:
    """What the gate found, as the quantised bundle's manifest has it."""
    bundle = Bundle.open(folder / METHOD, verify=False)
    found = bundle.manifest.quantization
    assert found is not None
    worst = max(found.layers, key=found.layers.__getitem__)
    return {
        "method": found.method,
        "transformer_bytes": bundle.manifest.files["transformer.safetensors"].bytes,
        "layers": len(found.layers),
        "flow_error": found.quality.flow_error,
        "latent_error": found.quality.latent_error,
        "worst_layer": {worst: found.layers[worst]},
    }


if __name__ == "__main__":
    main()
