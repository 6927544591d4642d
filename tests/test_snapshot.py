"""A stream's state: kept on disk and brought back, forked, taken back; what is refused, and what a fault leaves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sfrt import ConfigError, Runtime, Session, SnapshotError
from sfrt.config import WanVaeConfig
from sfrt.decoders.wan_vae import WanVae
from sfrt.snapshot import Moment, read_snapshot, write_snapshot
from tests.full_disk import file_size_limit
from tests.streams import same, take

PROMPT, OTHER = "a red circle moving left", "a blue square moving left"
CPU = torch.device("cpu")


def at_the_start(session: Session) -> None:
    """Not a chunk made."""


def one_chunk(session: Session) -> None:
    next(session)


def rolled(session: Session) -> None:
    take(session, 5)


def recached(session: Session) -> None:
    take(session, 4)
    session.prompt = OTHER
    take(session, 2)


def blending(session: Session) -> None:
    take(session, 2)
    session.switch(OTHER, "blend", over=4)
    take(session, 1)


def about_to_switch(session: Session) -> None:
    take(session, 4)
    session.prompt = OTHER


def rewound(session: Session) -> None:
    take(session, 4)
    session.rewind(2)


SITUATIONS = (at_the_start, one_chunk, rolled, recached, blending, about_to_switch, rewound)
on_each_backend = pytest.mark.parametrize("any_runtime", ["tiny on torch", "built-in on onnx"], indirect=True)


@on_each_backend
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_restored_stream_goes_on_byte_for_byte(
    any_runtime: Runtime, situation: Callable[[Session], None], tmp_path: Path
) -> None:
    with any_runtime.session(PROMPT, seed=7, history=4) as session:
        situation(session)
        expected = take(session, 3)
    with any_runtime.session(PROMPT, seed=7, history=4) as session:
        situation(session)
        session.snapshot(tmp_path / "stream")
        prompt, kept_on = session.prompt, take(session, 3)
    with any_runtime.restore(tmp_path / "stream") as session:
        assert session.prompt == prompt
        session.snapshot(tmp_path / "again")  # before anything was run
        restored = take(session, 3)
    with any_runtime.restore(tmp_path / "again") as session:
        twice = take(session, 3)
    assert same(kept_on, expected) and same(restored, expected) and same(twice, expected)
    assert [chunk.receipt is None for chunk in restored] == [chunk.receipt is None for chunk in expected]


def test_every_model_and_backend_is_restored(any_runtime: Runtime, tmp_path: Path) -> None:
    with any_runtime.session(PROMPT, seed=7) as session:
        take(session, 4)
        session.snapshot(tmp_path / "stream")
        expected = take(session, 2)
    with any_runtime.restore(tmp_path / "stream") as session:
        assert same(take(session, 2), expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "sinks that move": {"sink": 3, "positions": "window"},
    "odd window": {"sink": 1, "window": 8},
    "short first chunk": {"first_chunk": 2, "window": 8, "sink": 2, "positions": "window"},
    "rebuilt": {"refresh": "rebuild", "window": 6, "sink": 0},
    "reencoded": {"refresh": "reencode", "window": 6, "sink": 0, "positions": "window"},
}


@on_each_backend
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_way_to_roll_is_kept(any_runtime: Runtime, settings: dict[str, Any], tmp_path: Path) -> None:
    stream = replace(any_runtime.stream, **settings)
    with any_runtime.session(PROMPT, seed=1, stream=stream) as session:
        take(session, 4)
        session.snapshot(tmp_path / "stream")
        expected = take(session, 4)
    with any_runtime.restore(tmp_path / "stream") as session:
        assert same(take(session, 4), expected)


def test_a_limited_stream_from_a_clip_ends_where_it_would(runtime: Runtime, tmp_path: Path) -> None:
    clip = torch.rand(17, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with runtime.session(PROMPT, initial=clip, limit=3, stream=replace(runtime.stream, window=None)) as session:
        next(session)
        session.snapshot(tmp_path / "stream")
        expected = list(session)
    with runtime.restore(tmp_path / "stream") as session:
        assert same(list(session), expected) and len(expected) == 2


def test_embeddings_come_back_as_the_prompt(runtime: Runtime, tmp_path: Path) -> None:
    embeds = torch.randn(12, 24)
    with runtime.session(embeds, seed=1) as session:
        next(session)
        session.prompt = embeds  # the same tensor twice, in effect and waiting
        session.snapshot(tmp_path / "stream")
        expected = take(session, 2)
    with runtime.restore(tmp_path / "stream") as session:
        assert torch.equal(torch.as_tensor(session.prompt), embeds)
        assert same(take(session, 2), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_as_it_is(tiny_bundle: Path, tmp_path: Path, dtype: str) -> None:
    half = Runtime(tiny_bundle, device="cpu", dtype=dtype, backend="torch")
    with half.session(PROMPT, seed=1) as session:
        take(session, 4)
        session.snapshot(tmp_path / "stream")
        expected = take(session, 2)
    with half.restore(tmp_path / "stream") as session:
        assert same(take(session, 2), expected)


def test_another_process_goes_on(runtime: Runtime, tmp_path: Path) -> None:
    with runtime.session(PROMPT, seed=1) as session:
        take(session, 4)
        session.snapshot(tmp_path / "stream")
        expected = take(session, 2)
    script = (
        "import sys, numpy as np\n"
        "from sfrt import Runtime\n"
        "session = Runtime(sys.argv[1], device='cpu', backend='torch').restore(sys.argv[2])\n"
        "np.save(sys.argv[3], np.concatenate([next(session).frames for _ in range(2)]))\n"
    )
    arguments = [str(runtime._bundle.path), str(tmp_path / "stream"), str(tmp_path / "frames.npy")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=120)
    assert np.array_equal(np.load(tmp_path / "frames.npy"), np.concatenate([chunk.frames for chunk in expected]))


@pytest.mark.gpu
def test_the_gpu_goes_on_byte_for_byte(tiny_bundle: Path, tmp_path: Path) -> None:
    there = Runtime(tiny_bundle, device="cuda")
    with there.session(PROMPT, seed=1, stream=replace(there.stream, positions="window")) as session:
        take(session, 4)
        session.snapshot(tmp_path / "stream")
        fork, expected = session.fork(), take(session, 3)
    with there.restore(tmp_path / "stream") as session:
        assert same(take(session, 3), expected) and same(take(fork, 3), expected)


def test_the_wan_vaes_state_is_kept_in_its_layout(runtime: Runtime, tmp_path: Path) -> None:
    """Channels last, as the next chunk's convolutions find it, and empty for layers that remember nothing."""
    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(dim=8, latent_channels=4, mean=(0.0,) * 4, std=(1.0,) * 4)).requires_grad_(False)
    with runtime.session(PROMPT) as session, torch.no_grad():
        _, state = vae.decode(torch.randn(1, 2, 4, 4, 6), None)
        saved = replace(session._saved(), at=Moment(session._at.text, decoder=state))
        write_snapshot(tmp_path / "stream", saved)
        again = read_snapshot(tmp_path / "stream", CPU).at.decoder
        latents = torch.randn(1, 2, 4, 4, 6)
        assert torch.equal(vae.decode(latents, again)[0], vae.decode(latents, state)[0])
    assert [[kept.stride() for kept in layer] for layer in again.layers] == [
        [kept.stride() for kept in layer] for layer in state.layers
    ]


