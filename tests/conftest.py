"""What several test files share: the golden folder, a tiny model, hypothesis' settings, the skipping of GPU tests."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.command_line import Outcome, Run
from tests.native import CSRC, build_library
from tests.waiting import wait_until

if not torch.cuda.is_available():
    # Before the first import of Triton, which reads it then: kernels are interpreted where they cannot be compiled.
    os.environ["TRITON_INTERPRET"] = "1"

# A busy machine is slow without being wrong.
settings.register_profile("sfrt", deadline=None)
settings.load_profile("sfrt")

TESTS = Path(__file__).parent
# bench/ is no part of the wheel. Last, so that sfrt itself is what was installed.
sys.path.append(str(TESTS.parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    if torch.cuda.is_available():
        return
    for item in on_gpu:
        item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another one, or the user, has left in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that compare two models' bytes: how work is shared out between threads may round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference inputs and outputs; tests/golden/README.md says what is in it."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The CUDA compiler; a test that asks for it is skipped where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("no CUDA compiler (nvcc) on this machine")
    return found


@pytest.fixture(scope="session")
def native_library(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of csrc/ as a shared library, for this machine's GPU or, without one, for the oldest we build for."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", f"-arch=sm_{capability[0]}{capability[1]}"]
    return build_library([nvcc, *flags], sorted(CSRC.glob("*.cu")), tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model of the real classes, random weights: 32×48 pixels, chunks of 3 latent frames, window 9, sink 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from sfrt.bundle import Manifest, TaehvPart
    from sfrt.bundle.writer import BundleWriter
    from sfrt.config import ModelConfig, StreamConfig, TaehvConfig, Umt5Config
    from sfrt.decoders.taehv import Taehv
    from sfrt.text import Umt5Encoder
    from sfrt.transformer import Transformer

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("bundles")
    tokenizer.save(str(folder / "tokenizer.json"))
    text = Umt5Config(vocab_size=len(words), dim=24, dim_attn=24, dim_ffn=32, num_heads=2, num_layers=1)
    manifest = Manifest(
        name="tiny",
        family="self-forcing",
        model=ModelConfig(
            dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=24, text_len=12, latent_channels=4
        ),
        stream=StreamConfig(chunk=3, window=9, sink=3, height=32, width=48),
        weights="flat",
        dtype="float32",
        created_by="tests",
        decoder=TaehvPart(TaehvConfig(latent_channels=4, encoder_width=8, decoder_widths=(16, 12, 8, 8))),
        text_encoder=text,
    )
    assert isinstance(manifest.decoder, TaehvPart)
    torch.manual_seed(0)
    transformer, decoder = Transformer(manifest.model), Taehv(manifest.decoder.config)
    for weight in (*transformer.parameters(), *decoder.parameters()):
        if weight.ndim > 1:  # lively enough for what goes in to show in what comes out
            torch.nn.init.normal_(weight, std=1.4 / weight[0].numel() ** 0.5)
    with BundleWriter(folder / "tiny") as writer:
        writer.add_tensors("transformer", transformer.state_dict())
        writer.add_tensors("decoder", decoder.state_dict())
        writer.add_tensors("text_encoder", Umt5Encoder(text).state_dict())
        writer.add_tokenizer(folder / "tokenizer.json")
        writer.finish(manifest)
    return folder / "tiny"


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Any:
    """The tiny model's Runtime; a file that needs another has a fixture of its own."""
    from sfrt import Runtime

    return Runtime(tiny_bundle, device="cpu", backend="torch")


@pytest.fixture
def engine(runtime: Any) -> Iterator[Any]:
    """One of the tiny model, or of the file's own; it lets everyone in, as a busy machine would refuse some."""
    from sfrt.engine import Engine

    with Engine(runtime, capacity=inf) as engine:
        yield engine


@pytest.fixture(scope="session")
def quick_runtime() -> Any:
    """The built-in model, played so fast that tests need not wait for it."""
    from tests.servers import runtime_at

    return runtime_at(fps=32)


@pytest.fixture(scope="module")
def running(quick_runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of it, with small limits."""
    from tests.servers import SMALL, serving

    with serving(quick_runtime, tmp_path_factory.mktemp("recordings"), SMALL) as running:
        yield running


@pytest.fixture
def server(running: Any) -> Iterator[Any]:
    """The same, empty again after each test, whatever the test did to it."""
    yield running
    wait_until(running.is_empty)


@pytest.fixture(scope="session", params=["tiny on torch", "built-in on torch", "built-in on onnx"])
def any_runtime(request: pytest.FixtureRequest, tiny_bundle: Path) -> Any:
    """A Runtime, for what is to hold on every model and backend."""
    from sfrt import Runtime

    model, _, backend = request.param.partition(" on ")
    if backend == "onnx":
        pytest.importorskip("onnxruntime", minversion="1.25")
    return Runtime(tiny_bundle if model == "tiny" else None, device="cpu", backend=backend)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process, working in an empty folder."""
    from sfrt import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        return Outcome(exit.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def golden_rollout(golden: Path) -> Callable[..., float]:
    """(checkpoint, output, **options) → relative error of the golden latents, rolled out by the runtime.

    The checkpoint is of the golden DiT in any spelling; output is the bundle to make; options are those of an export.
    """
    from safetensors.torch import load_file

    from sfrt import Runtime
    from sfrt.ops.layout import tokens_from_latents
    from sfrt_export.export import export_checkpoint

    case = load_file(golden / "dit" / "chunk3_3steps_shift8" / "tensors.safetensors")
    settings = {"window": None, "steps": (1000.0, 757.0, 522.0), "warp": False, "shift": 8.0, "height": 48, "width": 64}

    def roll_out(checkpoint: Path, output: Path, **options: Any) -> float:
        options = {"family": "self-forcing", "heads": 2, "text_len": 24, "stream": settings, **options}
        model = export_checkpoint(checkpoint, output, **options).manifest.model
        drawn = iter(sorted(name for name in case if name.startswith("renoise.")))

        def golden_noise(frames: range, steps: int) -> torch.Tensor:
            start = case["noise"][0, frames.start : frames.stop]
            between = [case[next(drawn)] for _ in range(steps - 1)]
            return torch.stack([tokens_from_latents(normals, model) for normals in (start, *between)])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sfrt.runtime.philox_noise", lambda *_: golden_noise)
            with Runtime(output, device="cpu").session(case["prompt_embeds"][0], limit=2) as session:
                latents = torch.cat([chunk.latents for chunk in session])
        return float((latents - case["latents"][0]).norm() / case["latents"][0].norm())

    return roll_out
