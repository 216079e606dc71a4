"""The tensors of a checkpoint as views that a converter can start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safemap._contents import Stored, map_leaves
from safemap._dtypes import CODES
from safemap._header import collector_paused
from safemap._index import Index
from safemap._layout import Entry, Layout
from safemap._lazy_content import Content, Source
from safemap._lazy_evaluate import Place
from safemap._lazy_graph import View
from safemap._lazy_rules import row_major


@dataclass(frozen=True, slots=True)
class Original:
    """A tensor of the checkpoint that a converter passes on as it is.

    Attributes:
        number: Position among all tensors of the checkpoint.
    """

    number: int


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that a converter returned.

    Attributes:
        storage: Tensors with the same number are views of the same memory.
    """

    tensor: Original | View
    storage: int


class Sources:
    """All tensors of a checkpoint, numbered, and the ranges of bytes they lie in.

    The numbers depend on nothing but the files, so what was recorded with them holds for the same files
    opened again.  Tensors whose bytes overlap, which only pickled files have, share one source and so one
    storage: a write to one of them is seen in the others.

    Attributes:
        originals: The tensors, as the index has them.
        places: For each source, where its bytes are.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self.originals: list[Entry | Tensor] = [entry for _, entry in _tensors(index)]
        self.places: list[Place] = []
        self._names = [name for name, _ in _tensors(index)]
        self._home = [(0, 0)] * len(self.originals)  # for each tensor its source, and its offset there
        self._sizes: list[int] = []
        with collector_paused():
            self._assign()

    def _assign(self) -> None:
        files = {id(file): number for number, file in enumerate(self._index.files)}
        storages: dict[int, int] = {}
        stored: list[tuple[int, int, int, int]] = []
        for number, tensor in enumerate(self.originals):
            if isinstance(tensor, Tensor):
                if opaque_kind(tensor):
                    self._home[number] = self._add(torch.empty(0, dtype=torch.uint8, device="cpu"), 0), 0
                    continue
                storage = tensor.untyped_storage()
                if storage._cdata not in storages:
                    storages[storage._cdata] = self._add(_all_bytes(tensor), storage.nbytes())
                offset = int(tensor.storage_offset()) * tensor.dtype.itemsize
                self._home[number] = storages[storage._cdata], offset
            else:
                stored.append((files[id(tensor[0])], tensor[2], tensor[1].nbytes, number))
        stored.sort()
        last_file, last_start, last_stop = -1, 0, 0
        for file, start, nbytes, number in stored:
            entry = self.originals[number]
            assert not isinstance(entry, Tensor)
            itemsize = 1 if entry[1].dtype is None else entry[1].dtype.itemsize
            if file != last_file or start >= last_stop or (start - last_start) % itemsize:
                last_file, last_start, last_stop = file, start, start + nbytes
                self._add((entry[0], start), nbytes)
            last_stop = max(last_stop, start + nbytes)
            self._sizes[-1] = last_stop - last_start
            self._home[number] = len(self.places) - 1, start - last_start

    def _add(self, place: Place, nbytes: int) -> int:
        self.places.append(place)
        self._sizes.append(nbytes)
        return len(self.places) - 1

    def home(self, number: int) -> int:
        """Return in which source a tensor lies."""
        return self._home[number][0]

    def views(self) -> Iterator[View | None]:
        """Return every tensor as a view, in order; None for one that can only be passed on."""
        contents: dict[int, Content] = {}
        for number, (tensor, (source, offset)) in enumerate(zip(self.originals, self._home, strict=True)):
            if opaque_kind(tensor):
                yield None
                continue
            content = contents.get(source)
            if content is None:
                leaf = Source(source, self._names[number])
                content = contents[source] = Content.of(leaf, self._sizes[source])
            if isinstance(tensor, Tensor):
                yield View(content, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), offset)
            else:
                dtype, shape, stride = tensor[1].dtype, tensor[1].shape, tensor[1].stride
                assert dtype is not None
                yield View(content, dtype, shape, row_major(shape) if stride is None else stride, offset)

    def state_dict(self, numbered: list[Any]) -> dict[Any, Any]:
        """Return the structure of the checkpoint with ``numbered[i]`` in place of tensor i."""
        following = iter(numbered)

        def replace(leaf: Any) -> Any:
            return next(following) if isinstance(leaf, (Stored, Tensor)) else leaf

        state_dict = {name: next(following) for name in self._index.table}
        return {**state_dict, **map_leaves(self._index.others, replace)}

    def outputs(self) -> dict[Any, Any]:
        """Return the checkpoint as a converter returns it that changes nothing."""
        numbers = range(len(self.originals))
        return self.state_dict([Output(Original(number), self.home(number)) for number in numbers])

    def entry(self, view: View) -> Entry | None:
        """Return where in a file a view lies, or None if it is not simply a part of a file."""
        pieces = view.hull() if view.is_dense and view.device.type == "cpu" else []
        if len(pieces) != 1 or not isinstance(pieces[0].leaf, Source):
            return None
        place = self.places[pieces[0].leaf.index]
        if isinstance(place, Tensor):
            return None
        stride = None if view.is_row_major else view.stride
        code = CODES.get(view.dtype, str(view.dtype).removeprefix("torch."))
        layout = Layout(code, view.dtype, view.shape, view.nbytes, stride)
        return place[0], layout, place[1] + pieces[0].start


def opaque_kind(tensor: Entry | Tensor) -> str | None:
    """Return what a tensor is stored as that is no plain memory of the installed torch; None for others."""
    if not isinstance(tensor, Tensor):
        return tensor[1].code if tensor[1].dtype is None else None
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return str(tensor.dtype).removeprefix("torch.") if tensor.is_quantized else None


def _tensors(index: Index) -> Iterator[tuple[str, Entry | Tensor]]:
    """Return every tensor of a checkpoint with its name, those in containers included."""
    yield from index.table.items()
    found: list[tuple[str, Entry | Tensor]] = []
    for name, value in index.others.items():

        def note(leaf: Any, name: Any = name) -> Any:
            if isinstance(leaf, Stored):
                found.append((str(name), leaf.entry))
            elif isinstance(leaf, Tensor):
                found.append((str(name), leaf))
            return leaf

        map_leaves(value, note)
    yield from found


def _all_bytes(tensor: Tensor) -> Tensor:
    """Return the whole storage of a tensor as bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        storage,
        0,
        (storage.nbytes(),),
        (1,),
    )
