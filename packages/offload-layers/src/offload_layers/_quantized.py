"""Quantized linear layers, of whatever library: what they hold moves between the tiers untouched.

Which layers are quantized, and how they are made from a checkpoint, is told by an object such as DiffSynth's
``QuantizeConfig``; of its methods these are used:

``is_quantized_linear(module)``
    Whether a layer is one. Required.
``unflatten_state_dict(tensors, metadata)``
    The layer's tensors from those of a checkpoint. Without it they are those of the checkpoint.
``build_quantized_shell(module, dtype, layer_name=name)``
    An empty layer that takes such tensors by ``load_state_dict(assign=True)``. Without it, a copy of the
    layer on meta does.
"""

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from offload_layers._errors import ConfigError
from offload_layers._layers import AutoTorchModule
from offload_layers._lora import LoRAHotLoadMixin, with_adapters
from offload_layers._managed import Forward
from offload_layers._packed import PackedSource, PackedWeight
from offload_layers._placement import Policy
from offload_layers._source import check_source

_SIGNATURE = inspect.signature(AutoTorchModule.__new__)


class AutoWrappedQuantizedModule(LoRAHotLoadMixin, AutoTorchModule, nn.Linear):
    """A quantized linear layer: parameters and persistent buffers move as they are, and are never converted.

    Takes the arguments of `AutoTorchModule`, of which the dtypes say only what is on ``"disk"``, and two
    more. Low-rank adapters can be added, as to `AutoWrappedLinear`; they cannot be merged.

    Args:
        quantize: How the layer is made from tensors of *disk_map*; None: they are the layer's own.
        metadata: The checkpoint's metadata, which *quantize* may need.
    """

    _weight_class = PackedWeight
    _owns_buffers = True
    _stands_alone = True

    def __new__(
        cls,
        module: nn.Module,
        *args: Any,
        quantize: Any = None,
        metadata: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Manage *module* and return it."""
        given = _SIGNATURE.bind(cls, module, *args, **kwargs)
        name, dtype = given.arguments.get("name", ""), given.arguments.get("computation_dtype")
        source = check_source(given.arguments.get("disk_map"))
        if source is not None and isinstance(module, nn.Linear):
            unflatten = getattr(quantize, "unflatten_state_dict", None)
            packed = PackedSource(
                source,
                f"{name}." if name else "",
                _shell_of(module, quantize, dtype, name),
                (lambda tensors: unflatten(tensors, dict(metadata or {}))) if unflatten else dict,
            )
            _make_room_for(module, name, packed)
            given.arguments["disk_map"] = packed
        layer = super().__new__(*given.args, **given.kwargs)
        layer.computation_dtype = dtype
        layer.init_lora_hotload()
        return layer

    @classmethod
    def _check(cls, module: nn.Module, policy: Policy) -> None:
        super()._check(module, policy)
        if not isinstance(module, nn.Linear):
            raise ConfigError(
                f"AutoWrappedQuantizedModule wraps quantized layers that are nn.Linear by inheritance; got "
                f"{type(module).__name__}. Use AutoWrappedModule without dtypes"
            )

    @classmethod
    def _policy(cls, policy: Policy) -> Policy:
        as_stored = {
            role: dataclasses.replace(getattr(policy, role), dtype=None)
            for role in ("offload", "onload", "preparing", "computation")
        }
        return Policy(**as_stored)

    @classmethod
    def _managed_forward(cls, own_forward: Forward) -> Forward:
        return with_adapters(super()._managed_forward(own_forward))

    @property
    def computation_dtype(self) -> torch.dtype | None:
        """The dtype of inputs and outputs, as it was given; the weights keep their own."""
        return self.__dict__.get("_computation_dtype")

    @computation_dtype.setter
    def computation_dtype(self, dtype: torch.dtype | None) -> None:
        self.__dict__["_computation_dtype"] = dtype

    def computation_module(self) -> "AutoWrappedQuantizedModule":
        """Return the layer, whose weights read as they are in the computation placement."""
        return self


def check_quantize(quantize: object) -> None:
    """Raise ``ConfigError`` unless *quantize* can tell quantized layers from others."""
    if quantize is not None and not callable(getattr(quantize, "is_quantized_linear", None)):
        raise ConfigError(
            "quantize must be None or an object with a method is_quantized_linear(module), as DiffSynth's "
            f"QuantizeConfig; got {quantize!r}"
        )


def is_quantized(module: nn.Module, quantize: Any) -> bool:
    """Say whether *module* is one of the layers that *quantize* made, or makes from a checkpoint."""
    return quantize is not None and bool(quantize.is_quantized_linear(module))


def _shell_of(module: nn.Linear, quantize: Any, dtype: torch.dtype | None, name: str) -> nn.Module:
    build = getattr(quantize, "build_quantized_shell", None)
    if build is None:
        return copy.deepcopy(module).to("meta")
    shell = build(module, dtype, layer_name=name)
    if not isinstance(shell, nn.Module):
        raise ConfigError(
            f'build_quantized_shell of {quantize!r} must return a module for "{name}"; got {shell!r}'
        )
    return shell


def _make_room_for(module: nn.Module, name: str, source: PackedSource) -> None:
    """Give *module* empty tensors where it has None but the checkpoint a value, so that it is managed."""
    for path, part in module.named_modules():
        start = ".".join(filter(None, (name, path)))
        for registry in (part._parameters, part._buffers):
            for key, tensor in registry.items():
                if tensor is None and f"{start}.{key}" in source:
                    empty = torch.empty(0, device="meta")
                    is_parameter = registry is part._parameters
                    registry[key] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
