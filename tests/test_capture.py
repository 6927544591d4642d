"""Captured work: a stream on graphs is the stream without them, and nothing is captured twice.

CUDA graphs are stood in for by tapes: each operation of the captured work, done again on the very tensors of the
capture. As on a GPU, whatever a Python value decided stays as it was, and whatever a new tensor took the place of is
not seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sfrt.denoising
import sfrt.ops.rolling_kv
from sfrt import Chunk, Runtime, Session
from sfrt.backends.spare import Spare
from sfrt.backends.torch import TorchBackend
from sfrt.capture import CudaRecorder, Graphs
from sfrt.config import StreamConfig
from sfrt.decoders.captured import CapturedTaehv
from sfrt.denoising import KernelNoise
from sfrt.noise import seed_bits
from sfrt.stage import PhiloxNoise, Stage

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, OTHER = "a red circle moving left on a white background", "a blue square moving right on a black background"


def write_by_index(rings: tuple[Tensor, ...], values: tuple[Tensor, ...], slots: Tensor) -> None:
    """As sfrt.ops.rolling_kv writes where it cannot look at the slots."""
    tokens = len(values[0]) // len(slots)
    for ring, x in zip(rings, values, strict=True):
        ring.unflatten(1, (-1, tokens)).index_copy_(1, slots, x.unflatten(0, (-1, tokens)).permute(2, 0, 1, 3))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(sfrt.ops.rolling_kv, "_write", write_by_index)


class Tape(TorchDispatchMode):
    """Operations in the order in which they were done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("captured work looks at a value, for which a GPU would have to be waited for")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors_in(result)))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        """Do all of it again, results going where they went."""
        for func, args, kwargs, places in self.calls:
            for place, value in zip(places, tensors_in(func(*args, **kwargs)), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)

    @torch.inference_mode()
    def spoil(self, spared: set[int]) -> None:
        """Let no result of the capture itself be taken for one of a replay."""
        for _, _, _, places in self.calls:
            for place in places:
                if place.is_floating_point() and place.untyped_storage().data_ptr() not in spared:
                    place.fill_(torch.nan)


def tensors_in(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


class TapeRecorder:
    """Captures on tapes."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tape, tuple[Tensor, ...]]:
        with Tape() as tape:
            outputs = work()
        made: set[int] = set()
        there: set[int] = set()
        for _, args, kwargs, places in tape.calls:
            there |= {one.untyped_storage().data_ptr() for one in arguments(args, kwargs)} - made
            made |= {place.untyped_storage().data_ptr() for place in places} - there
        tape.spoil(there)
        self.tapes.append(tape)
        return tape, outputs


def arguments(args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Those that have memory of the plain kind."""
    return (one for one in tensors_in((args, kwargs)) if not one.is_mkldnn)


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> Runtime:
    return Runtime(tiny_bundle, device="cpu", backend="torch")


@pytest.fixture
def taped(tiny_bundle: Path) -> tuple[Runtime, TapeRecorder]:
    """A runtime that captures its passes and its decodes, and what it captures."""
    runtime, recorder = Runtime(tiny_bundle, device="cpu", backend="torch"), TapeRecorder()
    assert isinstance(runtime._transformer, TorchBackend) and runtime._decoder is not None
    runtime._transformer._recorder = recorder
    runtime._decoder = CapturedTaehv(runtime._decoder, recorder)
    return runtime, recorder


def take(session: Session, chunks: int) -> list[Chunk]:
    return list(itertools.islice(session, chunks))


def assert_same(ours: list[Chunk], theirs: list[Chunk]) -> None:
    """The very bytes."""
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.latents, other.latents), one.index
        assert np.array_equal(one.frames, other.frames), one.index


def steered(session: Session) -> list[Chunk]:
    """A stream past its ring's end, with every kind of switch on its way."""
    chunks = take(session, 7)
    for how, over in (("cross", 1), ("recache", 1), ("blend", 2)):
        session.switch(OTHER if how != "recache" else PROMPT, how=how, over=over)  # type: ignore[arg-type]
        chunks += take(session, 3)
    return chunks


