"""From the start of a process to the first pixel frame in host memory, by starting processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from sfrt.errors import SfrtError

_CHILD = """\
import json, sys
from sfrt import Runtime
settings = json.loads(sys.argv[1])
prompt = settings.pop("prompt")
runtime = Runtime(**settings)
if prompt is None:
    import torch
    model = runtime.manifest.model
    prompt = torch.randn(model.text_len, model.text_dim)
next(runtime.session(prompt))
sys.stdout.write("first frame")
sys.stdout.flush()
"""


def cold_start_seconds(settings: Mapping[str, Any], prompt: str | None, times: int) -> tuple[float, ...]:
    """So often, one process after the other; settings are a Runtime's, a prompt of None random embeddings.

    The files are in the system's cache, as the run that measures has read them. Raises SfrtError where a process fails.
    """
    return tuple(_seconds(json.dumps({**settings, "prompt": prompt})) for _ in range(times))


def _seconds(settings: str) -> float:
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, settings]
    with subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        if child.stdout.read(1):
            seconds = time.perf_counter() - began
            child.communicate()
            return seconds
        said = child.stderr.read().decode(errors="replace").strip().splitlines()
    raise SfrtError(f"the process that was to start cold failed: {said[-1] if said else f'code {child.returncode}'}")
