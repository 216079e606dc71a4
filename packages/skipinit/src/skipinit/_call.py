"""Calls of torch functions as values: their tensors can be found and changed, and they can be made later."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """A function and what it is called with."""

    function: Callable[..., Any]
    arguments: Sequence[Any]
    keywords: Mapping[str, Any] = MappingProxyType({})

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "")

    def run(self, **more: Any) -> Any:
        """What the function returns, also given *more* keywords."""
        return self.function(*self.arguments, **self.keywords, **more)

    def tensors(self) -> list[Tensor]:
        """Those among the arguments."""
        return tensors_in((self.arguments, self.keywords))

    def replace(self, change: Callable[[Any], Any], kinds: Any = Tensor) -> "Call":
        """The same call with every tensor, or whatever is one of *kinds*, changed."""
        return Call(self.function, *replace((tuple(self.arguments), dict(self.keywords)), change, kinds))


def replace(values: Any, change: Callable[[Any], Any], kinds: Any = Tensor) -> Any:
    """A copy of nested tuples, lists and dicts with everything changed that is one of *kinds*."""
    if isinstance(values, kinds):
        return change(values)
    if isinstance(values, dict):
        return {name: replace(value, change, kinds) for name, value in values.items()}
    if not isinstance(values, (tuple, list)):
        return values
    changed = [replace(value, change, kinds) for value in values]
    if isinstance(values, list):
        return changed
    return type(values)(*changed) if hasattr(values, "_fields") else type(values)(changed)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among nested tuples, lists and dicts."""
    found: list[Tensor] = []
    replace(values, found.append)
    return found
