"""Which implementation an op gets: the default, what pins it, what refuses it."""

from __future__ import annotations

import pytest
import torch

from sfrt.errors import ConfigError, KernelInputError
from sfrt.ops.catalogue import OPS
from sfrt.ops.choice import PINS_VARIABLE, Ops, pins_from, torch_ops, why_not
from sfrt.ops.cuda_kernels.library import library_path
from sfrt.ops.modulate import MODULATE, modulate
from sfrt.ops.op import Draw

CPU = torch.device("cpu")


def implementations(ops: Ops) -> dict[str, str]:
    return {choice.op: choice.implementation for choice in ops.choices}


def test_names_are_unique_and_every_kernel_is_where_it_is_said_to_be() -> None:
    assert len({op.name for op in OPS}) == len(OPS)
    for op in OPS:
        for place in op.kernels.values():
            module, _, function = place.partition(":")
            assert module.startswith("sfrt.ops.") and function.isidentifier()
        assert op.cases and op.sizes


def test_a_cpu_runs_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PINS_VARIABLE, raising=False)
    ops = Ops(CPU)
    assert set(implementations(ops).values()) == {"torch"}
    assert ops(MODULATE) is modulate
    assert all("CPU" in choice.reason for choice in ops.choices)
    assert torch_ops()(MODULATE) is modulate


def test_pins_come_from_the_variable_or_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(PINS_VARIABLE, "modulate=triton")
    pinned = Ops(CPU)
    assert implementations(pinned)["modulate"] == "triton"
    assert next(choice for choice in pinned.choices if choice.op == "modulate").reason == "pinned"
    assert implementations(Ops(CPU, pins={}))["modulate"] == "torch"


def test_one_name_pins_all_ops_that_have_it() -> None:
    assert pins_from("torch") == {op.name: "torch" for op in OPS}
    assert pins_from(" triton, modulate=torch ") == {
        op.name: "torch" if op is MODULATE else "triton" for op in OPS if "triton" in op.kernels
    }
    assert pins_from("") == {}


@pytest.mark.parametrize("text", ["fast", "modulate=fast", "nothing=torch", "modulate_float8=nothing", "="])
def test_a_pin_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=PINS_VARIABLE):
        pins_from(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_kernel_that_cannot_run_is_refused_with_the_reason() -> None:
    assert "CUDA device" in str(why_not(MODULATE, "cuda", CPU))
    with pytest.raises(ConfigError, match="modulate cannot run as cuda: it needs a CUDA device"):
        Ops(CPU, pins={"modulate": "cuda"})
    reason = why_not(MODULATE, "cuda", torch.device("cuda"))
    assert reason is None if library_path() else "not built" in str(reason)


def test_kernels_refuse_what_they_would_read_wrongly() -> None:
    pytest.importorskip("triton")
    kernel = MODULATE.load("triton")
    good = MODULATE.cases["odd width"](Draw(torch.float32, CPU))
    x = good["x"]
    for wrong, said in (
        ({"x": x.double(), "branch": None, "gate": None}, "x is torch.float64"),
        ({"branch": x[:-1]}, r"branch is torch.float32 \[6, 50\]; it must be torch.float32 \[7, 50\]"),
        ({"branch": None}, "a gate and no branch"),
        ({"x": x.t(), "branch": None, "gate": None}, "rows must be dense"),
        ({"scale": good["scale"][:-2]}, "scale is .* a dense float vector of 50"),
        ({"shift": good["shift"].to("meta")}, "shift is on meta and the rest on cpu"),
    ):
        with pytest.raises(KernelInputError, match=said):
            kernel(**{**good, **wrong})
