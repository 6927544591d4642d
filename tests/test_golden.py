"""Every golden folder, replayed through the same code that `sfrt verify` runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sfrt.errors import CheckpointError, ConfigError
from sfrt_export.verify import verify

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(str(file.parent.relative_to(GOLDEN)) for file in GOLDEN.rglob("case.json"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, dtype: str) -> None:
    checks = list(verify(GOLDEN / case, dtype=dtype, device="cpu"))
    assert checks and [check for check in checks if not check.passed] == []
    if case.startswith("dit/"):
        calls = json.loads((GOLDEN / case / "case.json").read_text())["calls"]
        assert len(checks) == 3 * len(calls) + 1, "x, flow and x0 of every call, and the final latents"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_golden_on_the_gpu(case: str, dtype: str) -> None:
    assert [check for check in verify(GOLDEN / case, dtype=dtype, device="cuda") if not check.passed] == []


def test_golden_schedule() -> None:
    checks = [check for check in verify(GOLDEN) if check.case.endswith("schedule.json")]
    assert len(checks) == 12 and all(check.passed for check in checks)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A small golden case that a test may break."""
    shutil.copytree(GOLDEN / "dit" / "first1_chunk3", tmp_path / "case")
    shutil.copy(GOLDEN / "dit" / "weights_d128h2l2.safetensors", tmp_path)
    return tmp_path


@pytest.mark.parametrize("tensor", ["call.003.flow", "call.010.x", "latents"])
def test_a_wrong_tensor_is_found(copied: Path, tensor: str) -> None:
    tensors = load_file(copied / "case" / "tensors.safetensors")
    tensors[tensor] = tensors[tensor] * 1.001
    save_file(tensors, copied / "case" / "tensors.safetensors")
    assert [check.tensor for check in verify(copied, device="cpu") if not check.passed] == [tensor]


def test_a_wrong_window_is_found(copied: Path) -> None:
    file = copied / "case" / "case.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "window_frames": 5}))
    failed = {check.tensor for check in verify(copied, device="cpu") if not check.passed}
    assert "call.010.flow" in failed and "call.009.flow" not in failed, "only the last chunk sees more than 5 frames"


def test_broken_cases_are_refused_in_one_sentence(copied: Path, tmp_path: Path) -> None:
    file = copied / "case" / "case.json"
    settings = json.loads(file.read_text())
    with pytest.raises(CheckpointError, match="no golden case"):
        list(verify(tmp_path / "nowhere"))
    file.write_text(json.dumps({key: value for key, value in settings.items() if key != "latent_hw"}))
    with pytest.raises(CheckpointError, match="latent_hw"):
        list(verify(copied))
    file.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        list(verify(copied))
    file.write_text(json.dumps({"something": 1}))
    with pytest.raises(CheckpointError, match="no part"):
        list(verify(copied))
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no backend"):
        list(verify(copied, backend="abacus"))
    truncated = (copied / "case" / "tensors.safetensors").read_bytes()[:1000]
    (copied / "case" / "tensors.safetensors").write_bytes(truncated)
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(verify(copied))
