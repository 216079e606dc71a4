"""``torch.zeros`` and the like, as a converter calls them.

A converter may fill a new tensor part by part, or append zeros.  For that a new tensor has to be lazy from
the start: what is written into a real one must be read at once.  So must what becomes its ``data``.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from safemap._lazy_record import Recorder
from safemap._lazy_rules import fill
from safemap._lazy_tensor import LazyTensor

_FACTORIES: dict[Any, int] = {torch.empty: 0, torch.zeros: 0, torch.ones: 0, torch.full: 1}
_SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
#: code that makes tensors for itself, and wants memory
_LIBRARIES = {"torch", "safemap", "safetensors", "numpy"}


class LazyFactories(TorchFunctionMode):
    """Within this mode, on this thread, the factories above give lazy tensors to the code of a converter."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function == _SET_DATA and not isinstance(args[0], LazyTensor) and isinstance(args[1], LazyTensor):
            # torch would make a real tensor of it that has neither memory nor a recorder, and die of it
            return function(args[0], args[1].values("assignment to the data of a real tensor"))
        values = _FACTORIES.get(function)
        if values is None or kwargs.keys() - {"dtype", "size"} or not _is_own_code(sys._getframe(1)):
            return function(*args, **kwargs)
        rest = args[len(args) - values :] if values else ()
        size = kwargs.get("size", args[: len(args) - values])
        if len(size) == 1 and not isinstance(size[0], int):
            size = size[0]
        if len(rest) != values or not all(type(extent) is int and extent >= 0 for extent in size):
            return function(*args, **kwargs)  # torch has an error for it, or does what is not known here
        element = function([1], *rest, **{k: v for k, v in kwargs.items() if k != "size"})
        if type(element) is not torch.Tensor or element.device.type != "cpu":
            return function(*args, **kwargs)
        if function is torch.empty:
            element = torch.zeros_like(element)
        return fill(self.recorder, element, tuple(size))


def _is_own_code(frame: FrameType | None) -> bool:
    """Tell whether a call comes from the converter, not from a library or a module being imported."""
    if frame is None or frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        return False
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("importlib.") or frame.f_code.co_filename.startswith("<frozen importlib"):
            return False
        if name == "safemap._converter":
            return True
        frame = frame.f_back
    return False
