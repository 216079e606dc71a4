"""What a block has written down about its pending tensors, and how their values are computed from it.

A pending tensor is an ordinary meta tensor. The address of its storage is its name here: views and Parameters
made from it share the storage, so whatever was written to one of them is found by the others.

Most of a log is never read. The fast path therefore only appends to ``births`` and ``writes``; they are
sorted by storage when a device or a value is asked for.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._errors import PendingValueError
from ._streams import Streams
from ._vocabulary import RANDOM, Function

META = torch.device("meta")
CPU = torch.device("cpu")
storage_address: Callable[[Tensor], int] = torch._C._storage_address  # type: ignore[attr-defined]
storage_use_count: Callable[[int], int] = torch._C._storage_Use_Count


class Geometry(NamedTuple):
    """A view of a pending storage, as it was when an operation was written down."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Geometry":
        size, stride = tuple(tensor.size()), tuple(tensor.stride())
        return cls(storage_address(tensor), tensor.dtype, size, stride, int(tensor.storage_offset()))

    @property
    def nbytes(self) -> int:
        """The bytes that a storage needs at least to hold this view."""
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        return 0 if 0 in self.size else (last + 1) * self.dtype.itemsize

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(slots=True)
class Operation:
    """One call that made or overwrote pending storages."""

    order: int
    function: Function
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: list[Geometry]  # storages that the call makes
    device: torch.device
    default_dtype: torch.dtype
    storages: set[int] = field(default_factory=set)  # every storage the call reads, writes or makes
    is_done: bool = False


def meta_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A meta tensor of the same layout (`torch.empty_like` would make torch import hundreds of modules)."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype or tensor.dtype, device=META)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def replace(values: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists and dicts with every tensor and Geometry changed."""
    if isinstance(values, (Tensor, Geometry)):
        return change(values)
    if type(values) in (tuple, list):
        return type(values)(replace(value, change) for value in values)
    if type(values) is dict:
        return {name: replace(value, change) for name, value in values.items()}
    return values


def become(tensor: Tensor, other: Tensor) -> None:
    """Exchange the data of *tensor*, which stays the same Python object, with that of *other*."""
    is_held = tensor._use_count() > 1  # type: ignore[attr-defined]
    if not is_held:
        other.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        try:
            torch._C._swap_tensor_impl(tensor, other)
        except RuntimeError:
            is_held = True
    if is_held:
        raise PendingValueError(
            f"a tensor of shape {tuple(tensor.shape)} made inside skip_model_initialization() is held by C++ "
            "code (TorchScript, torch.func, or an autograd graph), which would not see its new storage.\n"
            "    Register it as a buffer first, or make it before the block."
        )
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):  # autograd knew them by the old data
        if getattr(tensor, hooks, None):
            setattr(tensor, hooks, getattr(tensor, hooks))


