"""sfrt/bundle: strict manifests, hashes, atomic and streaming writes."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sfrt.bundle import Bundle, FileInfo, Manifest, TaehvPart, WanVaePart, hash_file, resolve_model
from sfrt.bundle.schema import SchemaError, from_json, to_json
from sfrt.bundle.writer import BundleWriter, LazyTensor
from sfrt.config import ModelConfig, StreamConfig, TaehvConfig, Umt5Config, WanVaeConfig
from sfrt.errors import BundleError, ConfigError
from sfrt.text import TextEncoder, Umt5Encoder, load_text_encoder

TEXT = Umt5Config(vocab_size=8, dim=16, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1)
MANIFEST = Manifest(
    name="tiny",
    family="self-forcing",
    model=ModelConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=16, text_len=12),
    stream=StreamConfig(window=None, first_steps=(1000.0, 500.0)),
    weights="generator_ema",
    dtype="float32",
    created_by="tests",
    source={"tiny.pt": FileInfo(3, hashlib.sha256(b"abc").hexdigest())},
)
FULL = replace(MANIFEST, decoder=TaehvPart(TaehvConfig(decoder_widths=(8, 8, 4, 4))), text_encoder=TEXT)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, generator=generator).bfloat16(),
        "matrix": torch.randn(5, 7, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).half().T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }


def write(directory: Path, manifest: Manifest = MANIFEST) -> Bundle:
    with BundleWriter(directory) as writer:
        writer.add_tensors("transformer", tensors())
        if manifest.decoder is not None:
            writer.add_tensors("decoder", {"weight": torch.ones(2)})
        if manifest.text_encoder is not None:
            torch.manual_seed(0)
            writer.add_tensors("text_encoder", Umt5Encoder(manifest.text_encoder).state_dict())
            writer.add_tokenizer(tokenizer_file(directory.parent))
        return writer.finish(manifest)


def tokenizer_file(folder: Path) -> Path:
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "red", "circle"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return folder / "words.json"


def edit_manifest(bundle: Path, edit: Callable[[Any], object]) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    edit(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


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
    thread = threading.main_thread().ident
    assert thread is not None
    interrupt = threading.Timer(0.3, signal.pthread_kill, (thread, signal.SIGINT))
    interrupt.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Bundle.open(tmp_path / "model")
    assert time.monotonic() - started < 15


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


def set_at(*keys: str, value: object) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


def drop(*keys: str) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_at("colour", value=1), r"colour is not a known key"),
        (set_at("model", "depth", value=1), r"model\.depth is not a known key"),
        (drop("dtype"), r"dtype is missing"),
        (drop("weights"), r"weights is missing"),
        (drop("stream", "sink"), r"stream\.sink is missing"),
        (set_at("model", "dim", value="24"), r"model\.dim is '24', not a whole number"),
        (set_at("model", "dim", value=24.0), r"model\.dim is 24\.0, not a whole number"),
        (set_at("model", "dim", value=True), r"model\.dim is True, not a whole number"),
        (set_at("stream", "shift", value=None), r"stream\.shift is None, not a number"),
        (set_at("stream", "shift", value=10**400), r"stream\.shift is too large a number"),
        (set_at("stream", "warp", value=1), r"stream\.warp is 1, not true or false"),
        (set_at("stream", "steps", value=[1000, "x"]), r"stream\.steps\[1\] is 'x', not a number"),
        (set_at("stream", "steps", value=5), r"stream\.steps is 5, not a list"),
        (set_at("model", "patch_size", value=[1, 2]), r"model\.patch_size has 2 entries, not 3"),
        (set_at("dtype", value="int8"), r"dtype is 'int8', not one of 'float32', 'float16', 'bfloat16'"),
        (set_at("decoder", "kind", value="vq"), r"decoder\.kind is 'vq', not one of 'taehv', 'wan_vae'"),
        (drop("decoder", "kind"), r"decoder\.kind is missing"),
        (set_at("decoder", value="taehv"), r"decoder is 'taehv', not an object"),
        (set_at("stream", "sink", value=99), r"stream does not hold together: window 21"),
        (set_at("text_encoder", "num_heads", value=0), r"text_encoder does not hold together: "),
        (set_at("model", "num_heads", value=5), r"model does not hold together: model dim 24"),
        (set_at("model", "text_dim", value=4), r"the text encoder makes embeddings of 16 but the model reads 4"),
        (set_at("model", "latent_channels", value=4), r"the decoder reads 16 latent channels but the model makes 4"),
        (
            set_at("files", "transformer.safetensors", "sha256", value="x"),
            r"files\.transformer\.safetensors does not hold together: .* describe no file",
        ),
        (set_at("files", "../evil", value={"bytes": 0, "sha256": "0" * 64}), r"'\.\./evil' cannot be a file"),
        (set_at("files", "notes.txt", value={"bytes": 0, "sha256": "0" * 64}), r"files\.notes\.txt belongs to no part"),
        (drop("files", "tokenizer.json"), r"files\.tokenizer\.json is missing"),
        (set_at("schema_version", value=2), r"schema_version is 2 and this sfrt reads up to 1; update sfrt"),
        (set_at("schema_version", value="1"), r"schema_version is '1', not a whole number from 1"),
        (drop("schema_version"), r"schema_version is None, not a whole number"),
    ],
)
def test_manifests_that_do_not_fit(tmp_path: Path, edit: Callable[[Any], None], message: str) -> None:
    write(tmp_path / "model", replace(FULL, stream=StreamConfig()))
    edit_manifest(tmp_path / "model", edit)
    with pytest.raises(
        BundleError, match=r"manifest\.json: " + (".*" if message[0] == "'" else "") + message
    ) as caught:
        Bundle.open(tmp_path / "model", verify=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"schema_version": NaN}', "\udcff"])
def test_manifests_that_are_not(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError, match=r"manifest\.json(:| is not JSON)"):
        Bundle.open(tmp_path)


def test_a_number_that_no_float_holds(tmp_path: Path) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model" / "manifest.json"
    path.write_text(path.read_text().replace('"shift": 5.0', '"shift": 1e999'))
    with pytest.raises(BundleError, match=r"stream\.shift is too large a number"):
        Bundle.open(tmp_path / "model")


def test_a_newer_schema_is_named_before_its_new_keys(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 7, "tomorrow": 1}')
    with pytest.raises(BundleError, match="schema_version is 7"):
        Bundle.open(tmp_path)


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


@dataclass(frozen=True)
class Left:
    size: int
    kind: Literal["left"] = "left"


@dataclass(frozen=True)
class Right:
    names: tuple[str, ...]
    kind: Literal["right"] = "right"


@dataclass(frozen=True)
class Sample:
    whole: int
    real: float
    flag: bool
    pair: tuple[int, str]
    side: Left | Right | None
    table: dict[str, tuple[float, ...] | None]


reals = st.floats(allow_nan=False, allow_infinity=False)
samples = st.builds(
    Sample,
    whole=st.integers(),
    real=reals,
    flag=st.booleans(),
    pair=st.tuples(st.integers(), st.text()),
    side=st.none() | st.builds(Left, size=st.integers()) | st.builds(Right, names=st.lists(st.text()).map(tuple)),
    table=st.dictionaries(st.text(), st.none() | st.lists(reals).map(tuple), max_size=4),
)


@given(samples)
def test_dataclasses_survive_json(sample: Sample) -> None:
    assert from_json(Sample, json.loads(json.dumps(to_json(sample)))) == sample


@given(samples, st.data())
def test_one_wrong_field_is_named(sample: Sample, data: st.DataObject) -> None:
    encoded = to_json(sample)
    key = data.draw(st.sampled_from(sorted(encoded)))
    encoded[key] = data.draw(st.sampled_from(["text", b"bytes"]))
    with pytest.raises(SchemaError) as caught:
        from_json(Sample, encoded)
    assert caught.value.key.split(".")[0].split("[")[0] == key


@given(
    st.recursive(st.none() | st.booleans() | reals | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_json_is_refused_without_a_crash(data: object) -> None:
    with pytest.raises(SchemaError):
        from_json(Manifest, data)


def test_integers_are_taken_for_real_numbers() -> None:
    steps = from_json(StreamConfig, {**to_json(StreamConfig()), "steps": [1000, 500]}).steps
    assert steps == (1000.0, 500.0) and all(type(step) is float for step in steps)


def test_parts_that_do_not_fit_are_refused_when_made() -> None:
    vae = WanVaeConfig(latent_channels=2, mean=(0.0, 0.0), std=(1.0, 1.0))
    with pytest.raises(ConfigError, match="the decoder reads 2 latent channels but the model makes 16"):
        replace(MANIFEST, decoder=WanVaePart(vae))
