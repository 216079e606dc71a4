"""Pending tensors: meta tensors whose values are written down, and computed only if somebody needs them.

What identifies a pending tensor is its storage. Views, and Parameters made from it, share the storage, so
what is written to one of them is found by the others.
"""

import sys
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ._call import Call, tensors_in
from ._errors import PendingValueError
from ._random import Streams
from ._tensors import META, autocasts, become, storage_address


class Storage:
    """One pending storage: the calls that use it, and its value once these are made."""

    __slots__ = ("calls", "device", "dtype", "length", "value")

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length, self.dtype, self.device = length, dtype, device
        self.calls: tuple[int, ...] = ()  # their positions in the log
        self.value: torch.UntypedStorage | None = None


class Entry(NamedTuple):
    """One call that was put off. Meta tensors stand for what they show of a storage, storages for all."""

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

    def add(self, tensor: Tensor, device: torch.device) -> Storage:
        """Make the storage of the meta *tensor* pending, with memory on *device* that nothing has filled."""
        storage = Storage(tensor.numel(), tensor.dtype, device)
        self.storages[storage_address(tensor)] = storage
        return storage

    def hand_out(self, tensor: Tensor) -> Tensor:
        """The pending *tensor*, remembered because it needs its value if somebody keeps it."""
        self._handed_out.append(tensor)
        return tensor

    def alias(self, tensor: Tensor) -> Tensor:
        """What *tensor* shows now, whatever happens to it later."""
        self._aliases.append(tensor.data)
        return self._aliases[-1]

    def adopt(self, parameter: Tensor) -> None:
        """Make a real *parameter* pending, with the value that it has.

        Raises:
            PendingValueError: C++ code holds it.
        """
        device, value = parameter.device, parameter.untyped_storage()
        meta = torch.empty(value.nbytes() // parameter.itemsize, dtype=parameter.dtype, device=META)
        become(
            parameter, meta.as_strided(parameter.size(), parameter.stride(), parameter.storage_offset()).data
        )
        self.add(self.alias(parameter), device).value = value

    def write(self, call: Call, storages: list[Storage], results: Sequence[Tensor] = ()) -> None:
        """Put off a *call* that uses *storages*.

        Args:
            call: Tensors in it are aliases, storages stand for all of them.
            storages: Those of its arguments and its results.
            results: What it will give: meta tensors.
        """
        position = (len(self._entries),)
        for storage in storages:
            storage.calls += position
        self._entries.append(Entry(call, storages, tuple(map(self.alias, results))))

    # Computing

    def value(self, tensor: Tensor) -> Tensor:
        """A real tensor with the value of the pending *tensor*, in storage shared by all its aliases."""
        with torch.no_grad():
            self._compute(self.storages[storage_address(tensor)])
            return self._real(tensor)

    def materialize(self, tensor: Tensor) -> None:
        """Make the pending *tensor* a real one, in place."""
        self.become(tensor, self.value(tensor))

    def become(self, tensor: Tensor, real: Tensor) -> None:
        """Make the pending *tensor* show the data of the *real* one, which gets those on meta."""
        become(tensor, real)
        self._aliases.append(real)

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
        device = entry.storages[0].device
        # what autocast changes is not put off while it is on
        plainly = torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
        with torch._C.DisableTorchFunction(), plainly:
            given = self.streams.run(entry.call.replace(self._real, (Tensor, Storage)), device)
            for promised, result in zip(entry.results, tensors_in(given), strict=False):
                target = self._real(promised)
                if storage_address(target) != storage_address(result):  # else it is a view
                    target.copy_(result)

    def _real(self, part: Tensor | Storage) -> Tensor:
        """The value of a whole storage, or of what a meta tensor shows of one."""
        storage = part if isinstance(part, Storage) else self.storages[storage_address(part)]
        if storage.value is None:
            whole = torch.empty(storage.length, dtype=storage.dtype, device=storage.device)
            storage.value = whole.untyped_storage()
            self.made.add(storage.value)
        real = torch.empty(0, dtype=part.dtype, device=storage.device)
        if isinstance(part, Storage):
            return real.set_(storage.value)
        return real.set_(storage.value, part.storage_offset(), part.size(), part.stride())

    # At the end

    def survivors(self) -> list[Tensor]:
        """The pending tensors that somebody else than this log refers to."""
        counts = zip(self._handed_out, _reference_counts(self._handed_out), strict=True)
        return [tensor for tensor, count in counts if count > _UNSHARED and self.find(tensor) is not None]

    def own(self) -> list[Tensor]:
        """The meta tensors that this log keeps, whoever else does."""
        return [*self._aliases, *self._handed_out]


def _reference_counts(tensors: list[Tensor]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]


#: what that gives for a tensor that nobody else refers to, in this version of Python
_UNSHARED = _reference_counts([torch.empty(0)])[0]
