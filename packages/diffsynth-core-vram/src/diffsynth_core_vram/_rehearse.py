"""What torch says to a state dict, tried on a copy of the model: its structure without its memory.

Hooks and ``_load_from_state_dict`` of modules run on the copy: they may change it, and find no values in it.
"""

import copy
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn


def rehearse(model: nn.Module, state: Mapping[str, object]) -> tuple[nn.Module, list[str], list[str]]:
    """Load *state* into a copy of *model*; return the copy, the names that are missing, and the unexpected.

    Raises:
        Exception: whatever the copy or its modules raise: nothing is known then.
    """
    copied = _without_values(model)
    missing, unexpected = copied.load_state_dict(state, strict=False, assign=True)
    return copied, list(missing), list(unexpected)


def stand_in(tensor: Tensor) -> Tensor:
    """Return a tensor on meta that is like *tensor* for those who do not read it."""
    if nn.parameter.is_lazy(tensor):
        return type(tensor)(requires_grad=tensor.requires_grad, device="meta", dtype=tensor.dtype)  # type: ignore[call-arg]
    empty = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _without_values(model: nn.Module) -> nn.Module:
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): stand_in(tensor) for tensor in tensors}
    with _NoTensorIsCopied():
        copied = copy.deepcopy(model, memo)
    modules = set(map(id, model.modules()))
    for module in copied.modules():
        if id(module) in modules:  # by a __deepcopy__ of its own
            raise TypeError(f"{type(module).__name__} gives itself for its copy")
        wrapped: Any
        for wrapped in module._load_state_dict_pre_hooks.values():
            wrapped.hook = _rebound(wrapped.hook, memo)
        hooks = module._load_state_dict_post_hooks
        hooks.update({key: _rebound(hook, memo) for key, hook in hooks.items()})
    return copied


def _rebound(hook: Callable[..., Any], memo: dict[int, Any]) -> Callable[..., Any]:
    """Return *hook* with copies of what it encloses, such as ``self``: deepcopy keeps functions."""
    if not isinstance(hook, FunctionType) or not hook.__closure__:
        return hook
    with _NoTensorIsCopied():
        cells = tuple(CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in hook.__closure__)
    rebound = FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
    rebound.__kwdefaults__ = hook.__kwdefaults__
    return rebound


class _NoTensorIsCopied(torch.overrides.TorchFunctionMode):
    """Tensors that are neither parameters nor buffers are copied without their values, too."""

    def __torch_function__(
        self, function: Any, types: object, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function in (Tensor.__deepcopy__, Tensor.clone):
            return stand_in(arguments[0])
        return function(*arguments, **(keywords or {}))
