"""How a block sees the torch functions that a constructor calls, and answers the common ones.

While a `TorchFunctionMode` is entered, torch calls its ``__torch_function__(function, types, arguments,
keywords)`` in place of every torch function and tensor method that the current thread calls, and takes what
it returns as the result. Inside that method the mode is off, so calling ``function`` there runs it plainly.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ._calls import Calls
from ._log import CPU, META, storage_address
from ._vocabulary import DEFERRABLE_ARGUMENTS, KINDS, LIKE, PLAIN, Function, Kind

if TYPE_CHECKING:
    from ._block import Block

METADATA, FACTORY, INITIALIZER, FILL, DEVICE = (
    Kind.METADATA, Kind.FACTORY, Kind.INITIALIZER, Kind.FILL, Kind.DEVICE
)  # fmt: skip
#: since torch 2.12 this initializer announces itself only by asking whether its tensor is on meta
_TRUNC_NORMAL = getattr(nn.init, "_no_grad_trunc_normal_").__code__  # noqa: B009
#: looked up 2,000 times for a large model, so by names of their own
_EMPTY, _FULL, _DRAWN = torch.empty, torch.full, frozenset({torch.rand, torch.randn})
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


def _all_plain(arguments: Sequence[Any], keywords: dict[str, Any], target: Tensor) -> bool:
    """Whether there is no tensor or generator but *target*: only then may a call be run later."""
    for value in arguments:  # (generator expressions double the time)
        if value is not target and type(value) not in PLAIN:
            return False
    for value in keywords.values():  # noqa: SIM110
        if value is not target and type(value) not in PLAIN:
            return False
    return True


class BlockMode(TorchFunctionMode):
    """Answers for one block; see `_vocabulary` for the rules."""

    def __init__(self, block: "Block") -> None:
        super().__init__()
        self.block, self.log = block, block.log
        self.calls = Calls(block.log)

    def __torch_function__(
        self,
        function: Function,
        types: object,
        arguments: Sequence[Any] = (),
        keywords: dict[str, Any] | None = None,
    ) -> Any:
        kind = KINDS.get(function)
        if kind is METADATA or not self.block.is_current():
            return function(*arguments, **keywords) if keywords else function(*arguments)
        keywords = keywords or {}
        if kind is FACTORY:
            made = self._make(function, arguments, keywords)
            if made is not None:
                return made
        elif kind is INITIALIZER or kind is FILL:
            target = arguments[0] if arguments else keywords["tensor"]
            if self._may_be_noted(kind, function, target) and _all_plain(arguments, keywords, target):
                self.log.writes.append((function, arguments, keywords, storage_address(target)))
                return target
        elif kind is DEVICE:
            return self._device_question(function, arguments)
        elif function in LIKE:
            made = self._make_like(function, arguments, keywords)
            if made is not None:
                return made
        return self.calls.answer(function, arguments, keywords, device=self._resolve(keywords.get("device")))

    def _make(self, factory: Function, arguments: Sequence[Any], keywords: dict[str, Any]) -> Tensor | None:
        """A pending tensor; None if this call has to run plainly."""
        if _dispatch_modes():  # a FakeTensorMode has no storage to save
            return None
        if not keywords.keys() <= DEFERRABLE_ARGUMENTS:
            spoken = {
                n: v
                for n, v in keywords.items()
                if v is not None and v is not False and v is not torch.strided
            }
            if not spoken.keys() <= DEFERRABLE_ARGUMENTS:
                return None
            keywords = spoken
        device = self._resolve(keywords.get("device"))
        if device is META:
            return None
        on_meta = {**keywords, "device": META}
        if factory is _FULL:
            fill_value = keywords["fill_value"] if "fill_value" in keywords else arguments[1]
            if type(fill_value) not in PLAIN:
                return None
            tensor = _FULL(*arguments, **on_meta)
        else:
            tensor = _EMPTY(*arguments, **on_meta)
        if not tensor.numel():
            return None
        if factory in _DRAWN:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                return None  # it raises
            if self.log.streams.seeded_inside():
                return None
        if factory is _FULL:
            self.log.births.append((tensor, _EMPTY, device))
            self.log.write(Tensor.fill_, (tensor, fill_value), {}, [], device)
        else:
            self.log.births.append((tensor, factory, device))
        return tensor

    def _make_like(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any]
    ) -> Tensor | None:
        """A pending tensor for ``zeros_like(pending)``, ``pending.new_zeros(...)`` and so on."""
        if not arguments or not isinstance(arguments[0], Tensor):
            return None
        model, *rest = arguments
        device = self.log.device_of(model)
        if device is None or not model.is_contiguous():
            return None
        if function is Tensor.new and not (rest and all(type(size) is int for size in rest)):
            return None  # made from data
        keywords = {"dtype": model.dtype, "device": device, **keywords}
        keywords.pop("memory_format", None)
        size = [model.size()] if function.__name__.endswith("_like") else []
        return self._make(LIKE[function], (*size, *rest), keywords)

    def _resolve(self, device: Any) -> torch.device:
        """The device that a factory called with ``device=device`` uses."""
        if device is None:
            if not _function_modes():
                return CPU
            modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
            contexts = [mode for mode in modes if isinstance(mode, DeviceContext)]
            device = contexts[-1].device if contexts else CPU
        device = torch.device(device)
        if device.type == "cpu":
            return CPU
        # A missing device raises here, as in a plain construction; an accelerator gets its index.
        return META if device.type == "meta" else torch.empty(0, device=device).device

    def _may_be_noted(self, kind: Kind, function: Function, target: Any) -> bool:
        if (
            type(target) is not nn.Parameter
            or not target.is_meta
            or (self.log.values and self.log.has_value(target))
        ):
            return False
        if kind is FILL:  # a leaf's own methods raise in a plain construction, unless under no_grad
            return not (target.requires_grad and torch.is_grad_enabled())
        return target.dim() > 1 or "_uniform_" not in function.__name__  # xavier and kaiming raise

    def _device_question(self, function: Function, arguments: Sequence[Any]) -> Any:
        tensor = arguments[0]
        device = self.log.device_of(tensor)
        if device is None:
            return function(*arguments)
        if function == Tensor.get_device:
            return -1 if device.type == "cpu" else device.index
        question = function.__self__.__name__  # type: ignore[attr-defined]
        if question == "device":
            return device
        caller = sys._getframe(2)
        if question == "is_meta" and caller.f_code is _TRUNC_NORMAL and not self.log.has_value(tensor):
            call = caller.f_locals
            if call.get("generator") is None:
                bounds = (call["mean"], call["std"], call["a"], call["b"])
                self.log.write(nn.init.trunc_normal_, (tensor, *bounds), {}, [], device)
                return True
        return question == f"is_{device.type}"
