"""What torch is asked to do meanwhile."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Called(TorchDispatchMode):
    """The names of the operations that run in here, with their keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] = kwargs or {}
        return function(*args, **(kwargs or {}))