# Forks


def test_forks_are_the_same_stream_until_they_are_told_apart(any_runtime: Runtime) -> None:
    with any_runtime.session(PROMPT, seed=2) as session:
        expected = take(session, 7)
    with any_runtime.session(PROMPT, seed=2) as session:
        take(session, 4)
        one, other = session.fork(), session.fork()
        other.prompt = OTHER
        ours, theirs, others = take(session, 1), take(one, 1), take(other, 3)
        ours, theirs = ours + take(session, 2), theirs + take(one, 2)  # in turn, on one model
    assert same(ours, expected[4:]) and same(theirs, expected[4:])
    assert session.prompt == one.prompt == PROMPT and other.prompt == OTHER
    assert not torch.allclose(others[0].latents, expected[4].latents, atol=1e-3)
    session.close()
    assert same(take(one, 1), take(one_more(any_runtime, 7), 1)), "a closed session takes nothing with it"


def one_more(runtime: Runtime, chunks: int) -> Session:
    """A stream that has made so many."""
    session = runtime.session(PROMPT, seed=2)
    take(session, chunks)
    return session


def test_a_fork_keeps_the_history(runtime: Runtime) -> None:
    with runtime.session(PROMPT, seed=2, history=3) as session:
        made = take(session, 3)
        fork = session.fork()
        fork.rewind(3)
        assert same(take(fork, 1), made[:1]) and fork._at.index == 1
        assert same(take(session, 1), take(one_more(runtime, 3), 1))


