"""sfrt/bundle/manifest.py and schema.py: manifests and all else in JSON, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfrt.bundle import Bundle, Manifest, WanVaePart
from sfrt.bundle.schema import SchemaError, from_json, to_json
from sfrt.config import StreamConfig, WanVaeConfig
from sfrt.errors import BundleError, ConfigError
from tests.bundles import FULL, MANIFEST, drop, edit_manifest, set_at, write


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
        (set_at("schema_version", value=4), r"schema_version is 4 and this sfrt reads up to 3; update sfrt"),
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


def test_manifests_of_version_1_say_nothing_of_what_was_the_only_way(tmp_path: Path) -> None:
    written = write(tmp_path / "model", FULL).manifest

    def first_version(data: Any) -> None:
        data["schema_version"] = 1
        del data["text_quantization"]
        for key in ("positions", "refresh", "ring_dtype"):
            del data["stream"][key]

    edit_manifest(tmp_path / "model", first_version)
    assert Bundle.open(tmp_path / "model").manifest == written
    edit_manifest(tmp_path / "model", drop("stream", "shift"))
    with pytest.raises(BundleError, match=r"stream\.shift is missing"):
        Bundle.open(tmp_path / "model")
    edit_manifest(tmp_path / "model", set_at("schema_version", value=2))
    with pytest.raises(BundleError, match=r"stream\.positions is missing"):
        Bundle.open(tmp_path / "model")


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
