"""Prompts that were read before, and where a text encoder stays."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt import Runtime
from sfrt.backends.loading import text_encoder_of
from sfrt.bundle import Bundle
from sfrt.config import Placement
from sfrt.errors import BundleError, ConfigError, PromptError
from sfrt.prompt_cache import PromptCache
from sfrt.prompts import Prompts
from sfrt.text import TextEncoder, Umt5Encoder
from sfrt_export.export import export_checkpoint
from tests.command_line import PROMPT, Run
from tests.test_export import WEIGHTS, save_text_model

EMBEDS = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "prompts", ("reader",))


def only_entry(folder: Path) -> Path:
    (entry,) = folder.rglob("*.safetensors")
    return entry


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[TextEncoder]]:
    """Every text encoder that a runtime loads from here on, as long as it lives."""
    made: list[weakref.ref[TextEncoder]] = []

    def load(*arguments: Any, **options: Any) -> TextEncoder:
        encoder = text_encoder_of(*arguments, **options)
        made.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr("sfrt.runtime.text_encoder_of", load)
    return made


def frames(runtime: Runtime, prompt: str = PROMPT) -> bytes:
    with runtime.session(prompt, seed=3, limit=1) as session:
        return next(session).frames.tobytes()


def test_what_was_read_needs_no_text_encoder(tiny_bundle: Path, loads: list[Any]) -> None:
    read = frames(Runtime(tiny_bundle, device="cpu"))
    assert len(loads) == 1
    again = Runtime(tiny_bundle, device="cpu")
    assert frames(again) == read and frames(again, f"  {PROMPT}\n") == read
    assert len(loads) == 1
    assert frames(again, "blue square") != read
    assert len(loads) == 2
    assert frames(Runtime(tiny_bundle, device="cpu", prompt_cache=False)) == read
    assert len(loads) == 3


def test_a_prompt_that_is_no_text_loads_nothing(tiny_bundle: Path, loads: list[Any]) -> None:
    with pytest.raises(PromptError):
        Runtime(tiny_bundle, device="cpu").session("  ")
    assert not loads


def test_the_command_line_can_leave_nothing_behind(run: Run, tiny_bundle: Path) -> None:
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "sfrt" / "prompts"
    made = ["generate", PROMPT, "-o", "out.gif", "--model", tiny_bundle, "--chunks", 1]
    assert run(*made, "--no-prompt-cache", "--text-encoder", "on-demand").code == 0
    assert not folder.exists()
    assert run(*made[:3], "again.gif", *made[4:]).code == 0
    assert only_entry(folder).stat().st_mode & 0o077 == 0, "others have no business there"
    assert "nowhere" in run(*made[:3], "third.gif", *made[4:], "--text-encoder", "nowhere").complaint


def test_kept_as_it_was(cache: PromptCache) -> None:
    for embeds in (EMBEDS, EMBEDS.bfloat16(), EMBEDS[:1]):
        cache.keep("a prompt", embeds)
        kept = cache.recall("a prompt", 12, 24)
        assert kept is not None and kept.dtype == embeds.dtype and torch.equal(kept, embeds)
    assert cache.recall("another prompt", 12, 24) is None


def test_another_reader_reads_for_itself(cache: PromptCache, tmp_path: Path) -> None:
    cache.keep("a prompt", EMBEDS)
    assert PromptCache(tmp_path / "prompts", ("reader", "on a GPU")).recall("a prompt", 12, 24) is None
    assert cache.recall("a prompt", 4, 24) is None, "longer than this model reads"
    assert cache.recall("a prompt", 12, 32) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x10
    path.write_bytes(content)


def strip(path: Path) -> None:
    """The same tensor without its checksum."""
    save_file(load_file(path), path)


def rename(path: Path) -> None:
    save_file({"something": EMBEDS}, path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, strip, rename, empty])
def test_a_broken_entry_is_none_and_written_anew(
    damage: Callable[[Path], None], cache: PromptCache, tmp_path: Path
) -> None:
    cache.keep("a prompt", EMBEDS)
    damage(only_entry(tmp_path))
    assert cache.recall("a prompt", 12, 24) is None
    cache.keep("a prompt", EMBEDS)
    kept = cache.recall("a prompt", 12, 24)
    assert kept is not None and torch.equal(kept, EMBEDS)


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    PromptCache(tmp_path, ("reader",)).keep("0", EMBEDS)
    size = only_entry(tmp_path).stat().st_size
    cache = PromptCache(tmp_path, ("reader",), most_bytes=3 * size + 1)
    for moment, path in enumerate(tmp_path.iterdir()):
        os.utime(path, (moment, moment))
    for number in (1, 2):
        cache.keep(str(number), EMBEDS)
    assert cache.recall("0", 12, 24) is not None  # now the latest
    cache.keep("3", EMBEDS)
    assert [cache.recall(str(number), 12, 24) is None for number in range(4)] == [False, True, False, False]
    assert not list(tmp_path.glob(".*")), "no half-written file is left"


def test_no_place_to_keep_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (None, tmp_path / "file"):
        cache = PromptCache(folder, ("reader",))
        cache.keep("a prompt", EMBEDS)
        assert cache.recall("a prompt", 12, 24) is None


@pytest.mark.parametrize(("placement", "expected"), [("resident", 1), ("cpu", 1), ("on-demand", 2), ("auto", 1)])
def test_where_it_stays(placement: Placement, expected: int, tiny_bundle: Path, loads: list[Any]) -> None:
    runtime = Runtime(tiny_bundle, device="cpu", backend="torch", prompt_cache=False, text_encoder=placement)
    for prompt in ("a red circle", "blue", "a red circle"):
        frames(runtime, prompt)
    gc.collect()
    assert len(loads) == expected
    assert [load() is None for load in loads] == [placement == "on-demand"] * expected
    assert runtime.text_encoder == ("resident" if placement == "auto" else placement)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_on_demand_nothing_waits_for_a_collection(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights nor a session of ONNX Runtime's are in a cycle: what was read with is gone once it was."""
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx_ir")
    encoder, tokenizer = save_text_model(tmp_path)
    known = {"family": "self-forcing", "heads": 2, "text_len": 24, "text_encoder": encoder, "tokenizer": tokenizer}
    export_checkpoint(WEIGHTS, tmp_path / "model", onnx=("float32",) if backend == "onnx" else (), **known)
    held: list[weakref.ref[Any]] = []

    def load(*arguments: Any, **options: Any) -> TextEncoder:
        text = text_encoder_of(*arguments, **options)
        parts = text.encoder.parameters() if isinstance(text.encoder, Umt5Encoder) else [text.encoder._runner]
        held.extend(map(weakref.ref, (text, text.encoder, *parts)))
        return text

    monkeypatch.setattr("sfrt.runtime.text_encoder_of", load)
    runtime = Runtime(
        tmp_path / "model", device="cpu", dtype="float32", backend=backend, prompt_cache=False, text_encoder="on-demand"
    )
    gc.disable()
    try:
        for number, prompt in enumerate(("1 2", "3"), start=1):
            embeds = runtime._embeddings(prompt)
            assert embeds.shape == (24, 48) and len(held) == number * (3 if backend == "onnx" else 14)
            assert [part() for part in held] == [None] * len(held)
    finally:
        gc.enable()


