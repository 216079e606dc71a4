"""Tensors: telling their storages and devices, exchanging their data."""

from typing import Any

import torch
from torch import Tensor

from ._errors import PendingValueError

CPU, META = torch.device("cpu"), torch.device("meta")


def storage_address(tensor: Tensor) -> int:
    """What tells storages apart; 0 for tensors that have none (sparse ones, some wrappers)."""
    try:
        address: int = torch._C._storage_address(tensor)  # type: ignore[attr-defined]
    except (NotImplementedError, RuntimeError):
        return 0
    return address


def become(tensor: Tensor, other: Tensor) -> None:
    """Exchange the data of *tensor*, which stays the same Python object, with that of *other*."""
    try:
        if tensor._use_count() > 1:  # type: ignore[attr-defined]
            raise RuntimeError("C++ code refers to it")
        other.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        torch._C._swap_tensor_impl(tensor, other)
    except RuntimeError as error:
        raise PendingValueError(
            f"a tensor of shape {tuple(tensor.shape)} made inside skip_model_initialization() is held by C++ "
            "code (TorchScript, torch.func, or an autograd graph), which would not see its new storage.\n"
            "    Register it as a buffer first, or make it before the block."
        ) from error
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):  # autograd knew them by the old data
        if getattr(tensor, hooks, None):
            setattr(tensor, hooks, getattr(tensor, hooks))


def resolve(device: Any) -> torch.device:
    """The device of a tensor made with ``device=device``: an accelerator has an index, None is the default.

    What does not exist raises, as it does plainly.
    """
    if device is None and not torch._C._len_torch_function_stack():  # as torch.device("cuda") as a context is
        return CPU
    return torch.empty(0, device=device).device


def autocasts(device: torch.device) -> bool:
    """Whether ``torch.autocast`` chooses the dtypes of what is computed on *device* now."""
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a kind of device that it does not know, such as meta
        return False
