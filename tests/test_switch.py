"""Prompts that change while a stream runs: when, how, at what cost, and what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfrt import BundleError, Chunk, ConfigError, PromptError, Runtime, Session
from sfrt.capture import Eager
from sfrt.ops.layout import tokens_from_latents
from sfrt.ring import ChunkPlan
from sfrt.switching import How, Switch, Text
from tests.command_line import Run
from tests.streams import same, take

RED, BLUE, GREEN = (
    f"a {colour} circle moving left on a {ground} background"
    for colour, ground in (("red", "white"), ("blue", "black"), ("green", "yellow"))
)
WAYS: tuple[tuple[How, int], ...] = (("recache", 1), ("cross", 1), ("blend", 3))
on_each_backend = pytest.mark.parametrize("any_runtime", ["tiny on torch", "built-in on onnx"], indirect=True)


class Watched(Eager):
    """The rollout of a session, and what it is asked for from now on."""

    def __init__(self, session: Session) -> None:
        stage = session._stage
        assert stage is not None
        self._rollout = stage.rollout
        self.asked: list[tuple[str, Any]] = []
        session._stage = session._context._stage = replace(stage, rollout=self)

    def set_text(self, embeds: Tensor) -> None:
        self._ask("set_text", embeds)

    def place(self, plan: ChunkPlan) -> None:
        self._ask("place", plan)

    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        return cast(Tensor, self._ask("flow", tokens, timestep))

    def refresh(self, tokens: Tensor, timestep: float) -> None:
        self._ask("refresh", tokens, timestep)

    def state(self) -> Any:
        return self._rollout.state()

    def load_state(self, state: Any) -> None:
        self._rollout.load_state(state)

    def _ask(self, name: str, *arguments: Any) -> Any:
        self.asked.append((name, arguments[0]))
        return getattr(self._rollout, name)(*arguments)

    def order(self) -> list[str]:
        """What was asked for, runs of the same as one."""
        return [name for name, _ in itertools.groupby(name for name, _ in self.asked)]

    def of(self, kind: str) -> list[Any]:
        return [what for name, what in self.asked if name == kind]


@on_each_backend
@pytest.mark.parametrize(("how", "over"), WAYS)
def test_a_switch_takes_effect_where_the_next_chunk_begins(any_runtime: Runtime, how: How, over: int) -> None:
    with any_runtime.session(RED, seed=3) as session:
        expected = take(session, 6)
    with any_runtime.session(RED, seed=3) as session:
        made = take(session, 4)
        session.switch(BLUE, how, over)
        assert session.prompt == BLUE
        made += take(session, 2)
    assert same(made[:4], expected[:4])
    assert not torch.allclose(made[4].latents, expected[4].latents, atol=1e-3)
    receipts = [chunk.receipt for chunk in made]
    assert [receipt is not None for receipt in receipts] == [False] * 4 + [True, False]
    receipt = receipts[4]
    assert receipt is not None
    assert (receipt.prompt, receipt.how, receipt.over, receipt.chunk) == (BLUE, how, over, 4)
    timings = made[4].timings
    assert receipt.ms >= timings.switch_ms > 0 == made[5].timings.switch_ms
    assert timings.chunk_ms >= timings.switch_ms + timings.dit_ms
    assert (timings.refresh_ms == 0) is (how == "recache"), "a replay makes up for the refresh pass"


@pytest.mark.parametrize("how", ["recache", "cross", "blend"])
def test_before_the_first_chunk_it_is_the_prompt(any_runtime: Runtime, how: How) -> None:
    with any_runtime.session(BLUE, seed=3) as session:
        expected = take(session, 2)
    with any_runtime.session(RED, seed=3) as session:
        session.switch(BLUE, how)
        assert same(take(session, 2), expected)


def test_recache_replays_the_window_under_the_new_text(runtime: Runtime) -> None:
    with runtime.session(RED) as session:
        chunks = take(session, 5)
        watched = Watched(session)
        session.prompt = BLUE
        session.refresh()  # asked for early, it leaves the work to the recache
        assert watched.asked == []
        next(session)
        frames = [*range(3), *range(12, 15)]  # the sinks and the chunk before; the ring has 9 slots
        assert list(session._at.past) == [*range(3), *range(15, 18)]
    assert watched.order() == ["set_text", "place", "refresh", "place", "refresh", "place", "flow"]
    assert torch.equal(watched.of("set_text")[0], runtime._embeddings(BLUE))
    latents = torch.cat([chunk.latents for chunk in chunks])[frames]
    assert torch.equal(torch.cat(watched.of("refresh")), tokens_from_latents(latents, runtime.manifest.model))
    assert [list(plan.positions) for plan in watched.of("place")] == [[0, 1, 2], [12, 13, 14], [15, 16, 17]]


def test_cross_changes_the_text_alone(any_runtime: Runtime) -> None:
    with any_runtime.session(RED) as session:
        take(session, 4)
        session.refresh()
        watched = Watched(session)
        before = {name: tensor.clone() for name, tensor in watched.state().items()}
        session.switch(BLUE, "cross")
        with torch.no_grad():
            session._context.turn_to(session._waiting, session._at, session._watch)
        assert watched.order() == ["set_text"]
        assert all(torch.equal(tensor, before[name]) for name, tensor in watched.state().items())


def test_what_the_last_chunk_owes_is_done_under_its_own_text(runtime: Runtime) -> None:
    with runtime.session(RED) as session:
        take(session, 2)
        watched = Watched(session)
        session.switch(BLUE, "cross")
        next(session)
    assert watched.order() == ["refresh", "set_text", "place", "flow"]


def test_a_blend_moves_by_equal_steps(runtime: Runtime) -> None:
    with runtime.session(RED) as session:
        take(session, 1)
        watched = Watched(session)
        session.switch(BLUE, "blend", over=4)
        receipts = [chunk.receipt for chunk in take(session, 6)]
    start, end = (runtime._embeddings(prompt) for prompt in (RED, BLUE))
    heard = watched.of("set_text")
    assert len(heard) == 4 and [receipt is None for receipt in receipts] == [False] + 5 * [True]
    for number, embeds in enumerate(heard, start=1):
        assert torch.allclose(embeds, torch.lerp(start, end, number / 4), atol=1e-6)
    assert torch.equal(heard[-1], end), "it ends where it was to go, not near it"


@given(st.integers(1, 40))
def test_blends_of_any_length_arrive(over: int) -> None:
    start, end = torch.tensor([1.0, -5.0]), torch.tensor([0.0, 7.0])
    text = Switch("there", end, "blend", over).onto(Text.of("here", start))
    for number in range(1, over):
        assert torch.allclose(text.embeds, torch.lerp(start, end, number / over), atol=1e-5) and text.left
        text = text.onward()
    assert text.embeds is end and text.onward() is text


def test_a_blend_that_is_broken_off_goes_on_from_where_it_was(runtime: Runtime) -> None:
    with runtime.session(RED) as session:
        session.switch(BLUE, "blend", over=2)
        take(session, 1)
        watched = Watched(session)
        session.switch(GREEN, "blend", over=2)
        take(session, 2)
    red, blue, green = (runtime._embeddings(prompt) for prompt in (RED, BLUE, GREEN))
    halfway = (red + blue) / 2
    assert torch.allclose(watched.of("set_text")[0], (halfway + green) / 2, atol=1e-6)
    assert torch.equal(watched.of("set_text")[1], green)


@on_each_backend
def test_of_two_switches_in_one_chunk_the_last_wins(any_runtime: Runtime) -> None:
    with any_runtime.session(RED, seed=1) as session:
        take(session, 2)
        session.switch(GREEN, "cross")
        expected = take(session, 2)
    with any_runtime.session(RED, seed=1) as session:
        take(session, 2)
        session.switch(BLUE)
        session.switch(GREEN, "cross")
        made = take(session, 2)
    assert same(made, expected) and made[0].receipt is not None
    assert (made[0].receipt.prompt, made[0].receipt.how) == (GREEN, "cross")


def test_switches_while_a_chunk_is_made_wait_for_the_next(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.session(RED, seed=1) as session:
        expected = take(session, 2)
    with runtime.session(RED, seed=1) as session:
        made = take(session, 1)
        assert session._stage is not None
        rollout = session._stage.rollout
        flow, prompts = rollout.flow, iter((BLUE, GREEN))

        def interrupting(tokens: Tensor, timestep: float) -> Tensor:
            if (prompt := next(prompts, None)) is not None:
                session.prompt = prompt
            return flow(tokens, timestep)

        session.switch(RED, "cross")  # is in effect when the others come, and must not take them along
        monkeypatch.setattr(rollout, "flow", interrupting)
        made += take(session, 2)
    assert same(made[:2], expected)
    assert [chunk.receipt.prompt if chunk.receipt else None for chunk in made] == [None, RED, GREEN]


@on_each_backend
def test_recaching_the_same_prompt_changes_nothing_while_none_was_evicted(any_runtime: Runtime) -> None:
    with any_runtime.session(RED, seed=2) as session:
        expected = take(session, 3)
    with any_runtime.session(RED, seed=2) as session:
        made = take(session, 2)
        session.prompt = RED
        made += take(session, 1)
    assert torch.allclose(made[2].latents, expected[2].latents, atol=1e-4)


@pytest.mark.parametrize(("how", "over"), WAYS)
@pytest.mark.parametrize("refresh", ["rebuild", "reencode"])
def test_where_every_chunk_replays_a_switch_does_so_once(runtime: Runtime, refresh: Any, how: How, over: int) -> None:
    stream = replace(runtime.stream, refresh=refresh, positions="window", window=6, sink=0)
    with runtime.session(RED, stream=stream) as session:
        take(session, 3)
        watched = Watched(session)
        session.switch(BLUE, how, over)
        made = take(session, 2)
    assert len(watched.of("refresh")) == 2, "one piece of three frames before each chunk"
    assert (watched.order()[0] == "set_text") is (how == "recache")
    assert made[0].receipt is not None


def failing(session: Session, monkeypatch: pytest.MonkeyPatch, method: str, after: int) -> None:
    """Interrupt this call of the session's rollout, once."""
    assert session._stage is not None
    call, calls = getattr(session._stage.rollout, method), itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == after:
            raise KeyboardInterrupt
        return call(*arguments)

    monkeypatch.setattr(session._stage.rollout, method, interrupted)


