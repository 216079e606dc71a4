"""A model that says where it computes, wherever its weights rest.

Libraries give their models a ``device`` property that looks at a parameter, and pipelines make their inputs
there. The parameters of a model on disk are on ``meta``; so the model's class becomes a subclass of its own
whose ``device`` is the one that computes.
"""

import weakref
from typing import Any, cast

import torch
from torch import nn

_ATTRIBUTE = "_computes_on"


def present(model: nn.Module, device: torch.device) -> None:
    """Let ``model.device`` be *device*, if its class has such a property."""
    own = type(model)
    if isinstance(getattr(own, "device", None), property):
        model.__dict__[_ATTRIBUTE] = device
        model.__class__ = _subclass(own)


def end_presenting(model: nn.Module) -> None:
    """Give *model* the class back that it had before."""
    if model.__dict__.pop(_ATTRIBUTE, None) is not None:
        model.__class__ = type(model).__bases__[0]


# by the id of the class that they are derived from, and keep; no class is kept alive here
_SUBCLASSES: weakref.WeakValueDictionary[int, type[nn.Module]] = weakref.WeakValueDictionary()


def _subclass(own: type[nn.Module]) -> type[nn.Module]:
    made = _SUBCLASSES.get(id(own))
    if made is None:
        made = _SUBCLASSES[id(own)] = _make_subclass(own)
    return made


def _make_subclass(own: type[nn.Module]) -> type[nn.Module]:
    def device(self: nn.Module) -> torch.device:
        return self.__dict__[_ATTRIBUTE]  # type: ignore[no-any-return]

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Copy and pickle as the class without the property."""
        where = device(self)
        end_presenting(self)
        try:
            return own.__reduce_ex__(self, protocol)
        finally:
            present(self, where)

    namespace: dict[str, Any] = {
        "device": property(device, doc="Where the model computes."),
        "__reduce_ex__": reduce,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    if "_plain_class" in own.__dict__:
        namespace["_plain_class"] = own.__dict__["_plain_class"]
    metaclass: Any = type(own)
    return cast(type[nn.Module], metaclass(own.__name__, (own,), namespace))
