"""sfrt/bundle: folders opened, hashed and loaded, written all or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfrt.bundle import Bundle, hash_file, resolve_model
from sfrt.bundle.writer import BundleWriter, LazyTensor
from sfrt.errors import BundleError
from sfrt.text import TextEncoder, Umt5Encoder, load_text_encoder
from tests.bundles import FULL, MANIFEST, TEXT, edit_manifest, set_at, tensors, write


def remains(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "words.json")


def test_round_trip(tmp_path: Path) -> None:
    written = write(tmp_path / "model", FULL)
    opened = Bundle.open(tmp_path / "model")
    assert opened == written
    assert replace(opened.manifest, files={}) == FULL
    assert list(opened.manifest.files) == [
        "transformer.safetensors",
        "decoder.safetensors",
        "text_encoder.safetensors",
        "tokenizer.json",
    ]
    assert remains(tmp_path) == ["model"], "the working folder must be gone"
    loaded = opened.load("transformer")
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert all(tensor.dtype == torch.float16 for tensor in opened.load("transformer", dtype=torch.float16).values())


def test_the_file_is_what_the_library_reads(tmp_path: Path) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model" / "transformer.safetensors"
    assert {name: value.tolist() for name, value in load_file(path).items()} == {
        name: value.tolist() for name, value in tensors().items()
    }
    data = path.read_bytes()
    header_length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_length])
    assert header_length % 8 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors()[name].dtype.itemsize == 0, f"{name} is not aligned"


def test_mapped_tensors_do_not_write_to_the_file(tmp_path: Path) -> None:
    bundle = write(tmp_path / "model")
    bundle.load("transformer")["matrix"].zero_()
    assert torch.equal(bundle.load("transformer")["matrix"], tensors()["matrix"])
    Bundle.open(tmp_path / "model")


@pytest.mark.gpu
def test_tensors_go_straight_to_the_gpu(tmp_path: Path) -> None:
    loaded = write(tmp_path / "model").load("transformer", "cuda", torch.float32)
    assert all(tensor.is_cuda for tensor in loaded.values())
    assert torch.equal(loaded["matrix"].cpu(), tensors()["matrix"])


def test_text_encoder_of_a_bundle(tmp_path: Path) -> None:
    encoder = load_text_encoder(write(tmp_path / "model", FULL), torch.device("cpu"), torch.float32)
    assert isinstance(encoder, TextEncoder)
    torch.manual_seed(0)
    reference = Umt5Encoder(TEXT)(torch.tensor([[3, 4, 1]]))[0].detach()
    embeds = encoder.encode("red circle")
    assert embeds.shape == (12, 16)
    assert torch.allclose(embeds[:3], reference, atol=1e-5)


def test_a_bundle_with_the_transformer_alone(tmp_path: Path) -> None:
    bundle = write(tmp_path / "model")
    with pytest.raises(BundleError, match=r"model has no decoder\.safetensors; .* --taehv FILE or --vae FILE"):
        bundle.load("decoder")
    with pytest.raises(BundleError, match=r"model has no text_encoder\.safetensors; .* --text-encoder FILE"):
        load_text_encoder(bundle, torch.device("cpu"), torch.float32)
    with pytest.raises(BundleError, match=r"model has no tokenizer\.json; .* --tokenizer FILE"):
        _ = bundle.tokenizer_path


def flip_a_bit(bundle: Path) -> None:
    path = bundle / "transformer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit(tmp_path: Path) -> None:
    write(tmp_path / "model")
    flip_a_bit(tmp_path / "model")
    with pytest.raises(BundleError, match=r"transformer\.safetensors is damaged: its sha256 is .* copy or export"):
        Bundle.open(tmp_path / "model")
    Bundle.open(tmp_path / "model", verify=False)


def test_a_part_is_verified_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model", FULL)
    flip_a_bit(tmp_path / "model")
    bundle = Bundle.open(tmp_path / "model", verify=False)
    with pytest.raises(BundleError, match=r"transformer\.safetensors is damaged"):
        bundle.load("transformer", verify=True)
    bundle.load("transformer")

    hashed: list[str] = []

    def counting(path: Path, *options: Any) -> str:
        hashed.append(path.name)
        return hash_file(path, *options)

    monkeypatch.setattr("sfrt.bundle.hash_file", counting)
    for _ in range(2):
        bundle.load("decoder", verify=True)
        load_text_encoder(bundle, torch.device("cpu"), torch.float32, verify=True)
    assert sorted(hashed) == ["decoder.safetensors", "text_encoder.safetensors", "tokenizer.json"], "each file once"
    with pytest.raises(BundleError, match=r"bare has no decoder\.safetensors"):
        write(tmp_path / "bare").verify("decoder.safetensors")


def test_a_tokenizer_that_was_changed(tmp_path: Path) -> None:
    write(tmp_path / "model", FULL)
    tokenizer = tmp_path / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"red"', '"rod"'))
    bundle = Bundle.open(tmp_path / "model", verify=False)
    load_text_encoder(bundle, torch.device("cpu"))
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged"):
        load_text_encoder(bundle, torch.device("cpu"), verify=True)


def test_an_interrupt_ends_hashing(tmp_path: Path) -> None:
    """Two sparse files of 64 GB: hashed to their end, they would take far longer than the test may."""
    write(tmp_path / "model", FULL)
    for part in ("transformer", "decoder"):
        os.truncate(tmp_path / "model" / f"{part}.safetensors", 1 << 36)
        edit_manifest(tmp_path / "model", set_at("files", f"{part}.safetensors", "bytes", value=1 << 36))
    # A process begun in the background ignores interrupts, and so would its child.
    source = (
        "import signal, sys; from sfrt.bundle import Bundle; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); print(flush=True); Bundle.open(sys.argv[1])"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)  # into the hashing
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=15)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in said


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model" / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BundleError, match=r"transformer\.safetensors has \d+ bytes but the manifest says \d+"):
        Bundle.open(tmp_path / "model", verify=False)
    path.unlink()
    with pytest.raises(BundleError, match=r"transformer\.safetensors is missing"):
        Bundle.open(tmp_path / "model", verify=False)


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model" / "transformer.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"transformer\.safetensors cannot be read \("):
        Bundle.open(tmp_path / "model", verify=False).load("transformer")


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model")
    built_in = resolve_model(None)
    assert resolve_model("shapes") == built_in and built_in.parts[-3:] == ("sfrt", "models", "shapes")
    assert resolve_model(tmp_path / "model") == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == Path("model")
    with pytest.raises(BundleError, match=r"there is no model at nowhere; give a folder .* or 'shapes'"):
        resolve_model("nowhere")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        resolve_model(tmp_path)
    (tmp_path / "model.pt").touch()
    with pytest.raises(BundleError, match=r"model\.pt is a file, not a bundle; .* sfrt export model\.pt -o DIR"):
        resolve_model("model.pt")
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        Bundle.open(tmp_path)


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(BundleError, match="model exists already"):
        write(tmp_path / "model")
    assert remains(tmp_path / "model") == []
    with pytest.raises(BundleError, match="none is not a folder"):
        write(tmp_path / "none" / "model")
    assert remains(tmp_path) == ["model"]


@pytest.mark.parametrize("fault", [RuntimeError("stop"), KeyboardInterrupt()])
def test_nothing_is_left_when_writing_stops(tmp_path: Path, fault: BaseException) -> None:
    def interrupted() -> Tensor:
        raise fault

    with pytest.raises(type(fault)), BundleWriter(tmp_path / "model") as writer:
        broken: dict[str, Tensor | LazyTensor] = {**tensors(), "late": LazyTensor((2,), torch.float16, interrupted)}
        writer.add_tensors("transformer", broken)
    assert remains(tmp_path) == []


def test_nothing_is_left_without_finish(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "model") as writer:
        writer.add_tensors("transformer", tensors())
    with pytest.raises(BundleError, match="its manifest describes"), BundleWriter(tmp_path / "model") as writer:
        writer.finish(MANIFEST)
    assert remains(tmp_path) == []


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond this size: the same OSError path as a disk that fills up.

    Around the code in question alone: pytest's own report is a file, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails(tmp_path: Path) -> None:
    with (
        file_size_limit(4096),
        pytest.raises(BundleError, match=r"model cannot be written \(.*nothing was left there"),
        BundleWriter(tmp_path / "model") as writer,
    ):
        writer.add_tensors("transformer", {"large": torch.zeros(4096)})
    assert remains(tmp_path) == []


def test_too_little_room_is_said_before_writing(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    huge = LazyTensor((free,), torch.float32, lambda: pytest.fail("nothing may be made when there is no room"))
    with (
        pytest.raises(BundleError, match=r"needs .* GB .* free; make room"),
        BundleWriter(tmp_path / "model") as writer,
    ):
        writer.add_tensors("transformer", {"huge": huge})
    assert remains(tmp_path) == []


def test_lazy_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[Any]] = []

    def make() -> Tensor:
        assert sum(values() is not None for values in made) <= 1, "more than the tensor just written is still held"
        values = np.ones(8, dtype=np.float32)
        made.append(weakref.ref(values))
        return torch.from_numpy(values)

    told: list[int] = []
    with BundleWriter(tmp_path / "model") as writer:
        lazy = {str(index): LazyTensor((8,), torch.float32, make) for index in range(20)}
        writer.add_tensors("transformer", lazy, told.append)
        bundle = writer.finish(MANIFEST)
    assert len(made) == 20
    assert sum(told) == bundle.manifest.files["transformer.safetensors"].bytes


def test_a_lazy_tensor_must_keep_its_word(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"), BundleWriter(tmp_path / "model") as writer:
        writer.add_tensors("transformer", {"x": LazyTensor((2,), torch.float32, lambda: torch.zeros(3))})


def test_hash_of_a_file_longer_than_a_block(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8193
    (tmp_path / "data").write_bytes(data)
    assert hash_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    with pytest.raises(BundleError, match="gone cannot be read"):
        hash_file(tmp_path / "gone")
