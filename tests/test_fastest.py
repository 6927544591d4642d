"""The fastest implementation: what is timed, what may not win, what is remembered, and files that nobody can read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sfrt.ops import choice
from sfrt.ops.attention import ATTENTION, ATTENTION_FLOAT8, attention, workload
from sfrt.ops.choice import Ops
from sfrt.ops.fastest import RUNS, WARM_UPS, Clock, Events, Memory, Ranking, fastest, key_of, measure, user_memory
from sfrt.ops.interpreter import mended_interpreter
from sfrt.ops.op import Draw, Maker

CPU = torch.device("cpu")
HALF = torch.float16
MAKE = workload(20, 30, 2, 16, ring=40)
AROUND = {"gpu": "NVIDIA H200", "driver": "580.65"}


class Time:
    """A clock that stands still but for what is told to take time, and counts the calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def __call__(self) -> float:
        return self.seconds

    def taken_by(self, function: Callable[..., Any], *seconds: float) -> Callable[..., Any]:
        """The function, its calls taking these seconds, and from then on the last of them."""
        left = list(seconds)

        def slow(**inputs: Any) -> Any:
            self.calls += 1
            self.seconds += left.pop(0) if len(left) > 1 else left[0]
            return function(**inputs)

        return slow

    def stopwatch(self) -> Clock:
        return Clock(self)


def choose(
    time: Time, candidates: Mapping[str, Callable[..., Any]], memory: Memory, around: Mapping[str, str] = AROUND
) -> Ranking:
    return fastest(ATTENTION, candidates, MAKE, HALF, CPU, around=around, memory=memory, stopwatch=time.stopwatch)


def run(candidates: Mapping[str, Callable[..., Any]], time: Time) -> Ranking:
    return measure(ATTENTION, candidates, MAKE, Draw(HALF, CPU), time.stopwatch)


@pytest.fixture
def triton_kernel() -> Iterator[Callable[..., Any]]:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton interprets nothing where there is a GPU")
    with mended_interpreter():
        yield ATTENTION.load("triton")


@pytest.mark.parametrize(("torch_takes", "triton_takes", "winner"), [(0.002, 0.001, "triton"), (0.001, 0.002, "torch")])
def test_the_fastest_wins(
    torch_takes: float, triton_takes: float, winner: str, triton_kernel: Callable[..., Any]
) -> None:
    time = Time()
    candidates = {
        "torch": time.taken_by(attention, torch_takes),
        "triton": time.taken_by(triton_kernel, triton_takes),
    }
    ranking = run(candidates, time)
    assert ranking.winner == winner
    assert ranking.trials == pytest.approx({"torch": 1e3 * torch_takes, "triton": 1e3 * triton_takes})
    assert time.calls == 2 * (1 + WARM_UPS + RUNS), "one to look at the result"


def test_first_calls_and_a_hiccup_count_for_nothing() -> None:
    time = Time()
    calm = [0.002] * (1 + WARM_UPS + RUNS)
    late = [5.0] * (1 + WARM_UPS) + [0.001] * 4 + [5.0] + [0.001]
    ranking = run({"calm": time.taken_by(attention, *calm), "late": time.taken_by(attention, *late)}, time)
    assert ranking.trials == pytest.approx({"calm": 2.0, "late": 1.0})
    assert str(ranking) == "late 1.000 ms, calm 2.000 ms"


def nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.full_like(q, float("nan"))


def keys_missed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k[:, :-1], v[:, :-1])


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q.float(), k.float(), v.float())


def refused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def silent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (nan, "off by nan"),
        (keys_missed, "off by "),
        (in_float32, "off by inf"),
        (refused, "no kernel image is available"),
        (silent, "NotImplementedError"),
    ],
)
def test_what_is_wrong_or_raises_is_out_with_the_reason(candidate: Callable[..., Any], said: str) -> None:
    time = Time()
    ranking = run({"torch": time.taken_by(attention, 1.0), "other": time.taken_by(candidate, 1e-6)}, time)
    assert ranking.winner == "torch"
    assert str(ranking.trials["other"]).startswith(said)
    assert str(ranking).startswith(f"torch 1000.000 ms; no other: {said}")


def test_what_the_reference_raises_is_nobodys_to_hide() -> None:
    broken = replace(ATTENTION, reference=refused)
    with pytest.raises(RuntimeError, match="no kernel image"):
        measure(broken, {"torch": broken.reference}, MAKE, Draw(HALF, CPU), Clock)


def test_a_second_start_measures_nothing(tmp_path: Path) -> None:
    time, path = Time(), tmp_path / "sfrt" / "fastest.json"
    candidates = {"torch": time.taken_by(attention, 2.0), "triton": time.taken_by(attention, 1.0)}
    first = choose(time, candidates, Memory(path))
    calls = time.calls
    assert choose(time, candidates, Memory(path)) == first
    assert time.calls == calls
    assert [each.name for each in path.parent.iterdir()] == ["fastest.json"], "nothing else is left behind"


def test_another_machine_or_choice_is_measured_anew(tmp_path: Path) -> None:
    time, memory = Time(), Memory(tmp_path / "fastest.json")
    candidates = {"torch": time.taken_by(attention, 2.0)}
    more = {**candidates, "flash2": time.taken_by(attention, 1.0)}
    for names, around in ((candidates, AROUND), (candidates, {**AROUND, "driver": "590.10"}), (more, AROUND)):
        calls = time.calls
        choose(time, names, memory, around)
        assert time.calls > calls
    assert len(json.loads((tmp_path / "fastest.json").read_text())) == 3