class Log:
    """The pending tensors of one block."""

    def __init__(self, streams: Streams) -> None:
        self.births: list[tuple[Tensor, Function, torch.device]] = []
        self.writes: list[tuple[Function, Any, dict[str, Any], int] | Operation] = []
        self.values: dict[int, torch.UntypedStorage] = {}
        self.born: set[int] = set()  # addresses of the real storages that the block made
        # Results, views and replaced data: kept, like the births, so that no storage address is used twice.
        self.kept: list[tuple[Tensor]] = []
        self.streams = streams
        self._value_storages: set[int] = set()  # addresses of those in ``values``
        self._devices: dict[int, torch.device] = {}
        self._operations: dict[int, list[Operation]] = {}
        self._sorted_births = self._located_births = self._count = 0

    # Which tensors are pending, and where would they be?

    def device_of(self, tensor: Tensor) -> torch.device | None:
        """Where a plain construction would have put *tensor*; None if it is not pending."""
        if not tensor.is_meta or tensor.layout is not torch.strided:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise PendingValueError(
                "a transform of torch.func (vmap, grad, ...) got a tensor made inside "
                "skip_model_initialization(), whose value it would not see.\n"
                "    Make its inputs before the block, or clone real tensors."
            )
        for born, _, device in self.births[self._located_births :]:
            self._devices[storage_address(born)] = device
        self._located_births = len(self.births)
        return self._devices.get(storage_address(tensor))

    def has_value(self, tensor: Tensor) -> bool:
        return storage_address(tensor) in self.values

    def keep(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Remember a result or a view as pending."""
        self._devices[storage_address(tensor)] = device
        self.kept.append((tensor,))
        return tensor

    def adopt(self, parameter: Tensor) -> None:
        """Make a real *parameter* pending, with the value that it has.

        Raises:
            PendingValueError: C++ code holds it.
        """
        device, storage = parameter.device, parameter.untyped_storage()
        become(parameter, meta_like(parameter))
        self.values[storage_address(parameter)] = storage
        self.keep(parameter.detach(), device)

    def keep_replaced(self, tensor: Tensor) -> None:
        """Keep the data that a tensor had before it became real."""
        self.kept.append((tensor,))

    # Writing down

    @staticmethod
    def snapshot(arguments: Any, keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with each tensor replaced by its geometry, which the call may change."""
        return replace(tuple(arguments), Geometry.of), replace(dict(keywords), Geometry.of)

    def write(
        self,
        function: Function,
        arguments: Any,
        keywords: Any,
        outputs: Iterable[Tensor],
        device: torch.device,
    ) -> None:
        """Write down a call whose tensors are all pending; *outputs* have new storages on *device*."""
        self.writes.append(self._operation(function, arguments, keywords, outputs, device))

    def _operation(
        self,
        function: Function,
        arguments: Any,
        keywords: Any,
        outputs: Iterable[Tensor],
        device: torch.device,
    ) -> Operation:
        read: set[int] = set()

        def geometry(value: Tensor | Geometry) -> Geometry:
            found = value if isinstance(value, Geometry) else Geometry.of(value)
            read.add(found.storage)
            return found

        made = [Geometry.of(output) for output in outputs]
        arguments, keywords = replace(tuple(arguments), geometry), replace(dict(keywords), geometry)
        return Operation(
            order=0,
            function=function,
            arguments=arguments,
            keywords=keywords,
            outputs=made,
            device=device,
            default_dtype=torch.get_default_dtype(),
            storages=read | {output.storage for output in made},
        )

    def sort(self) -> None:
        """Turn what the fast path appended into operations, found by storage."""
        for born, factory, device in self.births[self._sorted_births :]:
            self._add(self._operation(factory, (), {}, [born], device))
        self._sorted_births = len(self.births)
        writes, self.writes = self.writes, []
        for write in writes:
            if isinstance(write, Operation):
                self._add(write)
                continue
            function, arguments, keywords, storage = write
            if storage not in self._devices:  # the user's own meta tensor
                continue
            target = tensors_in((arguments, keywords))[0]
            if (
                storage_address(target) != storage
            ):  # torch.utils.swap_tensors: it has become another one since
                arguments, keywords = self._as_born(storage, arguments, keywords)
            self._add(self._operation(function, arguments, keywords, [], self._devices[storage]))

    def _as_born(self, storage: int, arguments: Any, keywords: Any) -> Any:
        whole = self._operations[storage][0].outputs[0]
        return replace((arguments, keywords), lambda _: whole)

    def _add(self, operation: Operation) -> None:
        operation.order = self._count
        self._count += 1
        for storage in operation.storages:
            self._operations.setdefault(storage, []).append(operation)

    # Computing values

    def value(self, tensor: Tensor) -> Tensor:
        """A real tensor with the value of the pending *tensor*, in storage shared by all its aliases."""
        storage = storage_address(tensor)
        self._compute(storage)
        return Geometry.of(tensor).view(self.values[storage])

    def materialize(self, tensor: Tensor) -> None:
        """Make the pending *tensor* a real one, in place."""
        value = self.value(tensor)
        become(tensor, value)
        self.keep_replaced(value)

    def _compute(self, storage: int) -> None:
        """Run, in order, every operation connected with *storage*.

        Connected is more than needed: an operation that only read the storage runs too. That keeps the rule
        simple enough to be right when tensors are overwritten after others were made from them.
        """
        self.sort()
        connected: dict[int, Operation] = {}
        to_visit, visited = [storage], set()
        while to_visit:
            current = to_visit.pop()
            if current in visited:
                continue
            visited.add(current)
            for operation in self._operations.get(current, ()):
                if not operation.is_done:
                    connected[operation.order] = operation
                    to_visit.extend(operation.storages)
        for order in sorted(connected):
            self._run(connected[order])

    def _run(self, operation: Operation) -> None:
        operation.is_done = True
        view = lambda geometry: geometry.view(self.values[geometry.storage])  # noqa: E731
        arguments, keywords = replace(operation.arguments, view), replace(operation.keywords, view)
        if operation.outputs and not operation.arguments and not operation.keywords:  # a birth
            born = operation.outputs[0]
            arguments, keywords = (born.size,), {"dtype": born.dtype, "device": operation.device}
        function, default_dtype = operation.function, torch.get_default_dtype()
        torch.set_default_dtype(operation.default_dtype)
        try:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                if function.__name__ in RANDOM:
                    result = self.streams.call(function, arguments, keywords, operation.device)
                else:
                    result = function(*arguments, **keywords)
                for promised, made in zip(operation.outputs, tensors_in(result), strict=False):
                    self._place(promised, made)
        finally:
            torch.set_default_dtype(default_dtype)

    def _place(self, promised: Geometry, made: Tensor) -> None:
        """Let *made* be the value of a storage, in the layout that the meta tensor had."""
        if tuple(made.size()) != promised.size:
            raise PendingValueError(
                f"internal: an operation promised the shape {promised.size} and gave {tuple(made.size())}"
            )
        storage = made.untyped_storage()
        as_promised = (
            (made.dtype, made.stride(), made.storage_offset())
            == (promised.dtype, promised.stride, promised.offset)
            and storage.nbytes() >= promised.nbytes
            and storage._cdata not in self._value_storages
        )
        if not as_promised:
            empty = torch.empty(promised.nbytes, dtype=torch.uint8, device=made.device)
            storage = self.values.get(promised.storage, empty.untyped_storage())
            promised.view(storage).copy_(made)
        self.values[promised.storage] = storage
        self.born.add(storage._cdata)
        self._value_storages.add(storage._cdata)

    # At the end

    def survivors(self) -> list[Tensor]:
        """The pending tensors that somebody else than this log refers to."""
        return _referenced_elsewhere(self.births) + _referenced_elsewhere(self.kept)

    def storages_with_unknown_users(self, known: Iterable[Tensor]) -> set[int]:
        """The pending storages that are used by a tensor which is neither in this log nor among *known*."""
        uses = Counter(storage_address(entry[0]) for entries in (self.births, self.kept) for entry in entries)
        uses.update(storage_address(tensor) for tensor in known)
        return {s for s, count in uses.items() if s in self._devices and storage_use_count(s) > count}


def _reference_counts(entries: Any) -> list[int]:
    return [sys.getrefcount(entry[0]) for entry in entries]


# what the expression above gives for a tensor that nobody else refers to, in this version of Python
_UNSHARED = _reference_counts([(torch.empty(0),)])[0]


def _referenced_elsewhere(entries: Any) -> list[Tensor]:
    counts = _reference_counts(entries)
    return [entry[0] for entry, count in zip(entries, counts, strict=True) if count > _UNSHARED]
