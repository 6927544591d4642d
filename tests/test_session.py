"""The runtime and its chunk loop, end to end on a tiny model of the real classes."""

from __future__ import annotations

import gc
import itertools
import shutil
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sfrt.device
from sfrt import BundleError, Chunk, ConfigError, DeviceError, MediaError, PromptError, Runtime, Session
from sfrt.backends import Grid
from sfrt.config import Positions
from sfrt.ring import Ring

PROMPT = "a red circle moving left"


def stream(runtime: Runtime, chunks: int, **settings: Any) -> list[Chunk]:
    with runtime.session(PROMPT, limit=chunks, **settings) as session:
        return list(session)


def frames(chunks: list[Chunk]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.concatenate([chunk.frames for chunk in chunks])


def test_chunks_have_the_promised_shapes(runtime: Runtime) -> None:
    chunks = stream(runtime, 3)
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [chunk.frames.shape for chunk in chunks] == [(9, 32, 48, 3), (12, 32, 48, 3), (12, 32, 48, 3)]
    assert all(chunk.frames.dtype == np.uint8 for chunk in chunks)
    assert all(chunk.latents.shape == (3, 4, 4, 6) and chunk.latents.dtype == torch.float32 for chunk in chunks)
    assert chunks[0].timings.refresh_ms == 0 < chunks[0].timings.dit_ms, "there is nothing to refresh yet"
    assert chunks[1].timings.chunk_ms > chunks[1].timings.refresh_ms > 0


def test_the_same_seed_gives_the_same_video_however_it_is_asked_for(runtime: Runtime) -> None:
    reference = stream(runtime, 5, seed=3)
    with runtime.session(PROMPT, seed=3) as session:  # without end, taken a few at a time, with a stream beside it
        first = list(itertools.islice(session, 2))
        session.refresh()
        stream(runtime, 1, seed=9)
        rest = list(itertools.islice(session, 3))
    for one, other in zip(reference, [*first, *rest], strict=True):
        assert torch.equal(one.latents, other.latents)
        assert np.array_equal(one.frames, other.frames)


def test_seed_and_prompt_matter(runtime: Runtime) -> None:
    base = stream(runtime, 1, seed=1)[0].latents
    assert not torch.allclose(base, stream(runtime, 1, seed=2)[0].latents, atol=1e-2)
    with runtime.session("a blue square", seed=1, limit=1) as session:
        assert not torch.equal(base, next(session).latents)


def test_embeddings_stand_in_for_a_prompt(runtime: Runtime) -> None:
    embeds = runtime._embeddings(PROMPT)
    with runtime.session(embeds, seed=4, limit=2) as session:
        assert torch.equal(list(session)[1].latents, stream(runtime, 2, seed=4)[1].latents)


def test_a_window_as_long_as_the_stream_changes_nothing(runtime: Runtime) -> None:
    endless = replace(runtime.stream, window=12, sink=0)
    unlimited = replace(runtime.stream, window=None, sink=0)
    rolled, whole = stream(runtime, 5, stream=endless), stream(runtime, 5, stream=unlimited)
    for one, other in zip(rolled[:4], whole[:4], strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-5)
    assert not torch.allclose(rolled[4].latents, whole[4].latents, atol=1e-4), (
        "the fifth chunk no longer sees the first"
    )


def test_a_long_stream_keeps_its_memory(runtime: Runtime) -> None:
    with runtime.session(PROMPT) as session:
        assert session._stage is not None
        cache = session._stage.rollout._cache  # type: ignore[attr-defined]
        before = (cache.k.data_ptr(), cache.v.data_ptr(), cache.k.shape)
        for chunk in itertools.islice(session, 12):
            assert np.isfinite(chunk.latents.numpy()).all()
        assert (cache.k.data_ptr(), cache.v.data_ptr(), cache.k.shape) == before
        assert cache.k.shape[2] == 9 * Grid.of(runtime.manifest.model, runtime.stream).tokens


def test_other_resolutions_and_step_lists(runtime: Runtime) -> None:
    other = replace(
        runtime.stream, height=48, width=32, steps=(1000.0, 500.0), first_steps=(1000.0,), chunk=2, first_chunk=1
    )
    chunks = stream(runtime, 3, stream=other)
    assert [chunk.frames.shape for chunk in chunks] == [(1, 48, 32, 3), (8, 48, 32, 3), (8, 48, 32, 3)]


def test_going_on_from_a_clip_is_going_on(runtime: Runtime) -> None:
    clip = torch.rand(11, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with runtime.session(PROMPT, seed=5, initial=clip, limit=2) as session:
        assert session.initial_frames is not None
        assert session.initial_frames.shape == (9, 32, 48, 3), "11 frames are cut to 1 + 4·k"
        chunks = list(session)
    assert [len(chunk.frames) for chunk in chunks] == [12, 12], "what follows a start is not a first chunk"
    other = stream(runtime, 2, seed=5, initial=clip.flip(0))
    assert not torch.allclose(chunks[0].latents, other[0].latents, atol=1e-3), "the start is seen"


def test_going_on_from_a_picture_file(runtime: Runtime, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    with runtime.session(PROMPT, initial=tmp_path / "red.png", limit=1) as session:
        assert session.initial_frames is not None and len(session.initial_frames) == 1
        assert len(next(session).frames) == 12


def test_a_pass_run_early_still_counts(runtime: Runtime) -> None:
    with runtime.session(PROMPT) as session:
        next(session)
        session.refresh()
        assert next(session).timings.refresh_ms > 0


def test_closing_lets_the_ring_go(runtime: Runtime) -> None:
    session = runtime.session(PROMPT)
    next(session)
    assert session._stage is not None
    ring = weakref.ref(session._stage.rollout._cache.k)  # type: ignore[attr-defined]
    session.close()
    gc.collect()
    assert ring() is None


def test_a_chunk_that_fails_leaves_the_stream_where_it_was(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = stream(runtime, 3, seed=8)
    with runtime.session(PROMPT, seed=8) as session:
        next(session)
        assert session._stage is not None
        rollout = session._stage.rollout
        flow, calls = rollout.flow, itertools.count()

        def interrupted(tokens: Tensor, timestep: float) -> Tensor:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return flow(tokens, timestep)

        monkeypatch.setattr(rollout, "flow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(session)
        for chunk, expected in zip(itertools.islice(session, 2), reference[1:], strict=True):
            assert chunk.index == expected.index
            assert torch.equal(chunk.latents, expected.latents)
            assert np.array_equal(chunk.frames, expected.frames)


def test_a_chunk_is_its_owners_to_change(runtime: Runtime) -> None:
    stream(runtime, 1)[0].latents.mul_(2)


def test_a_closed_session_yields_nothing(runtime: Runtime) -> None:
    session = runtime.session(PROMPT)
    next(session)
    session.close()
    session.close()
    assert list(session) == []


class Operations(TorchDispatchMode):
    """Counts every operation torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_hot_path_moves_nothing_and_waits_for_nothing(runtime: Runtime) -> None:
    """No roll, clone or concatenation of the cache, and no read of a device's value, once the ring has wrapped."""
    with runtime.session(PROMPT) as session:
        list(itertools.islice(session, 6))
        assert session._stage is not None
        rollout, stage = session._stage.rollout, session._stage
        rollout.place(Ring(9, 3).plan(18, 3))
        tokens = torch.zeros(3 * stage.grid.tokens, stage.model.token_dim)
        with Operations() as operations, torch.no_grad():
            rollout.flow(tokens, 1000.0)
            rollout.refresh(tokens, 0.0)
    assert operations.counts["_linear_pointwise"] > 10, "the passes were watched"
    for name in ("cat", "roll", "clone", "_local_scalar_dense", "index_select", "_to_copy"):
        assert operations.counts[name] == 0, f"{name} in the hot path"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"prompt": "   "}, PromptError, "empty"),
        ({"prompt": torch.zeros(5, 24)}, PromptError, r"give floats \[12, 24\]"),
        ({"prompt": torch.zeros(12, 24, dtype=torch.int64)}, PromptError, "give floats"),
        ({"seed": 1.5}, ConfigError, "seed"),
        ({"initial": torch.zeros(0, 3, 32, 48)}, MediaError, "1 or more"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"limit": 0}, ConfigError, "at least one"),
        ({"initial": torch.zeros(1, 3, 16, 16)}, MediaError, r"\[F, 3, 32, 48\]"),
        ({"initial": "/nowhere.png"}, MediaError, "no such file"),
    ],
)
def test_bad_requests_are_refused(
    runtime: Runtime, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        runtime.session(**{"prompt": PROMPT, **arguments})
    assert len(stream(runtime, 1)) == 1, "and the runtime goes on working"


def test_an_endless_stream_needs_a_window(runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match="give it a limit"):
        runtime.session(PROMPT, stream=replace(runtime.stream, window=None))


def test_bad_runtimes_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cuda:99"):
        Runtime(tiny_bundle, device="cuda:99")
    with pytest.raises(DeviceError, match="no device"):
        Runtime(tiny_bundle, device="abacus")
    with pytest.raises(ConfigError, match="no dtype"):
        Runtime(tiny_bundle, dtype="int3")
    with pytest.raises(ConfigError, match="no backend"):
        Runtime(tiny_bundle, backend="abacus")
    with pytest.raises(BundleError, match="no model"):
        Runtime(tmp_path / "nothing")


def test_a_manifest_of_another_model_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "edited")
    manifest = tmp_path / "edited" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(BundleError, match=r"tensors of the transformer do not fit its settings: .* missing \(blocks.2"):
        Runtime(tmp_path / "edited", device="cpu")


