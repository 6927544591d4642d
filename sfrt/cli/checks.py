"""`sfrt verify` and `sfrt doctor`: is it right, and what can run here."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import groupby
from typing import TYPE_CHECKING

import click

from sfrt.cli.options import backend_option, device_option, json_option

if TYPE_CHECKING:
    from sfrt_export.verify import Check

FAILED = 1


@click.command()
@click.argument("golden", metavar="GOLDEN_DIR")
@device_option
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@backend_option("torch")
@json_option("Print one JSON object with every tensor.")
def verify(golden: str, device: str, dtype: str, backend: str, as_json: bool) -> int:
    """Replay the golden folders at or below GOLDEN_DIR; exit with 1 when a tensor is over its tolerance."""
    from sfrt_export.verify import verify

    checks: list[Check] = []
    for case, found in groupby(verify(golden, backend=backend, dtype=dtype, device=device), lambda check: check.case):
        in_case = list(found)
        checks += in_case
        if not as_json:
            click.echo(_case_line(case, in_case))
    passed = sum(check.passed for check in checks)
    if as_json:
        settings = {"backend": backend, "dtype": dtype, "device": device}
        tensors = [_check_as_json(check) for check in checks]
        click.echo(json.dumps({"passed": passed == len(checks), "settings": settings, "tensors": tensors}))
    else:
        click.echo(f"{passed} of {len(checks)} tensors within tolerance ({backend}, {dtype})")
    return 0 if passed == len(checks) else FAILED


def _case_line(case: str, checks: list[Check]) -> str:
    # The largest error by its place on the scale; what is no number is worse than any.
    worst = max(checks, key=lambda check: math.inf if math.isnan(check.error) else check.error / check.tolerance)
    over = sum(not check.passed for check in checks)
    verdict = f"{over} of {len(checks)} OVER" if over else f"{len(checks)} ok"
    return f"{case}: {verdict}, worst {worst.error:.1e} of {worst.tolerance:.0e} ({worst.tensor})"


def _check_as_json(check: Check) -> dict[str, object]:
    error = check.error if math.isfinite(check.error) else None  # JSON has no NaN
    return {**dataclasses.asdict(check), "error": error, "passed": check.passed}


@click.command()
@json_option("Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Say what this machine can run, and why not the rest."""
    from sfrt import doctor

    probes = doctor.report()
    click.echo(doctor.as_json(probes) if as_json else doctor.as_text(probes))
    return 0 if "yes" in doctor.verdicts(probes).values() else FAILED
