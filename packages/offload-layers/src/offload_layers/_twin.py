"""A plain twin of a managed layer: the oracle that the layer's results are compared with.

It has the layer's own class and copies of all that the layer has, so that it can run without a trace. Its
weights are made by ``Tensor.to`` alone from where they rest, and not in the ways of the engine.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._layers import AutoTorchModule
from offload_layers._lora import LoRAHotLoadMixin
from offload_layers._managed import ManagedModule, plain_class
from offload_layers._packed import PackedWeight, moved
from offload_layers._residency import Residency
from offload_layers._transfer import parameter_like
from offload_layers._weight import Weight

_NOT_COPIED = frozenset({"_residency", "_weights", "_merge", "_parameters", "_buffers"})


class Twin:
    """What *module* has before a call, without its weights.

    Args:
        module: The layer.
        model: The model around it. What the layer can reach of it is not copied.
    """

    def __init__(self, module: AutoTorchModule, model: nn.Module) -> None:
        self._module = module
        self._device = module._owner().policy.computation.device
        self._twins: dict[nn.Module, nn.Module] = {}
        memo: dict[int, Any] = {id(part): part for part in model.modules()}
        for part in module.modules():
            own = plain_class(type(part)) if isinstance(part, ManagedModule) else type(part)
            memo[id(part)] = self._twins[part] = object.__new__(own)
        for part, twin in self._twins.items():
            self._copy(part, twin, memo)

    @property
    def nbytes(self) -> int:
        """Bytes of the device that the weights take."""
        computation = self._module._owner().policy.computation
        weights = {weight for part in self._managed() for weight in part._own_weights().values()}
        return sum(weight.nbytes_in(computation) for weight in weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer gives, adapters included. The weights are here from now on."""
        made: dict[Weight, Tensor] = {}
        for part in self._managed():
            twin = self._twins[part]
            for name, weight in part._own_weights().items():
                if weight not in made:
                    made[weight] = _due(part._owner(), weight)
                registry: dict[str, Any] = twin._buffers if weight.is_buffer else twin._parameters
                registry[name] = made[weight]
            if isinstance(twin, nn.RNNBase):
                twin._flat_weights = [getattr(twin, n, None) for n in twin._flat_weights_names]
        return _forward(self._module, self._twins[self._module])(*args, **kwargs)

    def _managed(self) -> list[ManagedModule]:
        return [part for part in self._twins if isinstance(part, ManagedModule)]

    def _copy(self, part: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
        own = part._own_weights() if isinstance(part, ManagedModule) else {}
        for key, value in part.__dict__.items():
            if key in own or key in _NOT_COPIED or (key == "forward" and isinstance(part, AutoTorchModule)):
                continue
            try:
                twin.__dict__[key] = copy.deepcopy(value, memo)
            except Exception:  # a lock, a file: nothing that could be had twice
                twin.__dict__[key] = value
        twin.__dict__["_parameters"] = {
            name: None if name in own or value is None else _apart(value, self._device)
            for name, value in part._parameters.items()
        }
        twin.__dict__["_buffers"] = {
            name: None if name in own or value is None else _apart(value, self._device)
            for name, value in part._buffers.items()
        }
        if isinstance(part, AutoTorchModule) and part is not self._module:  # a layer inside the layer
            twin.__dict__["forward"] = _forward(part, twin)


def _apart(tensor: Any, device: torch.device) -> Any:
    with torch.no_grad():
        values = tensor.detach().to(device, copy=True)
    return parameter_like(tensor, values) if isinstance(tensor, nn.Parameter) else values


def _due(layer: Residency, weight: Weight) -> Tensor:
    values = due_values(layer, weight)
    if isinstance(weight, PackedWeight):
        return values
    parameter = parameter_like(weight.registered, values)
    if weight.registered.is_meta and torch.is_grad_enabled():  # on disk there is no place for a gradient
        parameter.requires_grad_(False)
    return parameter


def _forward(module: AutoTorchModule, twin: nn.Module) -> Callable[..., Any]:
    """Return what *module* computes, with the weights of *twin*."""
    computing = type(module)._computing(plain_class(type(module)).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = computing(twin, *args, **kwargs)
        if isinstance(module, LoRAHotLoadMixin) and module.lora_A_weights:
            return module.lora_forward(args[0] if args else next(iter(kwargs.values())), out)
        return out

    return forward


def due_values(layer: Residency, weight: Weight) -> Tensor:
    """Return what *weight* has to be while *layer* computes: a tensor of its own, without gradients."""
    values, passed = layer.origin(weight)
    with torch.no_grad():
        if isinstance(weight, PackedWeight):
            due = moved(values, passed[-1].device)
            return due.clone() if due is values else due
        due = values.detach()
        for placement in passed:
            due = due.to(placement.device).to(placement.dtype_for(due.dtype))
        return due.clone() if due.data_ptr() == values.data_ptr() else due
