"""How a block sees the torch functions that a constructor calls, and answers the common ones.

While a `TorchFunctionMode` is entered, torch calls its ``__torch_function__(function, types, arguments,
keywords)`` in place of every torch function and tensor method that the current thread calls, and takes what
it returns as the result. Inside that method the mode is off, so calling ``function`` there runs it plainly.
"""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ._calls import PLAIN, Calls, with_index
from ._pending import META, Function

if TYPE_CHECKING:
    from ._block import Block


def _present(owner: object, names: str) -> list[Function]:
    """Those of *names* that *owner* has in the installed torch."""
    return [getattr(owner, name) for name in names.split() if hasattr(owner, name)]


def _slots(slot: str, names: str) -> list[Function]:
    return [getattr(attribute, slot) for attribute in _present(Tensor, names)]


#: what needs shape, dtype, flags or hooks only: a meta tensor answers truly
METADATA = frozenset(
    _slots(
        "__get__",
        "shape ndim dtype layout requires_grad is_leaf grad grad_fn retains_grad output_nr names nbytes"
        " itemsize is_sparse is_sparse_csr is_quantized is_nested is_mkldnn _version _backward_hooks name"
        " _post_accumulate_grad_hooks",
    )
    + _slots("__set__", "requires_grad grad _backward_hooks _post_accumulate_grad_hooks")
    + _present(
        Tensor,
        "dim size numel nelement ndimension stride storage_offset is_contiguous is_floating_point is_complex"
        " is_signed is_inference is_conj is_neg is_same_size element_size has_names __len__ __hash__ _is_view"
        " requires_grad_ retain_grad register_hook register_post_accumulate_grad_hook",
    )
    + _present(
        torch,
        "numel is_floating_point is_complex is_same_size is_inference is_signed result_type"
        " _has_compatible_shallow_copy_type",
    )
    + [torch._C._set_grad_enabled]
)
FACTORIES = frozenset(_present(torch, "empty zeros ones rand randn full"))
#: functions that make a tensor shaped like a pending one, and the factory that they come down to
LIKE: dict[Function, Function] = {
    getattr(owner, spelling): factory
    for factory in FACTORIES
    for owner, spelling in ((torch, f"{factory.__name__}_like"), (Tensor, f"new_{factory.__name__}"))
    if hasattr(owner, spelling)
}
LIKE[Tensor.new] = torch.empty  # if it is given sizes
#: arguments of a factory that say nothing about what the storage would hold
DEFERRABLE = frozenset({"size", "dtype", "device", "requires_grad", "memory_format", "fill_value"})
_ROW_MAJOR = (torch.preserve_format, torch.contiguous_format)  # what a contiguous tensor keeps
#: what must be answered as a plain construction would
DEVICE = frozenset([*_slots("__get__", "device is_meta is_cpu is_cuda"), Tensor.get_device])
#: since torch 2.12 this initializer announces itself only by asking whether its tensor is on meta
_TRUNC_NORMAL = getattr(nn.init, "_no_grad_trunc_normal_").__code__  # noqa: B009
_CPU, _EMPTY, _FULL, _DRAWN = torch.device("cpu"), torch.empty, torch.full, (torch.rand, torch.randn)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


class BlockMode(TorchFunctionMode):
    """Answers for one block."""

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
        if made is not None:
            return made
        return self.calls.answer(function, arguments, keywords, self._resolve(keywords.get("device")))

    def _make(self, factory: Function, arguments: Sequence[Any], keywords: dict[str, Any]) -> Tensor | None:
        """A pending tensor; None if this call has to run plainly."""
        options = {name: value for name, value in keywords.items() if value is not None}
        if options and not options.keys() <= DEFERRABLE:
            return None
        if _dispatch_modes():  # a FakeTensorMode has no storage to save
            return None
        device = self._resolve(options.get("device"))
        if device is META:
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
        length = tensor.numel()
        if not length:
            return None
        if factory in _DRAWN:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                return None  # it raises
            if self.log.streams.seeded_inside():
                return None
        return self.log.add(tensor, factory, length, device)

    def _make_like(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any]
    ) -> Tensor | None:
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

    def _resolve(self, device: Any) -> torch.device:
        """The device that a factory called with ``device=device`` uses."""
        if device is None:
            if not _function_modes():
                return _CPU
            modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
            contexts = [mode for mode in modes if isinstance(mode, DeviceContext)]
            device = contexts[-1].device if contexts else _CPU
        device = with_index(torch.device(device))
        return META if device == META else device

    def _device_question(self, function: Function, arguments: Sequence[Any]) -> Any:
        tensor = arguments[0]
        storage = self.log.find(tensor)
        if storage is None:
            return function(*arguments)
        if function == Tensor.get_device:
            return -1 if storage.device == _CPU else storage.device.index
        question = function.__self__.__name__  # type: ignore[attr-defined]
        if question == "device":
            return storage.device
        caller = sys._getframe(2)
        if question == "is_meta" and caller.f_code is _TRUNC_NORMAL and storage.value is None:
            call = caller.f_locals
            if call.get("generator") is None:
                bounds = (call["mean"], call["std"], call["a"], call["b"])
                frozen = self.log.freeze((tensor, *bounds), {})
                self.log.write([storage], nn.init.trunc_normal_, *frozen)
                return True
        return question == f"is_{storage.device.type}"
