"""Factories, which make no memory in a block: their tensors are pending."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._call import Call
from ._functions import PLAIN, names
from ._log import Log
from ._tensors import CPU, META, resolve

#: functions that make tensors, and what fills these; `torch.full` is told
FACTORIES: dict[Any, tuple[Any, ...]] = {
    torch.empty: (),
    torch.zeros: (Tensor.zero_,),
    torch.ones: (Tensor.fill_, 1),
    torch.full: (Tensor.fill_,),
    torch.rand: (Tensor.uniform_,),
    torch.randn: (Tensor.normal_,),
}
#: functions that make a tensor shaped like another, and the factory that they come down to
LIKE = {
    getattr(owner, spelling): factory
    for factory in FACTORIES
    for owner, spelling in ((torch, f"{factory.__name__}_like"), (Tensor, f"new_{factory.__name__}"))
    if hasattr(owner, spelling)
}
LIKE[Tensor.new] = torch.empty  # if it is given sizes; initializers of older versions of torch use it
#: their arguments that say nothing about what the storage would hold
DEFERRABLE = names("size dtype device requires_grad memory_format fill_value")
#: what a contiguous tensor keeps
ROW_MAJOR = (None, torch.preserve_format, torch.contiguous_format)
_dispatch_modes = torch._C._len_torch_dispatch_stack


def make(log: Log, factory: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor | None:
    """A pending tensor; None if this call of a factory has to run plainly."""
    options = {name: value for name, value in keywords.items() if value is not None}
    # tensors of a FakeTensorMode have no storage to save
    if _dispatch_modes() or (options and not options.keys() <= DEFERRABLE):
        return None
    device = resolve(options.get("device"))
    if device is not CPU and device.type == "meta":
        return None
    options["device"] = META
    fill = FACTORIES[factory]
    if factory is torch.full:
        fill = (*fill, options["fill_value"] if "fill_value" in options else arguments[1])
        if type(fill[1]) not in PLAIN:
            return None
        tensor = torch.full(*arguments, **options)
    else:
        if len(arguments) == 1 and type(arguments[0]) is tuple and arguments[0]:
            arguments = arguments[0]  # torch parses separate sizes faster
        tensor = torch.empty(*arguments, **options)
    is_drawn = factory in (torch.rand, torch.randn)
    if not tensor.numel() or (is_drawn and (log.streams.seeded_inside() or not tensor.is_floating_point())):
        return None
    storage = log.add(tensor, device)
    if fill:
        log.write(Call(fill[0], (storage, *fill[1:])), [storage])
    return log.hand_out(tensor)


def make_like(
    log: Log, function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> Tensor | None:
    """A pending tensor for ``zeros_like(pending)``, ``pending.new_zeros(...)`` and so on."""
    model, *rest = arguments or [None]
    storage = log.find(model) if isinstance(model, Tensor) and model.is_contiguous() else None
    if storage is None or keywords.get("memory_format") not in ROW_MAJOR:
        return None
    if function is Tensor.new and not (rest and all(type(size) is int for size in rest)):
        return None  # made from data
    size = [model.size()] if function.__name__.endswith("_like") else []
    options = {"dtype": model.dtype, "device": storage.device, **keywords, "memory_format": None}
    return make(log, LIKE[function], (*size, *rest), options)