@pytest.mark.parametrize(("method", "after"), [("set_text", 0), ("refresh", 0), ("flow", 1)])
@pytest.mark.parametrize(("how", "over"), WAYS)
def test_an_interrupted_switch_is_made_again(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, how: How, over: int, method: str, after: int
) -> None:
    def run(session: Session, interrupt: bool) -> list[Chunk]:
        take(session, 4)
        session.switch(BLUE, how, over)
        if interrupt:
            failing(session, monkeypatch, method, after)
            with pytest.raises(KeyboardInterrupt):
                next(session)
            assert session.prompt == BLUE
        return take(session, 3)

    with runtime.session(RED, seed=5) as session:
        expected = run(session, interrupt=False)
    with runtime.session(RED, seed=5) as session:
        made = run(session, interrupt=True)
    assert same(made, expected)
    assert [chunk.receipt is not None for chunk in made] == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("   ",), PromptError, "empty"),
        ((7,), PromptError, "not text"),
        (("\ud800",), PromptError, "surrogate"),
        ((torch.zeros(5, 24),), PromptError, r"give floats \[12, 24\]"),
        ((BLUE, "sideways"), ConfigError, "choose one of: recache, cross, blend"),
        ((BLUE, "blend", 0), ConfigError, "over 0 chunks"),
        ((BLUE, "cross", 2), ConfigError, "over 2 chunks"),
    ],
)
def test_a_refused_switch_changes_nothing(
    runtime: Runtime, arguments: tuple[Any, ...], error: type[Exception], says: str
) -> None:
    with runtime.session(RED, seed=4) as session:
        expected = take(session, 3)
    with runtime.session(RED, seed=4) as session:
        made = take(session, 2)
        with pytest.raises(error, match=says):
            session.switch(*arguments)
        assert session.prompt == RED
        assert same([*made, *take(session, 1)], expected)