# Back in time


@on_each_backend
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_back_by_a_few_chunks_it_is_the_same_video(any_runtime: Runtime, chunks: int) -> None:
    with any_runtime.session(PROMPT, seed=3, history=3) as session:
        made = take(session, 3)
        session.rewind(chunks)
        again = take(session, chunks)
    for one, other in zip(again, made[3 - chunks :], strict=True):
        assert one.index == other.index
        assert torch.allclose(one.latents, other.latents, atol=1e-4)
        assert np.abs(one.frames.astype(int) - other.frames.astype(int)).max() <= 2


@on_each_backend
def test_back_behind_an_eviction_it_is_one_that_could_have_been(any_runtime: Runtime) -> None:
    with any_runtime.session(PROMPT, seed=3, history=4) as session:
        made = take(session, 7)
        session.rewind(3)
        again = take(session, 3)
        assert [chunk.index for chunk in again] == [4, 5, 6]
    reference = made[4].latents
    assert 1e-4 < float((again[0].latents - reference).norm() / reference.norm()) < 0.5


@on_each_backend
def test_the_prompt_of_then_comes_back(any_runtime: Runtime) -> None:
    with any_runtime.session(PROMPT, seed=3, history=4) as session:
        made = take(session, 2)
        session.prompt = OTHER
        take(session, 1)
        session.prompt = "a red square moving left"
        session.rewind(2)
        assert session.prompt == PROMPT
        again = take(session, 1)
        assert again[0].receipt is None
        assert torch.allclose(again[0].latents, made[1].latents, atol=1e-4)


def test_there_is_no_way_back_beyond_the_history(runtime: Runtime) -> None:
    with runtime.session(PROMPT, seed=3, history=2) as session, runtime.session(PROMPT) as without:
        expected = take(session, 4)
        take(without, 2)
        for chunks in (0, -1, 3):
            with pytest.raises(SnapshotError, match="it keeps 2; make the session with a longer history"):
                session.rewind(chunks)
        with pytest.raises(SnapshotError, match="it keeps 0"):
            without.rewind(1)
        session.rewind(2)
        again = take(session, 2)
    assert [chunk.index for chunk in again] == [2, 3] == [chunk.index for chunk in expected[2:]]
    with pytest.raises(ConfigError, match="history is -1"):
        runtime.session(PROMPT, history=-1)


# Refusals


def snapshot_of(runtime: Runtime, path: Path, **settings: Any) -> Path:
    with runtime.session(PROMPT, seed=1, **settings) as session:
        take(session, 2)
        session.snapshot(path)
    return path


def complaint(runtime: Runtime, path: Path) -> str:
    """The one line that restoring it is refused with."""
    with pytest.raises(SnapshotError) as refused:
        runtime.restore(path)
    assert "\n" not in str(refused.value) and path.name in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("place", [0.0, 0.001, 0.02, 0.3, 0.6, 0.9, 0.99999])
def test_a_flipped_bit_is_found(runtime: Runtime, tmp_path: Path, place: float) -> None:
    """In the header's length, in the settings, in any tensor."""
    path = snapshot_of(runtime, tmp_path / "stream")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert "take another" in complaint(runtime, path)


