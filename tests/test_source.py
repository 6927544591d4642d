"""Video to video: what a source does to a stream, when its frames are pulled, and what goes wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfrt import BundleError, Chunk, ConfigError, MediaError, Runtime
from sfrt.config import TaehvConfig
from sfrt.decoders.taehv import Taehv
from sfrt.noise import chunk_noise
from sfrt.ops.frames import frames as to_bytes
from sfrt.ops.layout import tokens_from_latents
from sfrt.source import Source
from sfrt.timesteps import steps_of
from sfrt.video import open_writer
from tests.streams import same

PROMPT = "a red circle moving left"
CLIP = torch.rand(34, 3, 32, 48, generator=torch.Generator().manual_seed(0))
"""Two chunks of 9 and 12 frames, a third of 12, and one frame too many."""


def stream(runtime: Runtime, source: Any = CLIP, **settings: Any) -> list[Chunk]:
    with runtime.session(PROMPT, source=source, **{"strength": 0.6, **settings}) as session:
        return list(session)


class Camera:
    """Frames of the clip, counted; some of them fail to come once."""

    def __init__(self, *faults: int) -> None:
        self.pulled = 0
        self._faults = set(faults)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.pulled in self._faults:
            self._faults.remove(self.pulled)
            raise OSError("the camera stutters")
        if self.pulled == len(CLIP):
            raise StopIteration
        self.pulled += 1
        return CLIP[self.pulled - 1]


def test_the_stream_is_as_long_as_the_source(runtime: Runtime) -> None:
    chunks = stream(runtime)
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12], "and the last frame of 34 fills no chunk"
    assert all(chunk.timings.encode_ms > 0 for chunk in chunks)
    assert len(stream(runtime, CLIP[:32])) == 2
    assert len(stream(runtime, limit=1)) == 1, "a limit still holds"


def test_seed_source_and_prompt_matter(runtime: Runtime) -> None:
    base = stream(runtime, seed=1)
    assert same(base, stream(runtime, seed=1))
    assert not same(base, stream(runtime, seed=2))
    assert not same(base, stream(runtime, CLIP.flip(0), seed=1))
    with runtime.session("a blue square", seed=1, source=CLIP, strength=0.6) as session:
        assert not torch.equal(base[0].latents, next(session).latents)


def test_a_chunk_starts_from_its_latents_under_noise(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime.manifest.model
    with runtime.session(PROMPT, seed=5, source=CLIP, strength=0.6) as session:
        assert session._stage is not None and session._stage.decoder is not None
        rollout, decoder, tokens = session._stage.rollout, session._stage.decoder, session._stage.grid.tokens
        given: list[tuple[Tensor, float]] = []
        flow = rollout.flow
        monkeypatch.setattr(rollout, "flow", lambda x, t: (given.append((x.clone(), t)), flow(x, t))[1])
        next(session), next(session)
    steps = steps_of(runtime.stream, strength=0.6)
    assert [timestep for _, timestep in given] == [step.timestep for step in steps] * 2
    latents, _ = decoder.encode(CLIP[None, :21])
    for start, frames in ((0, range(3)), (len(steps), range(3, 6))):
        noise = chunk_noise(5, frames, range(1), tokens, model.token_dim, torch.device("cpu"))[0]
        source = tokens_from_latents(latents[0, frames.start : frames.stop], model)
        torch.testing.assert_close(given[start][0], 0.4 * source + 0.6 * noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_near_no_strength_gives_the_source_back(backend: str) -> None:
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    builtin = Runtime(device="cpu", backend=backend)
    prompt = "a red circle moving left on a white background"
    with builtin.session(prompt, seed=3, limit=2) as session:
        video = np.concatenate([chunk.frames for chunk in session])
        assert session._stage is not None and session._stage.decoder is not None
        decoder = session._stage.decoder
    latents, _ = decoder.encode(torch.from_numpy(video).movedim(3, 1)[None] / 255)
    through = to_bytes(decoder.decode(latents, None)[0][0]).numpy().astype(int)

    def distance(strength: float) -> float:
        with builtin.session("a blue square moving up on a yellow background", source=video, strength=strength) as made:
            return float(np.abs(np.concatenate([chunk.frames for chunk in made]) - through).mean())

    assert distance(0.01) < 2
    assert distance(0.9) > 40, "and nearly all of it gives what the prompt asks for"


def test_frames_come_in_every_form(runtime: Runtime, tmp_path: Path) -> None:
    frames = (CLIP * 255).round().to(torch.uint8).movedim(1, 3).contiguous().numpy()
    pixels = torch.from_numpy(frames).movedim(3, 1).float() / 255
    reference = stream(runtime, pixels)
    assert same(reference, stream(runtime, frames)), "an array is its frames"
    assert same(reference, stream(runtime, iter(pixels.double())))
    mirrored = np.ascontiguousarray(frames[..., ::-1])
    mirrored.flags.writeable = False
    assert same(reference, stream(runtime, (frame[..., ::-1] for frame in mirrored))), "as from a library of BGR"
    memory = np.empty_like(frames[0])

    def camera() -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        for frame in frames:
            memory[:] = frame
            yield memory

    assert same(reference, stream(runtime, camera())), "a camera may reuse its memory"
    with open_writer(str(tmp_path / "clip.mp4"), width=48, height=32, fps=16) as writer:
        writer.write(frames)
    assert [len(chunk.frames) for chunk in stream(runtime, tmp_path / "clip.mp4")] == [9, 12, 12]


def test_no_frame_is_pulled_before_its_chunk_is_asked_for(runtime: Runtime) -> None:
    camera = Camera()
    with runtime.session(PROMPT, source=camera, strength=0.5) as session:
        assert camera.pulled == 0
        for pulled in (9, 21, 33):
            next(session)
            session.refresh()
            assert camera.pulled == pulled
        assert list(session) == [] and camera.pulled == 34


def test_a_source_that_fails_leaves_the_stream_where_it_was(runtime: Runtime) -> None:
    with runtime.session(PROMPT, source=Camera(4, 15, 33), strength=0.6) as session:
        made, failures = [], 0
        while len(made) < 3:
            try:
                made.append(next(session))
            except OSError:
                failures += 1
        with pytest.raises(OSError, match="stutters"):
            next(session)
        assert list(session) == []
    assert failures == 2
    assert same(made, stream(runtime))


def test_a_chunk_that_fails_is_made_from_the_same_frames(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.session(PROMPT, source=Camera(), strength=0.6) as session:
        made = [next(session)]
        assert session._stage is not None
        rollout = session._stage.rollout
        flow = rollout.flow

        def interrupted(tokens: Tensor, timestep: float) -> Tensor:
            monkeypatch.setattr(rollout, "flow", flow)
            raise KeyboardInterrupt

        monkeypatch.setattr(rollout, "flow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(session)
        made += session
    assert same(made, stream(runtime))


def test_sessions_on_one_runtime_share_nothing_of_their_sources(runtime: Runtime) -> None:
    with (
        runtime.session(PROMPT, source=CLIP, strength=0.6) as one,
        runtime.session(PROMPT, source=CLIP.flip(0), strength=0.6) as other,
    ):
        pairs = list(zip(one, other, strict=True))
    assert same([pair[0] for pair in pairs], stream(runtime))
    assert same([pair[1] for pair in pairs], stream(runtime, CLIP.flip(0)))


def test_a_first_chunk_of_its_own(runtime: Runtime) -> None:
    settings = replace(runtime.stream, chunk=2, first_chunk=1, first_steps=(900.0, 400.0), steps=(500.0,), sink=1)
    chunks = stream(runtime, CLIP, stream=settings, strength=None)
    assert [len(chunk.frames) for chunk in chunks] == [1, 8, 8, 8, 8], "steps that start below 1000 need no strength"


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (CLIP[:8], r"the source ends after 8 frames; its first chunk needs 9"),
        ([], r"the source ends after 0 frames"),
        ([CLIP[0], CLIP[1, :, :16]], r"frame 2 of the source is torch.float32 \[3, 16, 48\]; .* \[3, 32, 48\]"),
        ([np.zeros((32, 48, 3))], r"frame 1 of the source is float64 \[32, 48, 3\]; .* uint8 arrays \[32, 48, 3\]"),
        ([CLIP[0].to(torch.uint8)], r"frame 1 of the source is torch.uint8"),
        (["frame.png"], r"frame 1 of the source is str; give float tensors"),
    ],
)
def test_frames_that_cannot_be_used(runtime: Runtime, frames: Any, says: str) -> None:
    with runtime.session(PROMPT, source=frames, strength=0.5) as session, pytest.raises(MediaError, match=says):
        next(session)


def test_a_bad_frame_is_passed_over_when_the_stream_goes_on(runtime: Runtime) -> None:
    frames: list[Any] = [*CLIP[:20], CLIP[20, :2], *CLIP[20:]]
    with runtime.session(PROMPT, source=frames, strength=0.6) as session:
        made = [next(session)]
        with pytest.raises(MediaError, match="frame 21"):
            next(session)
        made += session
    assert same(made, stream(runtime))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"source": CLIP, "strength": 0.0}, ConfigError, "strength is 0.0; it must be above 0 and at most 1"),
        ({"source": CLIP, "strength": 1.01}, ConfigError, "strength is 1.01"),
        ({"source": CLIP, "strength": float("nan")}, ConfigError, "strength is nan"),
        ({"source": CLIP}, ConfigError, "starts from pure noise, .* give a strength below 1"),
        ({"strength": 0.5}, ConfigError, "give a source with it"),
        ({"source": CLIP, "initial": CLIP, "strength": 0.5}, ConfigError, "give one of them"),
        ({"source": "/nowhere.mp4", "strength": 0.5}, MediaError, "/nowhere.mp4: there is no such file"),
        ({"source": 7, "strength": 0.5}, MediaError, "a int is no source"),
    ],
)
def test_bad_requests_are_refused(
    runtime: Runtime, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        runtime.session(PROMPT, **arguments)
    assert len(stream(runtime, limit=1)) == 1, "and the runtime goes on working"


def test_all_strength_is_no_source_but_its_length(runtime: Runtime) -> None:
    with runtime.session(PROMPT, seed=2, limit=3) as session:
        assert same(list(session), stream(runtime, seed=2, strength=1.0))


def test_steps_that_start_from_a_source_need_one(runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match=r"the steps start at a noise level of 0\.83, .* give a source"):
        runtime.session(PROMPT, stream=replace(runtime.stream, steps=(500.0, 250.0)))


def test_a_source_lets_go_of_the_frames_of_a_made_chunk(runtime: Runtime) -> None:
    assert runtime._decoder is not None
    source = Source(CLIP, runtime.stream, runtime._decoder, torch.device("cpu"))
    assert source.pull(3) and source.pull(3), "asking twice pulls once"
    assert torch.equal(source.latents(), source.latents())
    source.advance()
    assert source._pulled == [] and source._given == 9


@pytest.fixture(scope="module")
def streamdiffusion(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """The golden DiT as a checkpoint of StreamDiffusionV2, with a narrow autoencoder."""
    from sfrt_export.export import export_checkpoint

    folder = tmp_path_factory.mktemp("v2v")
    torch.manual_seed(0)
    taehv = Taehv(TaehvConfig(encoder_width=8, decoder_widths=(16, 12, 8, 8))).requires_grad_(False)
    for weight in taehv.parameters():
        if weight.ndim > 1:  # lively enough for what goes in to show in what comes out
            weight.normal_(std=1.4 / weight[0].numel() ** 0.5)
    torch.save(taehv.state_dict(), folder / "taehv.pth")
    (folder / "wan_causal_dmd_v2v").mkdir()
    checkpoint = folder / "wan_causal_dmd_v2v" / "model.safetensors"
    shutil.copy(golden / "dit" / "weights_d128h2l2.safetensors", checkpoint)
    with pytest.warns(UserWarning, match="source videos alone"):
        bundle = export_checkpoint(
            checkpoint,
            folder / "bundle",
            taehv=folder / "taehv.pth",
            heads=2,
            text_len=24,
            stream={"height": 32, "width": 48},
        )
    return Runtime(bundle.path, device="cpu")


def test_streamdiffusionv2_goes_by_a_source(streamdiffusion: Runtime) -> None:
    settings, model = streamdiffusion.stream, streamdiffusion.manifest.model
    assert streamdiffusion.manifest.family == "streamdiffusionv2"
    assert [step.timestep for step in steps_of(settings)] == [700, 500, 400, 200]
    embeds = torch.randn(model.text_len, model.text_dim, generator=torch.Generator().manual_seed(1))
    with streamdiffusion.session(embeds, source=CLIP) as session:
        chunks = list(session)
    assert [len(chunk.frames) for chunk in chunks] == [1, *[4] * 8]
    with streamdiffusion.session(embeds, source=CLIP.flip(0)) as session:
        assert not torch.allclose(next(session).latents, chunks[0].latents, atol=1e-2)
    with pytest.raises(ConfigError, match=r"noise level of 0\.70, .* give a source"):
        streamdiffusion.session(embeds)


def test_a_bundle_without_autoencoder_cannot_read_a_source(golden: Path, tmp_path: Path) -> None:
    from sfrt_export.export import export_checkpoint

    bundle = export_checkpoint(
        golden / "dit" / "weights_d128h2l2.safetensors", tmp_path / "blind", family="causvid", heads=2, text_len=24
    )
    blind = Runtime(bundle.path, device="cpu")
    embeds = torch.zeros(blind.manifest.model.text_len, blind.manifest.model.text_dim)
    with pytest.raises(BundleError, match=r"has no decoder to encode pixels with; .* --taehv or --vae"):
        blind.session(embeds, source=CLIP, strength=0.5, limit=1)
