"""`sfrt verify --backend tensorrt`: the plans drawn for golden cases serve all that replaying them asks of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfrt import graphs
from sfrt.backends.onnx import OnnxRunner
from sfrt.backends.tensorrt.plans import Origin, PlanInfo, Target
from sfrt.bundle import FileInfo
from sfrt.device import DTYPES
from sfrt.errors import DeviceError
from sfrt.graphs import GraphName

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime", minversion="1.25")

from sfrt_export import parts_on
from sfrt_export.tensorrt_plan import draw_part
from sfrt_export.verify import verify

HERE = Target("GPU of this test", "9.0", "11.4.0.106")
GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(file.parent for file in GOLDEN.rglob("case.json"))


class DrawnRunner:
    """In a PlanRunner's place: ONNX Runtime, once some plan is found that was drawn for just this."""

    def __init__(self, folder: Path, part: Any, dtype: Any, device: torch.device, sizes: Iterable[Any]) -> None:
        self.origin = Origin(folder, {file.name: FileInfo(0, "0" * 64) for file in folder.iterdir()})
        self.device, self.dtype, self.on_host = device, DTYPES[dtype], frozenset({graphs.VALID})
        self._infos = [blueprint.info for one in sizes for blueprint in draw_part(self.origin, part, dtype, one, HERE)]
        self._inner = OnnxRunner(folder, device, self.dtype)

    def plans(self, graph: GraphName) -> dict[int, PlanInfo]:
        return {number: info for number, info in enumerate(self._infos) if info.graph == graph}

    def bind(self, graph: GraphName, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        info, run = self._plan_for(graph, inputs), self._inner.bind(graph, inputs, outputs)

        def checked() -> None:
            values = {name: int(inputs[name]) for name in info.values}
            assert info.serving({**info.sizes_of(_shapes(inputs)), **values}), (graph, values)
            run()

        return checked

    def call(self, graph: GraphName, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._plan_for(graph, inputs)
        return self._inner.call(graph, inputs)

    def _plan_for(self, graph: GraphName, inputs: Mapping[str, Tensor]) -> PlanInfo:
        fitting = [info for info in self.plans(graph).values() if info.serving(info.sizes_of(_shapes(inputs)))]
        assert fitting, (graph, _shapes(inputs))
        return fitting[0]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans_serve_a_case(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_on, "require_tensorrt", lambda device: None)
    monkeypatch.setattr(parts_on, "_planned", DrawnRunner)
    checks = list(verify(case, backend="tensorrt", device="cpu"))
    assert checks and all(check.passed for check in checks)


def test_without_tensorrt_one_sentence() -> None:
    with pytest.raises(DeviceError, match="on an NVIDIA GPU, not on cpu"):
        list(verify(CASES[0], backend="tensorrt", device="cpu"))


@pytest.mark.gpu
def test_golden_cases_in_plans() -> None:
    pytest.importorskip("tensorrt")
    over = [check for check in verify(GOLDEN, backend="tensorrt") if not check.passed]
    assert over == []