def test_a_text_encoder_larger_than_its_model_stays_off_the_device(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    large = replace(manifest.files["text_encoder.safetensors"], bytes=1 << 40)
    other = replace(manifest, files={**manifest.files, "text_encoder.safetensors": large})
    asked: list[torch.device] = []

    def load(device: torch.device) -> TextEncoder:
        asked.append(device)
        raise BundleError("not here")

    for described, where in ((manifest, "meta"), (other, "cpu")):
        prompts = Prompts(described, torch.device("meta"), "auto", load, PromptCache(None, ()))
        with pytest.raises(BundleError):
            prompts.encode("a red circle")
        assert asked.pop() == torch.device(where)


def test_no_such_place(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="no text encoder stays at 'attic'; choose one of: auto, resident"):
        Runtime(tiny_bundle, device="cpu", text_encoder="attic")  # type: ignore[arg-type]


def test_the_latest_prompts_are_at_hand(tiny_bundle: Path) -> None:
    """Without the disk, too: switching back and forth computes nothing."""
    runtime = Runtime(tiny_bundle, device="cpu", backend="torch", prompt_cache=False)
    red: Tensor = runtime._embeddings("a red circle")
    assert runtime._embeddings("  a red\ncircle ") is red
    for number in range(15):
        runtime._embeddings(f"blue {number}")
    assert runtime._embeddings("a red circle") is red
    for number in range(16):
        runtime._embeddings(f"left {number}")
    assert runtime._embeddings("a red circle") is not red
