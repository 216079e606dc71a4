"""A tensor that a converter computes, as ``DiskMap`` deals with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safemap._cast import check_cast
from safemap._errors import MismatchError
from safemap._file import File
from safemap._layout import Entry, Layout, TensorInfo
from safemap._lazy_evaluate import Evaluation, Place
from safemap._lazy_graph import View, source_ranges
from safemap._read import Reader, cross, crosses_from_locked
from safemap._slice import Cuts


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """A view and where its sources are.

    Attributes:
        converter: Name of the converter, for messages.
    """

    view: View
    places: Sequence[Place]
    converter: str

    def info(self) -> TensorInfo:
        """Return dtype, shape and the bytes that must be read; file and offset only if they are unique."""
        ranges = self._ranges(self.view)
        paths = {file.path for file, _, _ in ranges}
        is_one = len(ranges) == 1 and ranges[0][2] == self.view.nbytes
        return TensorInfo(
            self.view.dtype,
            torch.Size(self.view.shape),
            self.nbytes(),
            paths.pop() if len(paths) == 1 else "",
            ranges[0][1] if is_one else None,
        )

    def nbytes(self) -> int:
        """Return how many bytes of files an evaluation reads."""
        return sum(nbytes for _, _, nbytes in self._ranges(self.view))

    def entries(self) -> list[Entry]:
        """Return what is read, as byte tensors."""
        return [
            (file, Layout("U8", torch.uint8, (nbytes,), nbytes), offset)
            for file, offset, nbytes in self._ranges(self.view)
        ]

    def read(self, name: str, reader: Reader) -> Tensor:
        """Evaluate into memory of its own, in the dtype and on the device of the reader."""
        return self._read(name, reader, self.view)

    def read_ranges(self, name: str, reader: Reader, cuts: Cuts) -> Tensor:
        """Return ``tensor[start:stop, ...]`` as ``read`` would, reading no more than it needs."""
        return self._read(name, reader, self.view.cut(cuts))

    def read_ranges_into(self, reader: Reader, cuts: Cuts, out: Tensor) -> None:
        """Fill *out*, of the shape of the part, converting to its dtype."""
        view = self.view.cut(cuts)
        self._evaluation(reader, view).result_into(view, out)

    def ranges_nbytes(self, cuts: Cuts) -> int:
        """Return how many bytes of files reading a part takes."""
        return sum(nbytes for _, _, nbytes in self._ranges(self.view.cut(cuts)))

    def read_into(self, name: str, reader: Reader, out: Tensor) -> None:
        """Evaluate into *out*, converting to its dtype."""
        if tuple(out.shape) != self.view.shape:
            raise MismatchError(
                f'tensor "{name}" has shape {list(self.view.shape)}; the destination has {list(out.shape)}'
            )
        check_cast(name, self.view.dtype, out.dtype)
        with torch.no_grad():
            self._evaluation(reader, self.view).result_into(self.view, out.detach())

    def _read(self, name: str, reader: Reader, view: View) -> Tensor:
        target = reader.target
        dtype = view.dtype if target.dtype is None else target.dtype
        check_cast(name, view.dtype, dtype)
        evaluation = self._evaluation(reader, view)
        with torch.no_grad():
            if target.device.type == "cpu":
                return evaluation.result(view, dtype, pin=target.pin_memory).to(target.device)
            crossing = dtype if dtype.itemsize < view.dtype.itemsize else view.dtype
            host = evaluation.result(view, crossing, pin=crosses_from_locked(target.device))
            return cross(host, target.device, dtype)

    def _evaluation(self, reader: Reader, view: View) -> Evaluation:
        return Evaluation(reader, self.places, [view], self.converter)

    def _ranges(self, view: View) -> list[tuple[File, int, int]]:
        """Return (file, position, nbytes) of everything that is read."""
        found = []
        for source, ranges in source_ranges([view]).items():
            place = self.places[source.index]
            if not isinstance(place, Tensor):
                found += [(place[0], place[1] + start, stop - start) for start, stop in ranges]
        return found
