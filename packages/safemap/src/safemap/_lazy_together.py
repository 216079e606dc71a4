"""Several tensors of one state dict at once, which share memory where those of a real state dict would.

Two names share memory if their tensors are views of one storage and their bytes overlap: tied weights, and
views of each other.  Parts of one storage that do not overlap (the halves of a split) do not: then one of
them would keep the memory of all alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safemap._lazy_graph import View
from safemap._lazy_sources import Original, Output, Sources

ReadView = Callable[[str, View], Tensor]


@dataclass(frozen=True, slots=True)
class Member:
    """A name, the number of its storage, and its place there."""

    name: str
    storage: int
    view: View

    @property
    def start(self) -> int:
        """Position of its first byte in the storage."""
        return self.view.offset

    @property
    def stop(self) -> int:
        """Position behind its last byte in the storage."""
        return self.view.offset + self.view.hull_nbytes


def find_members(sources: Sources, outputs: Mapping[Any, Any], names: Iterable[str]) -> list[Member]:
    """Return those *names* whose values are tensors that the installed torch can hold."""
    originals = list(sources.views())
    members = []
    for name in dict.fromkeys(names):
        output = outputs.get(name)
        if isinstance(output, Output):
            tensor = output.tensor
            view = originals[tensor.number] if isinstance(tensor, Original) else tensor
            if view is not None:
                members.append(Member(name, output.storage, view))
    return members


def read_together(
    members: Iterable[Member], read: Callable[[str], Tensor], read_view: ReadView, *, casts: bool
) -> Mapping[str, Tensor]:
    """Read *members*, those that overlap from one buffer.

    Args:
        members: What to read.
        read: Reads one name into memory of its own.
        read_view: Reads a view, named for messages, into memory of its own.
        casts: Whether reading converts dtypes.  Then views of the same bytes in different dtypes cannot share
            memory, and are read one by one.
    """
    result: dict[str, Tensor] = {}
    for cluster in _clusters(members):
        first = cluster[0]
        layouts = {(m.start, m.view.dtype, m.view.shape, m.view.stride) for m in cluster}
        dtypes = {m.view.dtype for m in cluster}
        if len(layouts) == 1:
            tensor = read(first.name)
            result.update((m.name, tensor) for m in cluster)
        elif len(dtypes) > 1 and casts:
            result.update((m.name, read(m.name)) for m in cluster)
        else:
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
            stop = max(m.stop for m in cluster)
            numel = (stop - first.start) // dtype.itemsize
            flat = read_view(first.name, View(first.view.content, dtype, (numel,), (1,), first.start))
            for member in cluster:
                result[member.name] = _part(flat, member, first.start, dtype)
    return result


def _clusters(members: Iterable[Member]) -> Iterable[list[Member]]:
    """Group members whose bytes overlap."""
    cluster: list[Member] = []
    stop = 0
    for member in sorted(members, key=lambda m: (m.storage, m.start, m.stop)):
        if cluster and (member.storage != cluster[0].storage or member.start >= stop):
            yield cluster
            cluster = []
        stop = member.stop if not cluster else max(stop, member.stop)
        cluster.append(member)
    if cluster:
        yield cluster


def _part(flat: Tensor, member: Member, start: int, dtype: torch.dtype) -> Tensor:
    view = member.view
    position = (member.start - start) // dtype.itemsize
    part = flat[position : position + view.hull_nbytes // dtype.itemsize]
    if part.dtype == torch.uint8 and view.dtype != dtype:
        part = part.view(view.dtype)
    return part.as_strided(view.shape, view.stride, part.storage_offset())
