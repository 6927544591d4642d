"""The report, with libraries that fail in every way a library can."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from sfrt import doctor
from sfrt.doctor import Probe, as_json, as_text, report, verdicts

DIES_NAMELESS = "import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 1)"
"""Real-time signals have no names of their own."""

DIES_MID_ANSWER = """
import contextlib, os
for descriptor in range(3, 16):  # one of them leads to the reader of the answers
    with contextlib.suppress(OSError):
        os.write(descriptor, b'{"name": "flash-')
os._exit(3)
"""


@pytest.fixture(scope="module")
def here() -> list[Probe]:
    return report()


def test_this_machine(here: list[Probe]) -> None:
    by_name = {probe.name: probe for probe in here}
    assert len(by_name) == len(here)
    for name in ("python", "system", "cpu", "memory", "torch"):
        assert by_name[name].status == "ok", by_name[name]
    assert all(probe.found and probe.meaning and "\n" not in probe.found + probe.meaning for probe in here)
    assert verdicts(here)["cpu"] == "yes"


def test_cuda_verdict_is_torchs(here: list[Probe]) -> None:
    import torch

    assert (verdicts(here)["cuda"] == "yes") is torch.cuda.is_available()


def test_both_forms_say_the_same(here: list[Probe]) -> None:
    machine = json.loads(as_json(here))
    assert [Probe(**line) for line in machine["probes"]] == here
    text = as_text(here)
    assert all(probe.found in text and probe.meaning in text for probe in here)
    assert f"torch backend on cuda: {machine['runs']['cuda']}" in text


@pytest.mark.parametrize(
    ("source", "status", "found"),
    [
        ("raise RuntimeError('built for another torch\\nand more')", "broken", "RuntimeError: built for another torch"),
        ("import sys; sys.exit('no licence')", "broken", "SystemExit: no licence"),
        ("import os; os.abort()", "broken", "the process died of SIGABRT"),
        ("import os; os._exit(3)", "broken", "the process died of exit code 3"),
        ("import a_part_that_is_missing", "broken", "ModuleNotFoundError: No module named 'a_part_that_is_missing'"),
        (DIES_NAMELESS, "broken", f"the process died of signal {signal.SIGRTMIN + 1}"),
        (DIES_MID_ANSWER, "broken", "the process died of exit code 3"),
        ("print('{\"hello\": 1}')", "ok", "version unknown"),
    ],
)
def test_a_library_that_explodes_costs_one_line(
    source: str, status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_PROBES", {name: doctor._PROBES[name] for name in ("python", "flash-attn", "system")})
    before, exploded, after = report()
    assert (before.name, before.status) == ("python", "ok")
    assert (exploded.name, exploded.status, exploded.found) == ("flash-attn", status, found)
    assert (after.name, after.status) == ("system", "ok")


def test_a_library_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_PROBES", {"flash-attn": doctor._PROBES["flash-attn"]})
    monkeypatch.setattr(doctor, "CHILD_SECONDS", 1)
    (hanging,) = report()
    assert (hanging.status, hanging.found) == ("broken", "no answer within 1 seconds")


def test_verdicts_name_what_is_missing() -> None:
    probes = [
        Probe("python", "ok", "3.12", "fine"),
        Probe("torch", "broken", "ImportError: libc10.so", "reinstall it"),
        Probe("cuda", "absent", "no driver", "install one"),
    ]
    assert verdicts(probes) == dict.fromkeys(("cpu", "cuda"), "no (torch: ImportError: libc10.so)")
