"""Copies between disk, host and device.

Bytes cross a bus in their stored dtype and are converted where they arrive: half the traffic for weights
stored in eight bits.
"""

from typing import cast

import torch
from torch import Tensor, nn

from offload_layers._device import device_of
from offload_layers._placement import Placement


def convert(tensor: Tensor, placement: Placement) -> Tensor:
    """Return *tensor* as *placement* demands: itself where nothing is to be done, else a copy.

    Differentiable, as ``Tensor.to`` is.
    """
    device = device_of(placement.device)
    if device.is_host and placement.holds(tensor):
        return tensor
    if tensor.device.type == "cpu" and not (tensor.requires_grad and torch.is_grad_enabled()):
        tensor = device.upload(tensor)  # still in the stored dtype
    elif tensor.device != placement.device:
        tensor = tensor.to(placement.device)
    return cast_there(tensor, placement)


def cast_there(tensor: Tensor, placement: Placement) -> Tensor:
    """Return *tensor*, which is on the placement's device, in its dtype."""
    dtype = placement.dtype_for(tensor.dtype)
    if tensor.dtype == dtype:
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return tensor.to(dtype)
    return device_of(tensor.device).cast(tensor, dtype)


def parameter_like(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """Return a parameter which holds *data* and is otherwise as *parameter*: class, attributes, gradients."""
    trains = parameter.requires_grad and (data.is_floating_point() or data.is_complex())
    if type(parameter) is nn.Parameter:
        new = nn.Parameter(data, requires_grad=trains)
    else:
        new = cast(nn.Parameter, data.detach().as_subclass(type(parameter)).requires_grad_(trains))
    if parameter.__dict__:
        new.__dict__.update(parameter.__dict__)
    return new


def on_meta(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Return the stand-in for a parameter whose values are on disk only."""
    if parameter.is_meta and parameter.dtype == dtype:
        return parameter
    return parameter_like(parameter, torch.empty(parameter.shape, dtype=dtype, device="meta"))
