"""Every golden folder, replayed through the same code that `sfrt verify` runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt.errors import CheckpointError, ConfigError, SfrtError
from sfrt.ops.choice import PINS_VARIABLE
from sfrt.ops.interpreter import mended_interpreter
from sfrt.ops.op import KERNELS
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


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_golden_with_each_kind_of_kernel(case: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PINS_VARIABLE, implementation)
    assert [check for check in verify(GOLDEN / case, dtype="bfloat16", device="cuda") if not check.passed] == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run for real here")
@pytest.mark.parametrize("case", ["dit/frame1_window4_sink1", "dit/chunk3_window8_sink1"])
def test_golden_with_interpreted_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(PINS_VARIABLE, "triton,attention=torch")  # which takes no float32
    with mended_interpreter():
        checks = list(verify(GOLDEN / case, device="cpu"))
    assert checks and [check for check in checks if not check.passed] == []


@pytest.fixture
def schedule(tmp_path: Path) -> Path:
    """The published step tables, alone in a folder."""
    return Path(shutil.copy(GOLDEN / "schedule.json", tmp_path))


def test_golden_schedule(schedule: Path) -> None:
    checks = list(verify(schedule.parent))
    assert len(checks) == 12 and all(check.passed for check in checks)
    tables = json.loads(schedule.read_text())
    tables["5.0"]["warped"]["750"] *= 1.001
    schedule.write_text(json.dumps(tables))
    assert [check.tensor for check in verify(schedule.parent) if not check.passed] == ["shift 5.0: warped"]


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


def edited(case: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((case / "case.json").read_text())
    edit(settings)
    (case / "case.json").write_text(json.dumps(settings))


def retensored(case: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(case / "tensors.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, case / "tensors.safetensors")


MALFORMED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "prompt too short": (
        "prompt_embeds is .* the case is inconsistent",
        lambda case: retensored(case, lambda t: t.update(prompt_embeds=t["prompt_embeds"][:, :-1])),
    ),
    "prompt of fewer rows": (
        "prompt_embeds is .* the case is inconsistent",
        lambda case: retensored(case, lambda t: t.update(prompt_embeds=t["prompt_embeds"][:0])),
    ),
    "no row at all": (
        "has nothing to compare",
        lambda case: retensored(case, lambda t: t.update({key: t[key][:0] for key in ("noise", "prompt_embeds")})),
    ),
    "noise too short": (
        "cannot be replayed",
        lambda case: retensored(case, lambda t: t.update(noise=t["noise"][:, :1])),
    ),
    "re-noising missing": (
        r"has 0 tensors renoise\.… and needs more",
        lambda case: retensored(case, lambda t: [t.pop(key) for key in list(t) if key.startswith("renoise.")]),
    ),
    "noise of one axis": ("cannot be replayed", lambda case: retensored(case, lambda t: t.update(noise=torch.ones(1)))),
    "words for numbers": ("cannot be replayed", lambda case: edited(case, lambda s: s.update(num_output_frames="x"))),
    "a list for the model": ("cannot be replayed", lambda case: edited(case, lambda s: s.update(model=[]))),
    "one number for two": ("cannot be replayed", lambda case: edited(case, lambda s: s.update(latent_hw=[6]))),
    "calls that are none": ("cannot be replayed", lambda case: edited(case, lambda s: s.update(calls=[1]))),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_rollouts_are_refused_in_one_sentence(copied: Path, fault: str) -> None:
    message, spoil = MALFORMED[fault]
    spoil(copied / "case")
    with pytest.raises(CheckpointError, match=message) as caught:
        list(verify(copied, device="cpu"))
    assert "\n" not in str(caught.value) and "case" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "edit"),
    [
        ("umt5", lambda settings: settings.update(num_heads=3)),
        ("umt5", lambda settings: settings.update(dim="wide")),
        ("wan_vae", lambda settings: settings.update(mean=5)),
        ("wan_vae", lambda settings: settings.update(dim_mult=[1, 2])),
        ("taehv", lambda settings: settings.update(keys=[])),
        ("taehv", lambda settings: settings["keys"].pop("decoder.1.bias")),
        ("taehv", lambda settings: settings.update(weights_seed=-1)),
    ],
)
def test_malformed_parts_are_refused_in_one_sentence(
    tmp_path: Path, part: str, edit: Callable[[dict[str, Any]], object]
) -> None:
    shutil.copytree(GOLDEN / part, tmp_path / part)
    edited(tmp_path / part, edit)
    with pytest.raises(SfrtError) as caught:
        list(verify(tmp_path, device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{}", '{"five": {}}', '{"5.0": 5}', '{"5.0": {"sigmas_every_50": "x"}}', "[" * 100_000]
)
def test_malformed_schedules_are_refused(schedule: Path, text: str) -> None:
    schedule.write_text(text)
    with pytest.raises(CheckpointError, match=r"schedule\.json (has nothing|cannot be)"):
        list(verify(schedule.parent))


def test_no_flag_of_torch_is_left_changed_between_checks(copied: Path) -> None:
    before = torch.backends.cudnn.allow_tf32
    assert before, "torch's default, which a replay turns off"
    for _ in verify(copied, device="cpu"):
        assert torch.backends.cudnn.allow_tf32
