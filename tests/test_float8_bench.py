"""The bench of float8: each form beside the plain model, in decibels that mean what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import float8


def test_decibels() -> None:
    ramp = torch.linspace(0, 255, 256, dtype=torch.float64)
    assert float8.psnr(ramp, ramp, 255.0) == 100
    assert float8.psnr(ramp + 1, ramp, 255.0) == pytest.approx(48.13, abs=0.01)
    assert float8.psnr(-0.1 * ramp, -0.1 * ramp + 0.1, 25.5) == pytest.approx(48.13, abs=0.01), "of its own range"


def test_every_form_beside_the_plain_model(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "float8.json"
    arguments = ["--model", str(tiny_bundle), "--device", "cpu", "--chunks", "4", "--seeds", "1", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", ["bench.float8", *arguments])
    float8.main()
    plain, weights, ring, both = json.loads(report.read_text())["forms"]
    assert [row["form"] for row in (plain, weights, ring, both)] == ["plain", "float8 weights", "float8 ring", "both"]
    assert not plain.keys() & set(float8.QUALITIES) and len(both["chunk_ms"]["samples"]) == 2
    for row in (weights, ring, both):
        assert all(len(row[name]["samples"]) == 2 and 15 < row[name]["p50"] < 80 for name in float8.QUALITIES)
    assert both["latents_db"]["p50"] < ring["latents_db"]["p50"]
    size = {row["form"]: row["stated_bytes"] for row in (plain, weights, ring, both)}
    assert size["plain"]["ring"] == 4 * size["float8 ring"]["ring"] == 4 * size["both"]["ring"]
    assert size["both"]["transformer"] == size["float8 weights"]["transformer"] < size["plain"]["transformer"]
    assert capsys.readouterr().out.count(" ms ") == 4
