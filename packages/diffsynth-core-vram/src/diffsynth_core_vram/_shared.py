"""Tied parameters of a model whose layers are managed one by one: in memory once."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


class Shared(Mapping[str, Tensor]):
    """A checkpoint that gives the very same tensor under all names of a tied parameter.

    Each managed layer brings its own weights to where they rest.  What layers share is already there, so that
    none of them makes a copy.

    Args:
        source: The checkpoint.
        aliases: Names of tied parameters -> the name under which *source* has each.
        place: Brings a tensor to where the layers keep it at rest.
    """

    def __init__(
        self, source: Mapping[str, Tensor], aliases: Mapping[str, str], place: Callable[[Tensor], Tensor]
    ) -> None:
        self._source = source
        self._aliases = aliases
        self._place = place
        self._placed: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        first = self._aliases.get(name)
        if first is None:
            return self._source[name]
        if first not in self._placed:
            self._placed[first] = self._place(self._source[first])
        return self._placed[first]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._source, *self._aliases]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._aliases or name in self._source

    def info(self, name: str) -> Any:
        """Return an object with ``dtype`` and ``shape``: the source's description, or the tensor itself."""
        first = self._aliases.get(name, name)
        info = getattr(self._source, "info", None)
        return self._source[first] if info is None else info(first)

    def trim(self) -> None:
        """Let the source give back memory that it keeps for the next read."""
        getattr(self._source, "trim", lambda: None)()
