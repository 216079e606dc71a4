"""Pending tensors: meta tensors whose values are written down, and computed only if somebody needs them.

What identifies a pending tensor is its storage. Views, and Parameters made from it, share the storage, so
what is written to one of them is found by the others.
"""

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._call import Call, tensors_in
from ._errors import PendingValueError
from ._random import Streams
from ._tensors import META, alias_of, become, storage_address

Factory = Callable[..., Tensor]
_use_count = torch._C._storage_Use_Count


class Storage:
    """One pending storage: how it begins, and the calls that use it."""

    __slots__ = ("calls", "device", "dtype", "factory", "length", "value")

    def __init__(self, factory: Factory, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.factory, self.length, self.dtype, self.device = factory, length, dtype, device
        self.calls: tuple[int, ...] = ()  # their positions in the log
        self.value: torch.UntypedStorage | None = None


class Entry(NamedTuple):
    """One call that was put off. Meta tensors in it stand for what they show of a storage."""

    call: Call
    storages: list[Storage]  # all that it reads, writes or makes
    results: tuple[Tensor, ...]  # what it was said to give, unless it only writes


class Log:
    """The pending tensors of one block, and the calls on them."""

    def __init__(self) -> None:
        self.streams = Streams()
        self.storages: dict[int, Storage] = {}  # by address
        self.made: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()  # real storages of the block
        self._entries: list[Entry] = []
        self._handed_out: list[Tensor] = []  # kept, so that no address is used twice
        self._aliases: list[Tensor] = []  # not handed out
        self._wrappers: list[torch.UntypedStorage] = []  # Python objects, which are users of storages too

    def find(self, tensor: Tensor) -> Storage | None:
        """The storage of a pending *tensor*; None for any other."""
        if not tensor.is_meta:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise PendingValueError(
                "a transform of torch.func (vmap, grad, ...) got a tensor made inside "
                "skip_model_initialization(), whose value it would not see.\n"
                "    Make its inputs before the block, or clone real tensors."
            )
        return self.storages.get(storage_address(tensor))

    # Writing down

    def add(self, tensor: Tensor, factory: Factory, length: int, device: torch.device) -> Tensor:
        """Make the meta *tensor* pending: *factory* makes its storage of *length* elements on *device*."""
        self.storages[storage_address(tensor)] = Storage(factory, length, tensor.dtype, device)
        self._handed_out.append(tensor)
        return tensor

    def hand_out(self, result: Tensor) -> Tensor:
        """*result*, without autograd's reference to its base, which could then not become real."""
        if result._is_view():
            result = alias_of(result)
        self._handed_out.append(result)
        return result

    def alias(self, tensor: Tensor) -> Tensor:
        """What *tensor* shows now, whatever happens to it later."""
        self._aliases.append(alias_of(tensor))
        return self._aliases[-1]

    def adopt(self, parameter: Tensor) -> None:
        """Make a real *parameter* pending, with the value that it has.

        Raises:
            PendingValueError: C++ code holds it.
        """
        device, value = parameter.device, parameter.untyped_storage()
        on_meta = torch.empty(value.nbytes() // parameter.itemsize, dtype=parameter.dtype, device=META)
        layout = parameter.size(), parameter.stride(), parameter.storage_offset()
        become(parameter, alias_of(on_meta.as_strided(*layout)))
        self._add_empty(self.alias(parameter), device).value = value

    def _add_empty(self, tensor: Tensor, device: torch.device) -> Storage:
        self._wrappers.append(tensor.untyped_storage())
        length = self._wrappers[-1].nbytes() // tensor.itemsize
        storage = Storage(torch.empty, length, tensor.dtype, device)
        self.storages[storage_address(tensor)] = storage
        return storage

    def write(
        self, storages: list[Storage], call: Call, results: Sequence[Tensor] = (), device: torch.device = META
    ) -> None:
        """Put off a *call* that uses *storages*.

        Args:
            storages: Those among its arguments.
            call: What it is called with does not change later: aliases, or storages for the whole of them.
            results: What it will give: meta tensors, of new storages or of those among its arguments.
            device: Of the new storages.
        """
        promised = tuple(map(self.alias, results)) if results else ()
        for result in promised:
            if self.find(result) is None:
                storages = [*storages, self._add_empty(result, device)]
        position = (len(self._entries),)
        for storage in storages:
            storage.calls += position
        self._entries.append(Entry(call, storages, promised))

    # Computing

    def value(self, tensor: Tensor) -> Tensor:
        """A real tensor with the value of the pending *tensor*, in storage shared by all its aliases."""
        with torch.no_grad():
            self._compute(self.storages[storage_address(tensor)])
            return self._real(tensor)

    def materialize(self, tensor: Tensor) -> None:
        """Make the pending *tensor* a real one, in place."""
        value = self.value(tensor)
        become(tensor, value)
        self._handed_out.append(value)  # which is the meta tensor now

    def _compute(self, storage: Storage) -> None:
        """Run, in order, every call connected with *storage*.

        Connected is more than needed: a call that only read the storage runs too. That keeps the rule simple
        enough to be right when tensors are overwritten after others were made from them.
        """
        connected: set[int] = set()
        to_visit = [storage]
        while to_visit:
            visited = to_visit.pop()
            for position in set(visited.calls) - connected:
                to_visit += self._entries[position].storages
            connected.update(visited.calls)
            visited.calls = ()
        for position in sorted(connected):
            self._run(self._entries[position])

    def _run(self, entry: Entry) -> None:
        call = entry.call.replace(self._real, (Tensor, Storage))
        with torch._C.DisableTorchFunction():
            made = tensors_in(self.streams.run(call, entry.storages[0].device))
            for promised, result in zip(entry.results, made, strict=False):
                storage = self.storages[storage_address(promised)]
                is_new = _use_count(storage_address(result)) == 1
                if storage.value is None and is_new and _layout(result) == _layout(promised):
                    self._set_value(storage, result)
                elif storage_address(target := self._real(promised)) != storage_address(result):
                    target.copy_(result)

    def _real(self, part: Tensor | Storage) -> Tensor:
        """The value of a whole storage, or of what a meta tensor shows of one."""
        storage = part if isinstance(part, Storage) else self.storages[storage_address(part)]
        device = storage.device
        if storage.value is None:
            begin = Call(storage.factory, ([storage.length],), {"dtype": storage.dtype, "device": device})
            self._set_value(storage, self.streams.run(begin, device))
        shown = (part.storage_offset(), part.size(), part.stride()) if isinstance(part, Tensor) else ()
        return torch.empty(0, dtype=part.dtype, device=device).set_(storage.value, *shown)  # type: ignore

    def _set_value(self, storage: Storage, made: Tensor) -> None:
        storage.value = made.untyped_storage()
        self.made.add(storage.value)

    # At the end

    def survivors(self) -> list[Tensor]:
        """The pending tensors that somebody else than this log refers to."""
        counts = zip(self._handed_out, _reference_counts(self._handed_out), strict=True)
        return [tensor for tensor, count in counts if count > _UNSHARED and self.find(tensor) is not None]

    def has_unknown_users(self, known: Iterable[Tensor]) -> bool:
        """Whether pending storages have users that are neither in this log nor *known*."""
        addresses = map(storage_address, itertools.chain(self._handed_out, self._aliases, known))
        users = sum(map(self.storages.__contains__, addresses)) + len(self._wrappers)
        return sum(map(_use_count, self.storages)) > users

    def own_ids(self) -> set[int]:
        return set(map(id, itertools.chain(self._handed_out, self._aliases)))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _reference_counts(tensors: list[Tensor]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]


#: what that gives for a tensor that nobody else refers to, in this version of Python
_UNSHARED = _reference_counts([torch.empty(0)])[0]