def test_too_little_memory_is_said_before_it_is_taken(
    tiny_bundle: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sfrt.device, "free_bytes", lambda device: 1000)
    with pytest.raises(DeviceError, match=r"a ring of 9 .* needs .* GiB on cpu and 0.00 GiB are free"):
        runtime.session(PROMPT)
    with pytest.raises(DeviceError, match=r"the model 'tiny' needs .* \(transformer .* MiB, decoder .* MiB\)"):
        Runtime(tiny_bundle, device="cpu")


def test_running_out_of_memory_is_one_sentence(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.session(PROMPT) as session:
        assert session._stage is not None

        def no_memory(tokens: Tensor, timestep: float) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(session._stage.rollout, "flow", no_memory)
        with pytest.raises(DeviceError, match="the stream ran out of memory on cpu"):
            next(session)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_float32(tiny_bundle: Path, runtime: Runtime, dtype: str) -> None:
    half = stream(Runtime(tiny_bundle, device="cpu", dtype=dtype), 2)
    full = stream(runtime, 2)
    error = (half[1].latents - full[1].latents).norm() / full[1].latents.norm()
    assert error < 3e-2


@pytest.mark.gpu
def test_the_gpu_streams_the_same_video(tiny_bundle: Path, runtime: Runtime) -> None:
    there = stream(Runtime(tiny_bundle, device="cuda", dtype="float32"), 4, seed=6)
    here = stream(runtime, 4, seed=6)
    for one, other in zip(there, here, strict=True):
        assert torch.allclose(one.latents.cpu(), other.latents, atol=2e-3)
        assert np.abs(one.frames.astype(int) - other.frames.astype(int)).max() <= 2


def test_a_session_is_its_own_iterator(runtime: Runtime) -> None:
    session: Session = runtime.session(PROMPT, limit=1)
    assert iter(session) is session
    latents: Tensor = next(session).latents
    assert latents.ndim == 4


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["absolute", "window"])
def test_hundreds_of_chunks_cost_what_the_first_ones_did(runtime: Runtime, positions: Positions) -> None:
    """Memory, what is kept of the past, and time; a thousand frames on, nothing has grown."""
    stream = replace(runtime.stream, positions=positions, steps=(1000.0, 500.0))
    with runtime.session(PROMPT, stream=stream, history=4) as session:
        cpu_ms, held = [], []
        for number in range(400):
            began = time.process_time()
            chunk = next(session)
            cpu_ms.append((time.process_time() - began) * 1e3)
            assert np.isfinite(chunk.latents.numpy()).all()
            if number % 50 == 49:
                session.prompt = f"a {('red', 'blue')[number // 50 % 2]} circle"  # recaches the ring
            if number in (99, 399):
                del chunk
                gc.collect()
                held.append(sum(type(one) is Tensor for one in gc.get_objects()))
        assert list(session._at.past) == [0, 1, 2, *range(1197, 1200)] and len(session._history) == 4
    assert held[0] == held[1]
    assert np.median(cpu_ms[300:]) < 1.5 * np.median(cpu_ms[20:120])