@on_each_backend
@pytest.mark.filterwarnings("ignore:the prompt has .* tokens:UserWarning")
@pytest.mark.parametrize(
    "prompt", ["\x00\x1b[2J\x07\u202e red", "red \x7f\ufeff\u0000" * 50, "a red circle " * 8000, "&lt;" * 25_000]
)
def test_poisoned_prompts_do_no_harm(any_runtime: Runtime, prompt: str) -> None:
    """Control characters, and a hundred thousand of any: read as far as the model reads."""
    with any_runtime.session(RED) as session:
        next(session)
        session.prompt = prompt
        chunk = next(session)
        assert torch.isfinite(chunk.latents).all() and chunk.receipt is not None and chunk.receipt.prompt == prompt
        session.prompt = BLUE
        assert torch.isfinite(next(session).latents).all()


def test_embeddings_are_prompts_too(runtime: Runtime) -> None:
    embeds = runtime._embeddings(BLUE).clone()
    with runtime.session(RED, seed=1) as session, runtime.session(RED, seed=1) as other:
        take(session, 2), take(other, 2)
        session.prompt, other.prompt = BLUE, embeds
        assert other.prompt is embeds
        embeds.zero_()  # they are their owner's
        ours, theirs = take(session, 2), take(other, 2)
    assert same(ours, theirs) and theirs[0].receipt is not None and theirs[0].receipt.prompt is None


