"""Where weights on disk come from: any mapping from names to tensors.

A source may offer more, and is asked for it by name:

* ``info(name)``, an object with ``dtype`` and ``shape``: a model is then checked against its checkpoint
  before anything is read or changed;
* ``prefetch(names)``: tensors are brought closer before they are asked for;
* ``read_into(name, out)``: fills a host tensor, which saves a copy on the way to an accelerator;
* ``renew(names)``: whether tensors that were read are views of its own memory, which may be kept and used
  again now; they were made as good as new ones;
* ``owned()``, the same source such that it gives tensors in memory of their own, for those that stay;
* ``with_threads(number)``, the same source reading with so many threads: beside a computation it gets one;
* ``trim()``: memory that is kept for the next read goes back, since the weights have been read.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError, MissingTensorError, ShapeMismatchError

Source = Mapping[str, Tensor]


def offered(source: Source | None, method: str) -> Callable[..., Any] | None:
    """Return a method that not every source has, or None."""
    return getattr(source, method, None)


def alone(source: Source | None) -> Source | None:
    """Return *source* such that reading from it takes one core, for reading beside a computation."""
    with_threads = offered(source, "with_threads")
    return source if with_threads is None else with_threads(1)


def owning(source: Source) -> Source:
    """Return *source* such that what it gives lies in memory of its own, as far as it can."""
    owned = offered(source, "owned")
    return source if owned is None else owned()


def trim(source: Source | None) -> None:
    """Tell *source* that nothing will be read from it soon."""
    give_back = offered(source, "trim")
    if give_back is not None:
        give_back()


def is_source(source: object) -> TypeGuard[Source]:
    """Say whether *source* maps names; older lazy maps do without being mappings, or having ``keys()``."""
    if isinstance(source, (Sequence, Tensor, type)):  # such as the path of a checkpoint
        return False
    return all(hasattr(source, method) for method in ("__getitem__", "__iter__", "__contains__"))


def check_source(source: object, *, setting: str = "disk_map") -> Source | None:
    """Return *source* if weights can be read from it."""
    if source is None or is_source(source):
        return source
    raise ConfigError(f"{setting} must map names to tensors; got {type(source).__name__}")


def stored_dtype(source: Source, name: str, default: torch.dtype) -> torch.dtype:
    """Return the dtype in which the source gives *name*, as far as it tells without reading."""
    info = offered(source, "info")
    if info is not None:
        dtype = info(name).dtype
        return dtype if isinstance(dtype, torch.dtype) else default
    return default


def stored_name(source: Source | None, name: str) -> str:
    """Return the name under which *source* itself has *name*: another one for weights that are tied."""
    tells = offered(source, "stored_name")
    return name if tells is None else str(tells(name))


def read_tensor(source: Source, name: str) -> Tensor:
    """Return what *source* has under *name*, which must be a tensor."""
    tensor = source[name]
    if not isinstance(tensor, Tensor):
        raise MissingTensorError(
            f'the disk map gives a {type(tensor).__name__} for "{name}", where a tensor is needed. '
            "Pass the state dict of the model alone, or a state_dict_converter that takes it out."
        )
    return tensor


def check_in_source(source: Source, name: str, shape: torch.Size) -> None:
    """Raise unless the source has *name*, and in that shape as far as it tells without reading."""
    if name not in source:
        near = difflib.get_close_matches(name, list(source), 3)
        hint = f" Closest: {', '.join(near)}." if near else ""
        raise MissingTensorError(
            f'the disk map has no tensor "{name}", which a parameter of shape {tuple(shape)} needs.{hint} '
            "Pass the checkpoint of this model, or a state_dict_converter that renames its tensors."
        )
    info = offered(source, "info")
    if info is not None:
        check_shape(name, tuple(info(name).shape), shape)


def check_shape(name: str, found: tuple[int, ...], expected: torch.Size) -> None:
    """Raise ``ShapeMismatchError`` unless the two shapes are equal."""
    if tuple(found) != tuple(expected):
        raise ShapeMismatchError(
            f'tensor "{name}" has shape {tuple(found)} in the disk map, but {tuple(expected)} in the model. '
            "Check that the model was built with the configuration of this checkpoint."
        )


class TiedSource(Mapping[str, Tensor]):
    """A source in which tied parameters are found under any of their names."""

    def __init__(self, source: Source, aliases: Mapping[str, str]) -> None:
        self._source = source
        self._aliases = aliases  # name that the source lacks -> name of the same parameter that it has

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        yield from self._source
        yield from self._aliases

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._source or name in self._aliases

    def stored_name(self, name: str) -> str:
        """Return the name under which the source itself has what is asked for as *name*."""
        return self._aliases.get(name, name)

    def __getattr__(self, method: str) -> Any:
        if method not in ("info", "owned", "prefetch", "read_into", "renew", "trim", "with_threads"):
            raise AttributeError(f"a source of tied parameters has no attribute {method!r}")
        offer = getattr(self._source, method)
        if method == "trim":
            return offer
        if method in ("info", "read_into"):
            return lambda name, *more: offer(self._aliases.get(name, name), *more)
        if method in ("prefetch", "renew"):
            return lambda names: offer([self._aliases.get(name, name) for name in names])
        return lambda *threads: TiedSource(offer(*threads), self._aliases)


def with_ties(source: Source, model: nn.Module, prefix: str = "") -> Source:
    """Return *source*, extended by the names under which *model* ties a parameter that the source has."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(prefix=prefix, remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    aliases = {}
    for names in names_of.values():
        present = [name for name in names if name in source]
        aliases.update({name: present[0] for name in names if present and name not in source})
    return TiedSource(source, aliases) if aliases else source
