"""Moving what waits in host memory to page-locked memory, once that is worth it.

A model's own weights lie where they were loaded to. From there they cross by way of a ring, which the host
fills: slower than the bus, and its memory is read twice. Moving them costs more than a few such crossings,
since the system clears and locks each page. So weights are moved when they cross for the third time: those of
an encoder that is called once or twice for a picture never are.

Only memory that no other tensor has is moved. Otherwise it would be there twice, and somebody who changes it
later (``state_dict`` returns the weights themselves, not copies) would not change the model any more.
"""

from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._device import Device

#: how often weights cross before they are moved
CROSSINGS = 3


def lock_pages(parameter: nn.Parameter, device: Device) -> bool:
    """Move the values of a host parameter to memory from which they cross to *device* faster.

    Returns:
        Whether they were moved. Not if another tensor has the memory, or there is no better one.
    """
    if parameter.device.type != "cpu" or type(parameter) is not nn.Parameter or parameter.is_inference():
        return False
    if not _is_alone(parameter):
        return False
    with torch.inference_mode(False):
        values = parameter.detach()
        locked = device.lock(values)
        if locked is values:
            return False
        parameter.data = locked
    return True


def unlock_pages(parameter: Tensor) -> None:
    """Move the values of a host parameter to memory that is not locked, if no other tensor has them."""
    if parameter.device.type == "cpu" and _is_alone(parameter):
        with torch.inference_mode(False):
            parameter.data = parameter.detach().clone()


def _is_alone(tensor: Tensor) -> bool:
    """Say whether *tensor* is all that refers to its memory; if that cannot be known, no."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or tensor.is_shared():  # type: ignore[no-untyped-call]
        return False
    both: tuple[Any, Any] = tensor, nn.Parameter(torch.empty(1, device="cpu"))
    its, of_one = ((count(t.untyped_storage()._cdata), t._use_count()) for t in both)
    return bool(its == of_one)  # the second: one that was exported is held without its memory being so