STREAMS: dict[str, dict[str, Any]] = {
    "rolling": {"window": 6, "sink": 0},
    "sinks": {"window": 7, "sink": 2},
    "positions in the window": {"window": 7, "sink": 2, "positions": "window"},
    "frame by frame": {"window": 4, "chunk": 1, "sink": 1},
    "a short first chunk": {"window": 6, "first_chunk": 1, "sink": 0},
    "euler": {"window": 6, "sampler": "euler", "sink": 0},
    "rebuilt": {"window": 6, "refresh": "rebuild", "sink": 0},
}


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS)
def test_a_stream_on_graphs_is_the_stream_without(
    plain: Runtime, taped: tuple[Runtime, TapeRecorder], settings: dict[str, Any]
) -> None:
    runtime, recorder = taped
    stream = replace(plain.stream, **settings)
    with plain.session(PROMPT, seed=5, stream=stream) as session:
        wanted = steered(session)
    with runtime.session(PROMPT, seed=5, stream=stream) as session:
        made = steered(session)
        assert_same(made, wanted)
        counts = []
        for prompt in (OTHER, PROMPT, OTHER):  # the second recache finds all that the first one did
            session.switch(prompt)
            take(session, 4)
            counts.append(len(recorder.tapes))
        assert 0 < counts[0] == counts[2]
        settled = counts[2]
        session.switch("a green triangle")
        take(session, 4)
        assert len(recorder.tapes) == settled, "neither a switch nor a ring that goes round is captured anew"


def kernel_noise(stage: Stage, frames: range, steps: int) -> Any:
    """As sfrt.denoising.noise_of on a GPU."""
    noise = stage.noise
    assert isinstance(noise, PhiloxNoise)
    counters = torch.tensor([seed_bits(noise.seed)]), torch.tensor([frames.start])
    return counters, partial(KernelNoise, size=(len(frames), noise.tokens, noise.token_dim), ops=stage.ops)