@pytest.mark.parametrize(("before", "after"), [("seed", "sead"), (": 1,", ": 2,"), ("red circle", "red square")])
def test_changed_settings_are_found(runtime: Runtime, tmp_path: Path, before: str, after: str) -> None:
    path = snapshot_of(runtime, tmp_path / "stream")
    content = path.read_bytes()
    changed = content.replace(before.encode(), after.encode(), 1)
    assert changed != content
    path.write_bytes(changed)
    assert "damaged" in complaint(runtime, path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_a_file_cut_off_is_found(runtime: Runtime, tmp_path: Path, share: float) -> None:
    path = snapshot_of(runtime, tmp_path / "stream")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cannot be read as a snapshot" in complaint(runtime, path)


def test_what_is_no_snapshot_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    assert "No such file" in complaint(runtime, tmp_path / "nowhere")
    assert "cannot be read" in complaint(runtime, tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    assert "no snapshot" in complaint(runtime, tmp_path / "weights")


def test_a_newer_version_is_named(runtime: Runtime, tmp_path: Path) -> None:
    path = snapshot_of(runtime, tmp_path / "stream")
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "sfrt_snapshot": "3"}
    save_file(load_file(path), path, metadata)
    assert "is a snapshot of version 3 and this sfrt reads 2; update sfrt" in complaint(runtime, path)


def test_another_model_backend_or_dtype_is_named(runtime: Runtime, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", minversion="1.25")
    path = snapshot_of(runtime, tmp_path / "stream")
    built_in = Runtime(device="cpu", backend="torch")
    assert "was taken of the model 'tiny'" in complaint(built_in, path)
    half = Runtime(tiny_bundle, device="cpu", backend="torch", dtype="bfloat16")
    assert "on dtype float32, not bfloat16; open the model with dtype='float32'" in complaint(half, path)
    onnx = Runtime(device="cpu", backend="onnx")
    path = snapshot_of(built_in, tmp_path / "other")
    assert "on backend torch, not onnx; open the model with backend='torch'" in complaint(onnx, path)


def test_a_bundle_changed_in_one_weight_is_another_model(runtime: Runtime, tiny_bundle: Path, tmp_path: Path) -> None:
    path = snapshot_of(runtime, tmp_path / "stream")
    same_model, files = runtime._id, dict(runtime.manifest.files)
    files["decoder.safetensors"] = replace(files["decoder.safetensors"], sha256="0" * 64)
    other = type(same_model).of(replace(runtime.manifest, files=files), "torch", "float32")
    assert type(same_model).of(runtime.manifest, "torch", "float32") == same_model
    with pytest.raises(SnapshotError, match=r"was taken of the model 'tiny' \([0-9a-f]{12}…\), not of this 'tiny'"):
        read_snapshot(path, CPU).settings.model.require(other, path)


def test_a_stream_by_a_source_is_not_to_be_kept(runtime: Runtime, tmp_path: Path) -> None:
    frames = np.zeros((60, 32, 48, 3), np.uint8)
    with runtime.session(PROMPT, source=iter(frames), strength=0.5, history=2) as session:
        take(session, 2)
        for act, what in (
            (lambda: session.snapshot(tmp_path / "stream"), "kept or forked"),
            (session.fork, "kept or forked"),
            (lambda: session.rewind(1), "rewound"),
        ):
            with pytest.raises(SnapshotError, match=f"goes by a source cannot be {what}"):
                act()
        assert next(session).index == 2 and not list(tmp_path.iterdir())


def test_a_closed_session_has_nothing_to_keep(runtime: Runtime, tmp_path: Path) -> None:
    session = runtime.session(PROMPT)
    session.close()
    for act in (lambda: session.snapshot(tmp_path / "stream"), session.fork, lambda: session.rewind(1)):
        with pytest.raises(ConfigError, match="closed"):
            act()


# Faults


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_full_disk_leaves_the_snapshot_before(runtime: Runtime, tmp_path: Path, size: int) -> None:
    path = snapshot_of(runtime, tmp_path / "stream")
    content = path.read_bytes()
    with runtime.session(PROMPT, seed=5) as session:
        made = take(session, 2)
        with file_size_limit(size), pytest.raises(SnapshotError, match="cannot be written") as refused:
            session.snapshot(path)
        assert "nothing was changed there" in str(refused.value) and "\n" not in str(refused.value)
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
        assert same([*made, *take(session, 1)], take(runtime.session(PROMPT, seed=5), 3)), "and the stream goes on"


def test_a_place_that_cannot_be_written_is_named(runtime: Runtime, tmp_path: Path) -> None:
    with runtime.session(PROMPT) as session:
        for place in (tmp_path / "no" / "folder", tmp_path):
            with pytest.raises(SnapshotError, match="cannot be written"):
                session.snapshot(place)
    assert not list(tmp_path.iterdir())


def test_a_snapshot_over_another_is_the_new_one(runtime: Runtime, tmp_path: Path) -> None:
    with runtime.session(PROMPT, seed=5) as session:
        for _ in range(3):
            next(session)
            session.snapshot(tmp_path / "stream")
        expected = take(session, 1)
    with runtime.restore(tmp_path / "stream") as session:
        assert same(take(session, 1), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["stream"]
