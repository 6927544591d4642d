"""The graphs of autoencoders and text encoder: golden parity under ONNX Runtime, chunk by chunk, and their form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt import graphs
from sfrt.bundle import DTypeName
from sfrt.config import DecoderConfig, TaehvConfig, Umt5Config, WanVaeConfig
from sfrt.decoders import load_decoder
from sfrt.graphs import GraphName
from sfrt.text import Umt5Encoder
from sfrt_export.verify import relative_error, seeded_weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from sfrt.backends.exported_parts import ExportedDecoder, ExportedTextEncoder  # noqa: E402
from sfrt.backends.onnx import OnnxRunner  # noqa: E402
from sfrt_export.onnx_graph import decoder_graphs, text_encoder_graphs, write_graphs  # noqa: E402

CPU = torch.device("cpu")
DTYPES: tuple[DTypeName, ...] = ("float32", "float16", "bfloat16")
TEXT_LEN = 150
"""More than twice the tokens of the golden prompts, and farther than the text encoder tells distances apart."""
SMALL = 4096
"""Bytes of the largest constant that a graph may hold itself."""


@dataclass(frozen=True)
class Part:
    """A golden case and a folder with its weights and their float32 graphs."""

    name: str
    config: Any
    folder: Path
    weights: dict[str, Tensor]
    golden: dict[str, Tensor]

    def models(self, dtype: DTypeName) -> dict[GraphName, Any]:
        if self.name == "umt5":
            return dict(text_encoder_graphs(self.config, TEXT_LEN, self.folder, dtype))
        return dict(decoder_graphs(self.config, self.folder, dtype))

    def session(self, graph: GraphName, dtype: DTypeName = "float32") -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = self.folder / graphs.graph_file(graph, dtype)
        if not path.exists():
            path.write_bytes(self.models(dtype)[graph].SerializeToString())
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    @cached_property
    def decoder(self) -> ExportedDecoder:
        return ExportedDecoder(OnnxRunner(self.folder, CPU, torch.float32), self.config)

    @property
    def pixels(self) -> Tensor:
        """The golden pixels in [0, 1]; the Wan VAE's lie there in [-1, 1]."""
        pixels = self.golden["pixels"]
        return (pixels + 1) / 2 if self.name == "wan_vae" else pixels


def make_part(golden: Path, folder: Path, name: str) -> Part:
    case = json.loads((golden / name / "case.json").read_text())
    config: DecoderConfig | Umt5Config
    if name == "taehv":
        config = TaehvConfig()
        weights = seeded_weights(case["keys"], case["weights_seed"], case["weights_gain"])
    else:
        weights = load_file(golden / name / "weights.safetensors")
    if name == "wan_vae":
        config = WanVaeConfig(dim=case["dim"], mean=tuple(case["mean"]), std=tuple(case["std"]))
    if name == "umt5":
        sizes = ("dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")
        config = Umt5Config(vocab_size=case["vocab"], **{size: case[size] for size in sizes})
    save_file(weights, folder / ("text_encoder.safetensors" if name == "umt5" else "decoder.safetensors"))
    part = Part(name, config, folder, weights, load_file(golden / name / "tensors.safetensors"))
    write_graphs(iter(part.models("float32").items()), folder, "float32")
    return part