def test_a_key_tells_shapes_and_dtypes_apart_and_no_order() -> None:
    def key(make: Maker, dtype: torch.dtype, *names: str) -> str:
        return key_of("attention", names, make(Draw(dtype, torch.device("meta"))), AROUND)

    longer = workload(20, 31, 2, 16, ring=40)
    assert len({key(MAKE, HALF, "a", "b"), key(MAKE, torch.bfloat16, "a", "b"), key(longer, HALF, "a", "b")}) == 3
    assert key(MAKE, HALF, "a", "b") == key(MAKE, HALF, "b", "a")


def test_two_that_keep_keep_both(tmp_path: Path) -> None:
    path = tmp_path / "fastest.json"
    one, other = Ranking({"torch": 1.0}), Ranking({"torch": 2.0, "flash": "no kernel image"})
    Memory(path).keep("one", one)
    Memory(path).keep("other", other)
    assert Memory(path).recall("one") == one
    assert Memory(path).recall("other") == other
    assert Memory(path).recall("third") is None


NONSENSE = ["", "{", "[]", "null", '{"key": []}', '{"key": {}}', '{"key": {"torch": null}}', '{"key": {"torch": "no"}}']


@given(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(lambda text: json.dumps({"key": text}).encode())))
@example(b"[" * 100_000)
def test_no_file_is_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("cache") / "fastest.json"
    path.write_bytes(content)
    assert Memory(path).recall("key") is None
    Memory(path).keep("key", Ranking({"torch": 1.0}))
    assert Memory(path).recall("key") == Ranking({"torch": 1.0})


@pytest.mark.parametrize("content", NONSENSE)
def test_what_makes_no_sense_is_measured_again(tmp_path: Path, content: str) -> None:
    path = tmp_path / "fastest.json"
    path.write_text(content)
    assert Memory(path).recall("key") is None


def test_a_winner_that_is_not_there_is_measured_again(tmp_path: Path) -> None:
    time, memory = Time(), Memory(tmp_path / "fastest.json")
    candidates = {"torch": time.taken_by(attention, 1.0)}
    choose(time, candidates, memory)
    (key,) = json.loads((tmp_path / "fastest.json").read_text())
    memory.keep(key, Ranking({"flash9": 0.1}))
    assert choose(time, candidates, memory).winner == "torch"


def test_no_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (None, tmp_path / "file" / "fastest.json", tmp_path / "folder"):
        memory, time = Memory(path), Time()
        candidates = {"torch": time.taken_by(attention, 1.0)}
        for _ in range(2):
            calls = time.calls
            assert choose(time, candidates, memory).winner == "torch"
            assert time.calls > calls
    assert not list(tmp_path.glob("folder?*")), "no half-written file is left"


def test_memory_lies_where_caches_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = Ranking({"torch": 1.0})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for chosen, place in (
        (str(tmp_path / "caches"), tmp_path / "caches"),
        ("relative", tmp_path / "home" / ".cache"),  # the specification: to be ignored
        (None, tmp_path / "home" / ".cache"),
    ):
        if chosen is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", chosen)
        user_memory().keep("key", ranking)
        assert Memory(place / "sfrt" / "fastest.json").recall("key") == ranking


def test_nobodys_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(no_home))
    user_memory().keep("key", Ranking({"torch": 1.0}))
    assert user_memory().recall("key") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_is_remembered_is_chosen_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU that was measured before: nothing is run, so none is needed here."""
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "surroundings", lambda device: AROUND)
    cuda = torch.device("cuda")
    for op, make in ((ATTENTION, MAKE), (ATTENTION_FLOAT8, ATTENTION_FLOAT8.sizes["21 frames"])):
        names = ["torch", *(name for name in op.kernels if choice.why_not(op, name, cuda) is None)]
        key = key_of(op.name, names, make(Draw(torch.bfloat16, torch.device("meta"))), AROUND)
        user_memory().keep(key, Ranking({"torch": 2.0, "triton": 1.5, "cudnn": "no kernel image"}))
    ops = Ops(cuda, pins={}, workloads={"attention": MAKE})
    told = next(each for each in ops.choices if each.op == "attention")
    assert told.implementation == "triton"
    assert told.reason.startswith("the fastest: triton 1.500 ms, torch 2.000 ms; no cudnn: no kernel image; no flash3:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_kernel_is_measured_in_a_dtype_that_none_takes() -> None:
    ops = Ops(torch.device("cuda"), pins={}, dtype=torch.float32)
    assert ops(ATTENTION) is attention
    assert "no kernel takes torch.float32" in {each.reason for each in ops.choices}


@pytest.mark.gpu
def test_events_time_what_is_queued() -> None:
    watch, x = Events(), torch.randn(2048, 2048, device="cuda")
    watch.mark()
    for count in (1, 50):
        for _ in range(count):
            x = torch.nn.functional.normalize(x @ x)
        watch.mark()
    short, long = watch.laps()
    assert 0 < short < long


@pytest.mark.gpu
def test_attention_is_measured_at_load_and_then_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = Ops(torch.device("cuda"), pins={}, workloads={"attention": workload(1560, 4680, 12, 128)})
    written = os.stat(tmp_path / "sfrt" / "fastest.json").st_mtime_ns
    again = Ops(torch.device("cuda"), pins={}, workloads={"attention": workload(1560, 4680, 12, 128)})
    assert again.choices == first.choices
    assert os.stat(tmp_path / "sfrt" / "fastest.json").st_mtime_ns == written
    (told,) = (each for each in first.choices if each.op == "attention")
    assert told.reason.startswith(f"the fastest: {told.implementation} ")
