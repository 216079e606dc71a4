"""State-dict converters: a function from the state dict of a checkpoint to that of a model.

The converter runs once, on a plain dict of lazy tensors; what it did is kept as views of recorded
operations, and evaluated name by name.  No tensor is read, unless the converter looks at values.

Note [Converters of names]
    Some converters were written for ``{name: name}`` instead.  One that does not get along with tensors is
    called again, with names.  A mistake in one for tensors must not be hidden by that, since it would succeed
    where what it does to tensors stands behind ``isinstance(value, Tensor)``.  So the second call counts only
    if the first did nothing with tensors, failed for lack of what a string has, and if the second did
    with a name what strings are for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safemap._buffers import BufferPool
from safemap._contents import Stored, map_leaves
from safemap._errors import ConverterError, SafemapError
from safemap._header import collector_paused
from safemap._index import Index
from safemap._lazy_evaluate import Evaluation
from safemap._lazy_factories import LazyFactories
from safemap._lazy_graph import View
from safemap._lazy_pickle import pack, unpack
from safemap._lazy_record import Recorder
from safemap._lazy_sources import Original, Output, Sources, opaque_kind
from safemap._lazy_tensor import LazyTensor, Storage
from safemap._lazy_value import Computed
from safemap._read import Reader, Target

StateDictConverter = Callable[[Any], Mapping[Any, Any]]


@dataclass(frozen=True, slots=True)
class Converted:
    """What a converter returned, with ``Output`` in place of tensors.  It can be pickled.

    Attributes:
        converter: Name of the converter.
        state_dict: New name -> value.
    """

    converter: str
    state_dict: dict[Any, Any]

    def apply(self, index: Index, sources: Sources) -> Index:
        """Return *index* under its new names."""

        def resolve(leaf: Any) -> Any:
            if not isinstance(leaf, Output):
                return leaf
            tensor = leaf.tensor
            if isinstance(tensor, Original):
                original = sources.originals[tensor.number]
                return original if isinstance(original, Tensor) else Stored(original)
            entry = sources.entry(tensor)
            return Computed(tensor, sources.places, self.converter) if entry is None else Stored(entry)

        converted = Index(files=index.files, metadata=index.metadata)
        with collector_paused():
            for name, value in self.state_dict.items():
                resolved = map_leaves(value, resolve)
                if isinstance(resolved, Stored) and isinstance(name, str):
                    converted.table[name] = resolved.entry
                else:
                    converted.others[name] = resolved
        return converted

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.converter, *pack(self.state_dict))


def _unpickled(converter: str, *packed: Any) -> Converted:
    return Converted(converter, unpack(*packed))


def convert(
    sources: Sources, converter: StateDictConverter, threads: int, read_limit: int | None = None
) -> Converted:
    """Run *converter* on lazy tensors.

    Args:
        sources: The checkpoint.
        converter: Takes a dict and returns a mapping.
        threads: How many threads read what the converter needs the values of.
        read_limit: How many bytes that may be; None for any number.

    Raises:
        ConverterError: the converter failed, did what cannot be followed, or needs more bytes than it may
            read.
    """
    label = converter_name(converter)
    reader = Reader(Target(torch.device("cpu")), BufferPool(slack=0), threads)

    def evaluate(view: View) -> Tensor:
        with torch.no_grad():
            return Evaluation(reader, sources.places, [view], label).result(view)

    recorder = Recorder(label, evaluate, read_limit)
    with collector_paused():
        tensors, originals, storages = _lazy_tensors(sources, recorder)
        state_dict = sources.state_dict(tensors)
    strings = {value for value in state_dict.values() if isinstance(value, str)}
    try:
        with torch.no_grad(), LazyFactories(recorder):
            result = converter(state_dict)
    except SafemapError:
        raise
    except Exception as error:
        if recorder.failure and isinstance(recorder.failure[0], ConverterError):
            raise recorder.failure[0] from error  # Python turns a TypeError in an operator into another one
        if not recorder.was_used and _wanted_names(error):
            names = _on_names(sources, converter, error)
            if names is not None:
                return Converted(label, names)
        during = f" at {recorder.failure[1]}" if recorder.failure and recorder.failure[0] is error else ""
        raise ConverterError(
            f"the state_dict_converter {label} failed{during}: {type(error).__name__}: {error}"
            f"{_about_opaque(sources)}"
        ) from error
    if recorder.refused:
        raise recorder.refused  # Python takes a TypeError in `a += b` for a reason to try `a = a + b`
    if not isinstance(result, Mapping):
        raise ConverterError(
            f"the state_dict_converter {label} must return a dict; got {type(result).__name__}"
        )
    known = sources.outputs()

    def freeze(leaf: Any) -> Any:
        if not isinstance(leaf, LazyTensor):
            return leaf
        if leaf.storage_.recorder is not recorder:
            return leaf.values("use in another converter")
        view = leaf.view_now()
        number = originals.get(view)
        storage = storages.setdefault(leaf.storage_, len(sources.places) + len(storages))
        return Output(view if number is None else Original(number), storage)

    frozen = {}
    with collector_paused():
        for name, value in result.items():
            if isinstance(value, str) and value in known and value not in strings:
                frozen[name] = known[value]  # it passes names on instead of values
            else:
                frozen[name] = map_leaves(value, freeze)
    return Converted(label, frozen)


def _lazy_tensors(
    sources: Sources, recorder: Recorder
) -> tuple[list[Any], dict[View, int], dict[Storage, int]]:
    """Return what stands for every tensor, which views are still those of the checkpoint, all storages."""
    tensors: list[Any] = []
    originals: dict[View, int] = {}
    storages: dict[int, Storage] = {}
    for number, view in enumerate(sources.views()):
        home = sources.home(number)
        if view is None:  # it can only be passed on
            tensors.append(Output(Original(number), home))
            continue
        storage = storages.get(home)
        if storage is None:
            storage = storages[home] = Storage(view.content, recorder, view.device)
        offset = view.offset // view.dtype.itemsize
        tensor = LazyTensor(storage, view.dtype, view.shape, view.stride, offset)
        tensor._view = view
        tensors.append(tensor)
        originals[view] = number
    return tensors, originals, {storage: home for home, storage in storages.items()}


def _about_opaque(sources: Sources) -> str:
    """Say which tensors the converter has been given as something that it can only pass on."""
    codes = sorted({kind for tensor in sources.originals if (kind := opaque_kind(tensor))})
    if not codes:
        return ""
    return f". Tensors stored as {', '.join(codes)} can be passed on by a converter, not computed with."


#: what is in the message of a TypeError where a tensor was taken for a string: tensors, too, have a ``split``
_ABOUT_STRINGS = re.compile(r"\bstr\b|string|\bsplit")
#: how Python and its library say that they want a string
_WANTS_STRING = re.compile(
    r"expected (a )?str|must be (a )?str|string or bytes|requires string|for 'str' objects"
)


def _wanted_names(error: Exception) -> bool:
    """Tell whether a converter failed because it was given tensors where it expected names."""
    if isinstance(error, AttributeError):
        return error.name is not None and hasattr(str, error.name)
    return isinstance(error, TypeError) and bool(_ABOUT_STRINGS.search(str(error)))


class _Name(str):
    """A name that stands for its tensor: it may be passed on, and looked at as a string is."""

    uses: list[str]  # shared by all names of one call

    def __new__(cls, name: str, uses: list[str]) -> _Name:
        self = super().__new__(cls, name)
        self.uses = uses
        return self

    def __getattribute__(self, attribute: str) -> Any:
        found = super().__getattribute__(attribute)
        if not attribute.startswith("__") and hasattr(str, attribute):
            self.uses.append(attribute)
        return found

    def __add__(self, other: str) -> str:
        self.uses.append("+")
        return super().__add__(other)

    def __radd__(self, other: str) -> str:
        self.uses.append("+")
        return other + str(self)

    def __getitem__(self, key: Any) -> str:
        raise TypeError("a name stands for a tensor here; it has no parts")

    def __len__(self) -> int:
        raise TypeError("a name stands for a tensor here; it has no length")


def _on_names(sources: Sources, converter: StateDictConverter, error: Exception) -> dict[Any, Any] | None:
    """Call a converter that takes ``{name: name}``; return None if it does not only pass names on.

    Args:
        sources: The checkpoint.
        converter: As for ``convert``.
        error: What it raised when it was called with tensors; see Note [Converters of names].
    """
    known = sources.outputs()
    uses: list[str] = []
    try:
        result = converter({name: _Name(name, uses) for name in known if isinstance(name, str)})
    except Exception:
        return None
    # what a function in C does with a string is not seen
    if not uses and not (isinstance(error, TypeError) and _WANTS_STRING.search(str(error))):
        return None
    if not isinstance(result, Mapping) or not all(
        isinstance(value, str) and value in known for value in result.values()
    ):
        return None
    return {name: known[value] for name, value in result.items()}


def converter_name(converter: object) -> str:
    """Return the name by which a message can speak of *converter*."""
    module, name = getattr(converter, "__module__", None), getattr(converter, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(converter)
