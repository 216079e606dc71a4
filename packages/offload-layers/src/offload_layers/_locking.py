"""Moving what waits in host memory to page-locked memory, once that is worth it.

A model's own weights lie where they were loaded to. From there they cross by way of a ring, which the host
fills: slower than the bus, and its memory is read twice. Moving them costs more than a few such crossings,
since the system clears and locks each page. So weights are moved when they cross for the third time: those of
an encoder that is called once or twice for a picture never are.

Only memory that nobody else has is moved. Otherwise it would be there twice, and somebody who changes it
later (``state_dict`` returns the weights themselves, not copies) would not change the model any more.
"""

import torch
from torch import nn

from offload_layers._changes import is_plain
from offload_layers._device import Device

#: how often weights cross before they are moved
CROSSINGS = 3


def lock_pages(parameter: nn.Parameter, device: Device) -> bool:
    """Move the values of a host parameter to memory from which they cross to *device* faster.

    Returns:
        Whether they were moved. Not if somebody else has the memory, or there is no better one.
    """
    if parameter.device.type != "cpu" or not is_plain(parameter) or parameter.is_inference():
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


def _is_alone(tensor: torch.Tensor) -> bool:
    """Say whether *tensor* is all that refers to its memory; if that cannot be known, no."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or tensor.is_shared():  # type: ignore[no-untyped-call]
        return False
    alone = torch.empty(1)
    its, of_one = (count(t.untyped_storage()._cdata) for t in (tensor, alone))
    return bool(its == of_one)
