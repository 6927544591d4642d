"""`python -m bench.reference --json FILE`: `sfrt bench --random` where the command line's own libraries are missing.

The reference cases of the protocol on random weights; nothing but what the runtime itself needs is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from sfrt.benchmark.cases import Effort
from sfrt.benchmark.report import table
from sfrt.benchmark.run import measure
from sfrt.benchmark.shapes import SHAPES, write_random_bundle
from sfrt.device import dtype_name, resolve_device, resolve_dtype

CASES = ("full21", "stream12", "frame1")


def main() -> None:
    """Measure, print the table, write the JSON after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1.3b")
    parser.add_argument("--decoder", choices=("taehv", "wan_vae"), default="taehv")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--seconds", type=float, default=60.0, help="of video in a steady case")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = dtype_name(resolve_dtype("auto", device))
    with TemporaryDirectory() as folder:
        model = write_random_bundle(Path(folder, "model"), SHAPES[arguments.shape], arguments.decoder, dtype, device)
        settings = {"model": str(model), "device": arguments.device, "dtype": dtype, "backend": "torch"}
        effort = Effort(rounds=5, seconds=arguments.seconds)
        report = measure(settings, tuple(arguments.cases), effort, print, lambda so_far: so_far.write(arguments.json))
    print(report.headline(), table(report.results), *report.not_run.items(), sep="\n")


if __name__ == "__main__":
    main()
