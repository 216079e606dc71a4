"""How a block sees the torch functions that a constructor calls, and answers the common ones.

While a `TorchFunctionMode` is entered, torch calls its ``__torch_function__(function, types, arguments,
keywords)`` in place of every torch function and tensor method that the current thread calls, and takes what
it returns as the result. Inside that method the mode is off, so calling ``function`` there runs it plainly.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from types import GetSetDescriptorType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._call import Call
from ._calls import PLAIN, Calls
from ._random import names
from ._tensors import CPU, META, resolve

if TYPE_CHECKING:
    from ._block import Block

Function = Callable[..., Any]
Arguments = Sequence[Any]

#: what must be answered as a plain construction would
DEVICE_ATTRIBUTES = names(
    "device is_cpu is_cuda is_ipu is_maia is_meta is_mps is_mtia is_vulkan is_xla is_xpu"
)
DEVICE = frozenset(
    [getattr(Tensor, name).__get__ for name in DEVICE_ATTRIBUTES if hasattr(Tensor, name)]
    + [Tensor.get_device]
)
#: attributes that are tensors
VIEWS = names("data T H mT mH real imag _base")
#: what needs shape, dtype, flags or hooks only: a meta tensor answers truly
METADATA = frozenset(
    [
        getattr(getattr(Tensor, name), slot)
        for name in set(dir(Tensor)) - DEVICE_ATTRIBUTES - VIEWS
        for slot in ("__get__", "__set__")
        if type(getattr(Tensor, name)) is GetSetDescriptorType
    ]
    + [
        getattr(owner, name)
        for name in names(
            "dim size numel nelement ndimension stride storage_offset is_contiguous is_floating_point"
            " is_complex is_signed is_inference is_conj is_neg is_same_size element_size has_names __len__"
            " __hash__ _is_view requires_grad_ retain_grad register_hook result_type"
            " register_post_accumulate_grad_hook _has_compatible_shallow_copy_type"
        )
        for owner in (Tensor, torch)
        if hasattr(owner, name)
    ]
    + [torch._C._set_grad_enabled]
)
_EMPTY, _FULL, _DRAWN = torch.empty, torch.full, (torch.rand, torch.randn)
FACTORIES = frozenset({_EMPTY, _FULL, torch.zeros, torch.ones, *_DRAWN})
#: functions that make a tensor shaped like a pending one, and the factory that they come down to
LIKE: dict[Function, Any] = {
    getattr(owner, spelling): factory
    for factory in FACTORIES
    for owner, spelling in ((torch, f"{factory.__name__}_like"), (Tensor, f"new_{factory.__name__}"))
    if hasattr(owner, spelling)
}
LIKE[Tensor.new] = torch.empty  # if it is given sizes
#: arguments of a factory that say nothing about what the storage would hold
DEFERRABLE = frozenset({"size", "dtype", "device", "requires_grad", "memory_format", "fill_value"})
_ROW_MAJOR = (torch.preserve_format, torch.contiguous_format)  # what a contiguous tensor keeps
#: since torch 2.12 this initializer announces itself only by asking whether its tensor is on meta
_TRUNC_NORMAL = getattr(nn.init, "_no_grad_trunc_normal_").__code__  # noqa: B009
_dispatch_modes = torch._C._len_torch_dispatch_stack


class BlockMode(TorchFunctionMode):
    """Answers for one block."""

    def __init__(self, block: "Block") -> None:
        super().__init__()
        self.block, self.log = block, block.log
        self.calls = Calls(block.log)

    def __torch_function__(
        self, function: Function, types: object, arguments: Arguments = (), keywords: Any = None
    ) -> Any:
        if function in METADATA or not self.block.is_current():
            return function(*arguments, **keywords) if keywords else function(*arguments)
        keywords = keywords or {}
        made = None
        if function in FACTORIES:
            made = self._make(function, arguments, keywords)
        elif function in DEVICE:
            return self._device_question(function, arguments)
        elif function in LIKE:
            made = self._make_like(function, arguments, keywords)
        return self.calls.answer(Call(function, arguments, keywords)) if made is None else made

    def _make(self, factory: Function, arguments: Arguments, keywords: dict[str, Any]) -> Tensor | None:
        """A pending tensor; None if this call has to run plainly."""
        options = {name: value for name, value in keywords.items() if value is not None}
        if _dispatch_modes() or (options and not options.keys() <= DEFERRABLE):
            return None  # tensors of a FakeTensorMode have no storage to save
        device = resolve(options.get("device"))
        if device is not CPU and device.type == "meta":
            return None
        options["device"] = META
        if factory is _FULL:
            value = options["fill_value"] if "fill_value" in options else arguments[1]
            if type(value) not in PLAIN:
                return None
            tensor = _FULL(*arguments, **options)
            factory = functools.partial(_FULL, fill_value=value)
        else:
            if len(arguments) == 1 and type(arguments[0]) is tuple and arguments[0]:
                arguments = arguments[0]  # torch parses separate sizes faster
            tensor = _EMPTY(*arguments, **options)
        if factory in _DRAWN:
            is_possible = tensor.is_floating_point() or tensor.is_complex()  # else it raises
            if not is_possible or self.log.streams.seeded_inside():
                return None
        length = tensor.numel()
        return self.log.add(tensor, factory, length, device) if length else None

    def _make_like(self, function: Function, arguments: Arguments, keywords: Any) -> Tensor | None:
        """A pending tensor for ``zeros_like(pending)``, ``pending.new_zeros(...)`` and so on."""
        if not arguments or not isinstance(arguments[0], Tensor):
            return None
        model, *rest = arguments
        storage = self.log.find(model)
        if storage is None or not model.is_contiguous():
            return None
        if function is Tensor.new and not (rest and all(type(size) is int for size in rest)):
            return None  # made from data
        keywords = {"dtype": model.dtype, "device": storage.device, **keywords}
        if keywords.pop("memory_format", torch.preserve_format) not in _ROW_MAJOR:
            return None
        size = [model.size()] if function.__name__.endswith("_like") else []
        return self._make(LIKE[function], (*size, *rest), keywords)

    def _device_question(self, function: Function, arguments: Arguments) -> Any:
        tensor = arguments[0]
        storage = self.log.find(tensor)
        if storage is None:
            return function(*arguments)
        if function == Tensor.get_device:
            return -1 if storage.device.type == "cpu" else storage.device.index
        question = function.__self__.__name__  # type: ignore[attr-defined]
        if question == "device":
            return storage.device
        caller = sys._getframe(2)
        if question == "is_meta" and caller.f_code is _TRUNC_NORMAL:
            values = tuple(map(caller.f_locals.get, ("tensor", "mean", "std", "a", "b", "generator")))
            self.calls.answer(Call(nn.init.trunc_normal_, values))
            return True
        return question == f"is_{storage.device.type}"
