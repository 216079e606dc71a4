"""What makes a module managed: its class becomes a generated subclass of its own class.

The object stays the same object, ``isinstance`` of its class holds, and so do its hooks, its children, its
names in ``state_dict`` and every reference that others keep to it. The generated class adds

* for each parameter name a descriptor, asked only while the weight is not in place (a weight in place is an
  instance attribute, which Python prefers to a descriptor without ``__set__``);
* what ``nn.Module`` does by way of ``_parameters``, done by way of the residency: saving, loading,
  assigning, copying, pickling, ``.to()``.
"""

import copy
import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from offload_layers._errors import ConfigError
from offload_layers._residency import Residency
from offload_layers._values import copied, opened
from offload_layers._weight import Weight

Forward = Callable[..., Any]
_log = logging.getLogger("offload_layers.managed")


class WeightDescriptor:
    """Reads a weight that is not in place right now, as the layer would compute with it."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        weight = module.__dict__["_weights"].get(self.attribute)
        if weight is None:  # deleted, or replaced by something that is no parameter
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.attribute!r}")
        return module.__dict__["_residency"].read(weight)


class Offered:
    """An attribute that a managed module offers, unless the module has one of that name itself."""

    def __init__(self, getter: Callable[[Any], object]) -> None:
        self.__doc__ = getter.__doc__
        self._getter = getter
        self._name = getter.__name__

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        for registry in (module._modules, module._buffers, module._parameters):
            if self._name in registry:
                return registry[self._name]
        own = getattr(plain_class(type(module)), self._name, None)
        if own is not None and not isinstance(own, Offered):
            return own.__get__(module, type(module)) if hasattr(own, "__get__") else own
        return self._getter(module)


class FlatWeights:
    """The list of weights which ``nn.RNNBase`` keeps beside its parameters, made anew at each reading."""

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        names = module.__dict__["_flat_weights_names"]
        return [getattr(module, name, None) for name in names]

    def __set__(self, module: nn.Module, weights: object) -> None:
        """Do nothing: ``forward`` would keep the copies alive that it has computed with."""


class ManagedModule(nn.Module):
    """A module whose parameters are owned by a residency."""

    _weight_class: type[Weight] = Weight
    _owns_buffers = False  # whether persistent buffers are weights, too
    _stands_alone = False  # whether a layer around it leaves it alone

    @classmethod
    def _managed_forward(cls, own_forward: Forward) -> Forward:
        """Return the ``forward`` of a managed class, given that of the module's own class."""
        return own_forward

    def _own_weights(self) -> dict[str, Weight]:
        return self.__dict__["_weights"]  # type: ignore[no-any-return]

    def _owner(self) -> Residency:
        return self.__dict__["_residency"]  # type: ignore[no-any-return]

    # -- assigning ----------------------------------------------------------------------------------

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register *param*; under the name of a managed weight it becomes that weight's values."""
        weight = self._own_weights().get(name)
        if weight is None or self._owner().is_open:
            super().register_parameter(name, param)
        elif param is None:
            raise ConfigError(
                f'parameter "{weight.name}" is managed and cannot be None; delete the attribute instead'
            )
        else:
            self._owner().replace(weight, param)

    def __delattr__(self, name: str) -> None:
        weight = self.__dict__["_weights"].pop(name, None)
        if weight is not None:
            self.__dict__.pop(name, None)
            self._owner().forget(weight, self)
        super().__delattr__(name)

    # -- saving and loading -------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self._own_weights().items():
            value = self._owner().value(weight)
            destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        residency, weights = self._owner(), self._own_weights()
        coming = {name: weight for name, weight in weights.items() if prefix + name in state_dict}
        with opened(residency, coming.values()):
            super()._load_from_state_dict(state_dict, prefix, *args)

    # -- copying ------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "ManagedModule":
        new = object.__new__(type(self))
        memo[id(self)] = new
        own = self._own_weights()
        rest = {k: v for k, v in self.__dict__.items() if k not in own}
        parameters = {n: None if n in own else copy.deepcopy(p, memo) for n, p in self._parameters.items()}
        new.__dict__["_parameters"] = parameters  # the residency's copy fills in the managed ones
        for key, value in rest.items():  # the residency comes after the buffers, and before its weights
            if key == "_residency":
                new.__dict__[key] = memo.get(id(value)) or copied(value, memo)
            elif key != "_parameters":
                new.__dict__[key] = copy.deepcopy(value, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain module with real weights: a file on this machine may not exist on another."""
        plain = plain_class(type(self))
        with opened(self._owner(), self._own_weights().values(), read=True):
            own_getstate = getattr(plain, "__getstate__", None)  # every object has one from Python 3.11 on
            state = dict(own_getstate(self) if own_getstate else self.__dict__)
            state["_parameters"] = dict(self._parameters)
            state["_buffers"] = dict(self._buffers)
        for name in ("_residency", "_weights", "_merge", *self._own_weights()):
            state.pop(name, None)
        if isinstance(self, nn.RNNBase):
            self.__dict__.pop("_flat_weights", None)
            state["_flat_weights"] = [state["_parameters"].get(n) for n in self._flat_weights_names]
        return _unpickled, (plain, state)

    def _apply(self, fn: Any, recurse: bool = True) -> "ManagedModule":
        if recurse:
            for module in self.children():
                module._apply(fn)  # type: ignore[no-untyped-call]
        probe = torch.empty(0, dtype=torch.float32)
        if fn(probe).dtype != probe.dtype:
            _warn_of_cast(str(self._owner().policy.computation))
        return self


@functools.lru_cache
def _warn_of_cast(placement: str) -> None:
    _log.warning(
        "a change of dtype has no effect on managed layers: they compute in %s. Set computation_dtype "
        "in vram_config instead.",
        placement,
    )


def _unpickled(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = cls.__new__(cls)
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    return module


def plain_class(managed: type) -> type[nn.Module]:
    """Return the class that a module had before it was managed."""
    return managed.__dict__["_plain_class"]  # type: ignore[no-any-return]


Names = tuple[str, ...]


def managed_class(
    face: type[ManagedModule], own: type[nn.Module], parameters: Names, buffers: Names = ()
) -> type[ManagedModule]:
    """Return the subclass of *own*, with the methods of *face*, in which these tensors are managed."""
    key = (face, id(own), parameters, buffers)
    made = _CLASSES.get(key)
    if made is None:
        made = _CLASSES[key] = _make_class(face, own, parameters, buffers)
    return made


# neither keeps a class alive: one that torch makes for a single module, to parametrize it, holds that module.
# The managed class keeps its base, whose id is thus not used again before the entry is gone
_CLASSES: weakref.WeakValueDictionary[tuple[type, int, Names, Names], type[ManagedModule]] = (
    weakref.WeakValueDictionary()
)


def _make_class(
    face: type[ManagedModule], own: type[nn.Module], parameters: Names, buffers: Names
) -> type[ManagedModule]:
    namespace: dict[str, Any] = {name: WeightDescriptor(name) for name in parameters + buffers}
    namespace.update(
        __module__=own.__module__,
        __qualname__=own.__qualname__,
        __doc__=own.__doc__,
        _plain_class=own,
    )
    if issubclass(own, nn.RNNBase):
        namespace["_flat_weights"] = FlatWeights()
    if buffers:  # assigning to a parameter calls register_parameter, to a buffer it calls nothing
        namespace["__setattr__"] = _assigning(own)
    forward = face._managed_forward(own.forward)
    if forward is not own.forward:
        namespace["forward"] = functools.wraps(own.forward)(forward)
    metaclass: Any = type(own)  # such as ABCMeta
    return cast(type[ManagedModule], metaclass(own.__name__, (face, own), namespace))


def _assigning(own: type[nn.Module]) -> Callable[[ManagedModule, str, object], None]:
    """Return the ``__setattr__`` of a class whose buffers are managed."""

    def assign(self: ManagedModule, name: str, value: Any) -> None:
        weight = self.__dict__.get("_weights", {}).get(name)
        if weight is None or not weight.is_buffer or self._owner().is_open:
            own.__setattr__(self, name, value)
        else:
            self._owner().replace(weight, value)

    return assign


def names_of(module: nn.Module, *, with_buffers: bool) -> tuple[Names, Names]:
    """Return the names of the parameters of *module* itself, and of its persistent buffers if asked for."""
    buffers = module._buffers.items() if with_buffers else ()
    return (
        tuple(name for name, parameter in module._parameters.items() if parameter is not None),
        tuple(n for n, b in buffers if b is not None and n not in module._non_persistent_buffers_set),
    )


def swap_classes(modules: list[nn.Module], face: type[ManagedModule], top: nn.Module) -> None:
    """Give every module its managed class: *top* as an instance of *face*, the others without a face.

    Raises:
        ConfigError: a module's class cannot be extended; all modules are as before.
    """
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in modules:
        own = type(module)
        names = names_of(module, with_buffers=face._owns_buffers)
        try:
            module.__class__ = managed_class(face if module is top else ManagedModule, own, *names)
        except TypeError as error:
            for earlier, its_class in swapped:
                earlier.__class__ = its_class
            raise ConfigError(
                f"a module of class {own.__module__}.{own.__qualname__} cannot be managed: its class cannot "
                f"be extended ({error}). Leave it out of the module map; scripted modules are such."
            ) from error
        swapped.append((module, own))


def attach(module: nn.Module, residency: Residency, weights: dict[str, Weight]) -> None:
    """Tell a module of a managed class who owns its parameters."""
    module.__dict__.update(_residency=residency, _weights=weights)
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def detach(module: ManagedModule) -> None:
    """Give *module* its own class back; what it holds at rest is its own again."""
    if isinstance(module, nn.RNNBase):
        flat = [module._parameters.get(name) for name in module._flat_weights_names]
    for name in ("_residency", "_weights"):
        module.__dict__.pop(name)
    module.__class__ = plain_class(type(module))  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):
        module._flat_weights = flat