def test_sessions_that_cannot_switch_say_so(runtime: Runtime, tmp_path: Path) -> None:
    session = runtime.session(RED)
    assert session._stage is not None
    alone = Session(replace(session._stage, origin=None), torch.zeros(12, 24))
    with pytest.raises(ConfigError, match="no runtime to ask"):
        alone.switch(BLUE)
    session.close()
    with pytest.raises(ConfigError, match="closed"):
        session.prompt = BLUE
    assert session.prompt == RED


def test_a_bundle_without_text_encoder_says_so_when_asked(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Runtime(runtime._bundle.path, device="cpu", backend="torch")
    with other.session(torch.randn(12, 24), seed=2) as session:
        next(session)

        def missing(*_: Any, **__: Any) -> Any:
            raise BundleError("the bundle has no text_encoder.safetensors")

        monkeypatch.setattr("sfrt.runtime.text_encoder_of", missing)
        with pytest.raises(BundleError, match="no text_encoder"):
            session.prompt = BLUE
        assert next(session).receipt is None


@pytest.mark.parametrize(("how", "over"), [("recache", 1), ("cross", 1), ("blend", 2)])
@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_the_built_in_model_shows_the_new_colours_within_two_chunks(backend: str, how: How, over: int) -> None:
    if backend == "onnx":
        pytest.importorskip("onnxruntime", minversion="1.25")
    with Runtime(device="cpu", backend=backend).session(RED, seed=1) as session:
        before = take(session, 4)[-1].frames[-1]
        session.switch(BLUE, how, over)
        after = take(session, 2)[-1].frames[-1]
    ground_before, ground_after = (np.median(frame, axis=(0, 1)) for frame in (before, after))
    assert ground_before.min() > 200 and ground_after.max() < 60, "from white to black"
    red, blue = ((after[..., one] > 160) & (after[..., other] < 100) for one, other in ((0, 2), (2, 0)))
    assert blue.sum() > 200 > 20 > red.sum(), "a blue circle, no red one"


WINDOWS: dict[str, dict[str, Any]] = {
    "sinks": {"sink": 3},
    "positions in the window": {"sink": 3, "positions": "window"},
    "odd": {"sink": 1, "window": 8},
}


@pytest.mark.parametrize("settings", WINDOWS.values(), ids=WINDOWS)
def test_a_recached_stream_rolls_on(runtime: Runtime, settings: dict[str, Any]) -> None:
    with runtime.session(RED, stream=replace(runtime.stream, **settings)) as session:
        for _ in range(3):
            assert all(np.isfinite(chunk.latents.numpy()).all() for chunk in take(session, 3))
            session.prompt = BLUE if session.prompt == RED else RED


def test_the_command_line_switches(run: Run) -> None:
    later = ("--then", f"1.4:{GREEN}", "--then", f"0.7:{BLUE}")
    done = run("generate", RED, "-o", "out.gif", "--chunks", 5, *later, "--json")
    assert done.code == 0, done.err
    made = [(one["chunk"], one["prompt"], one["how"]) for one in json.loads(done.out)["switches"]]
    assert made == [(2, BLUE, "recache"), (3, GREEN, "recache")], "chunks begin with frames 0, 9, 21 and 33"


@pytest.mark.parametrize("text", ["soon:blue", "blue", "-1:blue", "nan:blue", "2:  "])
def test_the_command_line_refuses_what_is_no_switch(run: Run, text: str) -> None:
    done = run("generate", RED, "-o", "out.gif", "--chunks", 1, "--then", text)
    assert "is no SECONDS:PROMPT" in done.complaint and not Path("out.gif").exists()