@pytest.fixture(scope="module")
def parts(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    return {name: make_part(golden, tmp_path_factory.mktemp(name), name) for name in ("taehv", "wan_vae", "umt5")}


@pytest.mark.parametrize("chunks", [(6,), (3, 3), (1, 1, 4)])
@pytest.mark.parametrize("name", ["taehv", "wan_vae"])
def test_decoded_chunk_by_chunk(parts: dict[str, Part], name: str, chunks: tuple[int, ...]) -> None:
    part, state, decoded = parts[name], None, []
    for latents in part.golden["latents"].split(chunks, dim=1):
        pixels, state = part.decoder.decode(latents, state)
        decoded.append(pixels)
    assert [pixels.shape[1] for pixels in decoded] == [4 * chunks[0] - 3, *(4 * chunk for chunk in chunks[1:])]
    video = torch.cat(decoded, dim=1)
    assert video.dtype == torch.float32 and video.min() >= 0 and video.max() <= 1
    assert relative_error(video, part.pixels) <= 1e-4


def test_wan_vae_encoded(parts: dict[str, Part]) -> None:
    part = parts["wan_vae"]
    clip = (part.golden["encode_pixels"].movedim(1, 2) + 1) / 2
    assert relative_error(part.decoder.encode(clip)[0], part.golden["encode_latents"]) <= 1e-4


def test_taehv_encoded(parts: dict[str, Part]) -> None:
    """The golden clip has whole groups of four frames, as a later chunk has, behind blank memory."""
    part = parts["taehv"]
    latents, _ = part.decoder.encode_groups(part.golden["encode_pixels"])
    assert relative_error(latents, part.golden["encode_latents"]) <= 1e-4


@pytest.mark.parametrize("frames", [1, 13, 37])
@pytest.mark.parametrize("name", ["taehv", "wan_vae"])
def test_clips_of_any_length_are_encoded_as_by_torch(parts: dict[str, Part], name: str, frames: int) -> None:
    part = parts[name]
    clip = torch.rand(1, frames, 3, 16, 24, generator=torch.Generator().manual_seed(frames))
    latents, _ = load_decoder(part.config, dict(part.weights), CPU, torch.float32).encode(clip)
    assert relative_error(part.decoder.encode(clip)[0], latents) <= 1e-4


@pytest.mark.parametrize("chunks", [(1, 4, 4, 16), (9, 12, 4)])
@pytest.mark.parametrize("name", ["taehv", "wan_vae"])
def test_encoded_chunk_by_chunk(parts: dict[str, Part], name: str, chunks: tuple[int, ...]) -> None:
    part, state, encoded = parts[name], None, []
    clip = torch.rand(1, 25, 3, 16, 24, generator=torch.Generator().manual_seed(25))
    for pixels in clip.split(chunks, dim=1):
        latents, state = part.decoder.encode(pixels, state)
        encoded.append(latents)
    assert [latents.shape[1] for latents in encoded] == [(chunks[0] + 3) // 4, *(chunk // 4 for chunk in chunks[1:])]
    torch.testing.assert_close(torch.cat(encoded, dim=1), part.decoder.encode(clip)[0], rtol=0, atol=1e-5)


def test_golden_prompts(parts: dict[str, Part]) -> None:
    part = parts["umt5"]
    encoder = ExportedTextEncoder(OnnxRunner(part.folder, CPU, torch.float32), part.config)
    session = part.session("text_encoder")
    for ids, mask, embeds in zip(*(part.golden[name] for name in ("ids", "mask", "prompt_embeds")), strict=True):
        length = int(mask.sum())
        real = ids[None, :length].long()
        assert relative_error(encoder(real)[0], embeds[:length]) <= 1e-4
        (padded,) = session.run([graphs.EMBEDS], {graphs.TOKEN_IDS: real.numpy()})
        assert padded.shape == (TEXT_LEN, part.config.dim)
        assert padded[:length].all() and not padded[length:].any()


@pytest.mark.parametrize("length", [1, TEXT_LEN])
def test_prompts_of_any_length_are_encoded_as_by_torch(parts: dict[str, Part], length: int) -> None:
    part = parts["umt5"]
    reference = Umt5Encoder(part.config)
    reference.load_state_dict(part.weights)
    ids = torch.randint(part.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    embeds = ExportedTextEncoder(OnnxRunner(part.folder, CPU, torch.float32), part.config)(ids)
    assert relative_error(embeds, reference(ids).detach()) <= 1e-4


@pytest.mark.parametrize("name", ["taehv", "wan_vae"])
def test_decoded_in_float16(parts: dict[str, Part], name: str) -> None:
    """ONNX Runtime's CPU has no kernels for it, but rounds what passes between the nodes."""
    part = parts[name]
    session = part.session("decoder_first", "float16")
    (pixels,) = session.run([graphs.PIXELS], {graphs.LATENTS: part.golden["latents"].numpy()})
    assert relative_error(torch.from_numpy(pixels), part.pixels) <= 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["taehv", "wan_vae", "umt5"])
def test_form(parts: dict[str, Part], name: str, dtype: DTypeName) -> None:
    """Valid ONNX in standard operators, every shape's rank known, and no weight in the graph itself."""
    part = parts[name]
    own = {
        "float32": onnx.TensorProto.FLOAT,
        "float16": onnx.TensorProto.FLOAT16,
        "bfloat16": onnx.TensorProto.BFLOAT16,
    }
    for graph, model in part.models(dtype).items():
        path = part.folder / f"{graph}.checked.onnx"
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(path, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        known = {
            info.name for info in (*inferred.value_info, *inferred.output) if info.type.tensor_type.HasField("shape")
        }
        assert all(output in known for node in inferred.node for output in node.output)
        assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", graphs.OPSET)}
        assert {node.domain for node in model.graph.node} == {""}
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                assert tensor.name in part.weights and (part.folder / where["location"]).suffix == ".safetensors"
            else:
                assert len(tensor.raw_data) < SMALL
        for put in (*model.graph.input, *model.graph.output):
            if "state." in put.name:
                assert put.type.tensor_type.elem_type == own[dtype]


@pytest.mark.parametrize("name", ["taehv", "wan_vae"])
def test_what_one_chunk_leaves_is_what_the_next_takes(parts: dict[str, Part], name: str) -> None:
    models = parts[name].models("float32")

    def states(puts: Any, prefix: str) -> list[Any]:
        return [(put.name.removeprefix(prefix), put.type) for put in puts if "state." in put.name]

    pairs: tuple[tuple[GraphName, GraphName], ...] = (("decoder_first", "decoder"), ("encoder_first", "encoder"))
    for opening, following in pairs:
        first, later = models[opening].graph, models[following].graph
        taken = states(later.input, "")
        assert taken and states(later.output, "next_") == taken == states(first.output, "next_")
        assert not states(first.input, "")