def test_noise_made_by_kernels_is_captured_with_its_counters(
    plain: Runtime, taped: tuple[Runtime, TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, _ = taped
    with plain.session(PROMPT, seed=5) as session:
        wanted = take(session, 9)
    monkeypatch.setattr(sfrt.denoising, "noise_of", kernel_noise)
    with runtime.session(PROMPT, seed=5) as session:
        assert_same(take(session, 9), wanted)


def test_a_source_is_captured_too(plain: Runtime, taped: tuple[Runtime, TapeRecorder]) -> None:
    clip = torch.rand(9 + 12 * 6, 3, plain.stream.height, plain.stream.width)
    stream = replace(plain.stream, window=6)
    both = []
    for runtime in (plain, taped[0]):
        with runtime.session(PROMPT, source=clip, strength=0.6, stream=stream) as session:
            both.append(list(session))
    assert_same(*both)


def test_rewound_restored_and_watched(plain: Runtime, taped: tuple[Runtime, TapeRecorder], tmp_path: Path) -> None:
    stream, both = replace(plain.stream, window=6), []
    for runtime in (plain, taped[0]):
        with runtime.session(PROMPT, stream=stream, history=3) as session:
            made = take(session, 5)
            session.rewind(2)
            session.watched = True
            made += take(session, 4)
            session.snapshot(tmp_path / "kept")
        with runtime.restore(tmp_path / "kept") as session:
            made += take(session, 3)
        both.append(made)
    assert_same(*both)
    for one, other in zip(*both, strict=True):
        assert (one.previews is None) == (other.previews is None)
        assert one.previews is None or np.array_equal(one.previews, other.previews)


def test_a_spare_rollout_brings_its_graphs_along(plain: Runtime, taped: tuple[Runtime, TapeRecorder]) -> None:
    """The first stream runs as it is while its ring fills, the second captures, the third finds all there."""
    runtime, recorder = taped
    runtime._spare = Spare()
    stream = replace(plain.stream, window=9)
    counts = []
    for seed in range(3):
        with plain.session(OTHER, seed=seed, stream=stream) as session:
            wanted = take(session, 5)
        with runtime.session(OTHER, seed=seed, stream=stream) as session:
            assert_same(take(session, 5), wanted)
        counts.append(len(recorder.tapes))
    assert counts[0] < counts[1] == counts[2]


def test_a_spare_rollout_is_for_its_own_kind_and_counts_as_free(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle, device="cpu", backend="torch")
    runtime._spare = spare = Spare()
    runtime.session(PROMPT).close()
    ring = runtime.memory().parts["ring"] + runtime.memory().parts["prompt"]
    assert spare.size == ring
    runtime.session(PROMPT, stream=replace(runtime.stream, height=64)).close()
    assert spare.size > ring, "the larger one has taken its place"
    session = runtime.session(PROMPT)
    assert spare.size == 0, "what is of no use makes room"
    session.close()
    assert spare.size == ring


def test_a_spare_rollout_goes_by_its_streams_own_sampler(
    plain: Runtime, taped: tuple[Runtime, TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, _ = taped
    runtime._spare = Spare()
    monkeypatch.setattr(sfrt.denoising, "noise_of", kernel_noise)
    for sampler in ("renoise", "renoise", "euler"):
        stream = replace(plain.stream, window=6, sampler=sampler)
        with plain.session(PROMPT, stream=stream) as session:
            wanted = take(session, 4)
        with runtime.session(PROMPT, stream=stream) as session:
            assert_same(take(session, 4), wanted)


def test_what_was_captured_in_inference_mode_runs_outside_of_it(
    plain: Runtime, taped: tuple[Runtime, TapeRecorder]
) -> None:
    stream, both = replace(plain.stream, window=6), []
    for runtime in (plain, taped[0]):
        with runtime.session(PROMPT, stream=stream) as session:
            with torch.inference_mode():
                made = take(session, 5)
            both.append(made + take(session, 2))
    assert_same(*both)


def test_warming_up_leaves_nothing_to_capture(taped: tuple[Runtime, TapeRecorder]) -> None:
    runtime, recorder = taped
    runtime._spare = Spare()
    stream = replace(runtime.stream, window=9)
    for _ in range(2):  # which a GPU's runtime does by itself
        runtime.warm_up(stream)
    before = len(recorder.tapes)
    with runtime.session(PROMPT, stream=stream) as session:
        take(session, 6)
    assert len(recorder.tapes) == before


def test_work_is_captured_when_it_comes_again_and_outputs_are_the_callers() -> None:
    recorder = TapeRecorder()
    graphs, weight = Graphs(recorder), torch.tensor([2.0])

    def work(x: Tensor) -> tuple[Tensor, ...]:
        return (x * weight,)

    outputs = []
    for value, tapes in ((1.0, 0), (3.0, 1), (5.0, 1)):
        outputs += graphs.launch("double", work, torch.tensor([value]))
        assert len(recorder.tapes) == tapes
    weight.fill_(10.0)
    outputs += graphs.launch("double", work, torch.tensor([5.0]))
    assert [float(output) for output in outputs] == [2.0, 6.0, 10.0, 50.0]


def test_every_thread_runs_work_once_before_it_captures() -> None:
    recorder = TapeRecorder()
    graphs = Graphs(recorder)

    def launch() -> int:
        graphs.launch("more", lambda x: (x + 1,), torch.ones(1))
        return len(recorder.tapes)

    assert launch() == 0
    with ThreadPoolExecutor(1) as other:
        assert [other.submit(launch).result() for _ in range(2)] == [0, 1]
    assert launch() == 1, "what one thread has captured is every other's"


def test_a_capture_that_fails_leaves_nothing_behind() -> None:
    recorder, faults = TapeRecorder(), iter((False, True, False, False))
    graphs = Graphs(recorder)

    def work(x: Tensor) -> tuple[Tensor, ...]:
        if next(faults):
            raise KeyboardInterrupt
        return (x + 1,)

    one = torch.ones(1)
    graphs.launch("more", work, one)
    with pytest.raises(KeyboardInterrupt):
        graphs.launch("more", work, one)
    assert float(*graphs.launch("more", work, one)) == 2.0
    assert len(recorder.tapes) == 1


def test_what_cannot_be_captured_runs_as_it_is() -> None:
    """Here, work that looks at a value."""
    graphs = Graphs(TapeRecorder())

    def work(x: Tensor) -> tuple[Tensor, ...]:
        return (x * float(x),)

    graphs.launch("square", work, torch.ones(1))
    with pytest.warns(UserWarning, match="looks at a value"):
        squares = [*graphs.launch("square", work, torch.full((1,), 2.0))]
    squares += graphs.launch("square", work, torch.full((1,), 3.0))
    assert [float(square) for square in squares] == [4.0, 9.0]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS)
def test_a_captured_stream_on_a_gpu(tiny_bundle: Path, settings: dict[str, Any]) -> None:
    runtime = Runtime(tiny_bundle, device="cuda", backend="torch", dtype="bfloat16")
    stream: StreamConfig = replace(runtime.stream, **settings)
    made = []
    for _ in range(3):  # as it is, captured, replayed
        with runtime.session(PROMPT, seed=5, stream=stream) as session:
            made.append(steered(session))
    assert_same(made[1], made[0])
    assert_same(made[2], made[0])


@pytest.mark.gpu
def test_another_kind_is_captured_once_the_graphs_of_the_first_are_gone(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle, device="cuda", backend="torch", dtype="bfloat16")
    for window in (6, 9):
        runtime.warm_up(replace(runtime.stream, window=window))


@pytest.mark.gpu
def test_a_capture_that_waits_for_the_gpu_fails_and_the_next_one_does_not() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    graphs, waits = Graphs(CudaRecorder(device)), iter((False, True, False, False))

    def work(x: Tensor) -> tuple[Tensor, ...]:
        return (x + (float(x) if next(waits) else 1.0),)

    one = torch.ones(1, device=device)
    graphs.launch("more", work, one)
    with pytest.raises(RuntimeError):
        graphs.launch("more", work, one)
    torch.cuda.empty_cache()  # torch refuses to while it takes a capture to go on
    assert float(*graphs.launch("more", work, one)) == 2.0
