"""A part of one tensor: only the bytes of that part are read.

Note [Runs]
    What follows the last dimension that is cut lies in one run.  If the runs are long, each is read alone,
    straight into its place.  If they are short, or most of what they span, the rows that span them are read,
    a bounded piece
    at a time, and the part is copied out: a page is read from disk whole in any case.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safemap._buffers import MIB, bytes_of
from safemap._file import File
from safemap._layout import TensorInfo

_SHORT_RUN = 4096  # bytes of a page
_PIECE = 4 * MIB

#: for each dimension (start, stop, step), step > 0
Cuts = list[tuple[int, int, int]]


class TensorSlice:
    """A tensor of a map that has not been read; index it with integers and slices to read a part.

    ``map.slice(name)[i:j]`` equals ``map[name][i:j]`` in memory of its own.  Integers, slices with positive
    steps and ``...`` may be combined, one for each dimension.
    """

    def __init__(self, name: str, info: TensorInfo, read_ranges: Callable[[Cuts], Tensor]) -> None:
        self._name = name
        self._info = info
        self._read_ranges = read_ranges

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self._info.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in the file."""
        return self._info.dtype

    def __repr__(self) -> str:
        return f"<TensorSlice {self._name!r} {self.dtype} {list(self.shape)}>"

    def __getitem__(self, key: Any) -> Tensor:
        cuts, squeezed = _normalize(key, tuple(self.shape), self._name)
        ranged = self._read_ranges(cuts)
        part = ranged[
            tuple(0 if axis in squeezed else slice(None, None, cut[2]) for axis, cut in enumerate(cuts))
        ]
        # a step must not keep what was only read on the way
        return part if part.numel() == ranged.numel() else part.clone()


def _normalize(key: Any, shape: tuple[int, ...], name: str) -> tuple[Cuts, set[int]]:
    """Return the cut of every dimension, and the dimensions that an integer removes."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if sum(item is Ellipsis for item in keys) > 1:
        raise IndexError(f'tensor "{name}": an index can have only one "..."')
    given = sum(item is not Ellipsis for item in keys)
    if given > len(shape):
        raise IndexError(f'tensor "{name}" has {len(shape)} dimensions; the index has {given}')
    at = next((i for i, item in enumerate(keys) if item is Ellipsis), len(keys))
    keys[at : at + 1] = [slice(None)] * (len(shape) - given)
    cuts: Cuts = []
    squeezed = set()
    for axis, (item, extent) in enumerate(zip(keys, shape, strict=True)):
        if isinstance(item, slice):
            start, stop, step = item.indices(extent)
            if step < 1:
                raise ValueError(f'tensor "{name}": the step of a slice must be positive; got {item.step}')
            cuts.append((start, max(start, stop), step))
        elif isinstance(item, bool) or not hasattr(item, "__index__"):
            raise TypeError(
                f'tensor "{name}": only integers, slices and "..." can index it; got {item!r:.60}'
            )
        else:
            position = item.__index__()
            if not -extent <= position < extent:
                raise IndexError(
                    f'tensor "{name}": index {position} is out of range for dimension {axis} ({extent})'
                )
            position %= extent
            cuts.append((position, position + 1, 1))
            squeezed.add(axis)
    return cuts, squeezed


def read_ranges(file: File, offset: int, dtype: torch.dtype, shape: tuple[int, ...], cuts: Cuts) -> Tensor:
    """Read ``tensor[start:stop, ...]`` of a stored row-major tensor; steps are ignored."""
    extents = [stop - start for start, stop, _ in cuts]
    out = torch.empty(extents, dtype=dtype, device="cpu")
    if not out.numel():
        return out
    cut_axes = [axis for axis, extent in enumerate(extents) if extent != shape[axis]]
    if not cut_axes:
        file.read_into(bytes_of(out), offset)
        return out
    last = cut_axes[-1]
    inner = math.prod(shape[last + 1 :]) * dtype.itemsize
    run, row = extents[last] * inner, shape[last] * inner
    starts = [cuts[axis][0] for axis in range(last)]
    pitches = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(last)]
    first = offset + cuts[last][0] * inner
    if last > 0 and (run < _SHORT_RUN or 2 * run >= row):
        _read_rows(file, offset, dtype, shape, cuts, last, out)
        return out
    view = bytes_of(out)
    for number, position in enumerate(itertools.product(*(range(extent) for extent in extents[:last]))):
        skip = sum((start + i) * pitch for start, i, pitch in zip(starts, position, pitches, strict=True))
        file.read_into(view[number * run : (number + 1) * run], first + skip)
    return out


def _read_rows(
    file: File, offset: int, dtype: torch.dtype, shape: tuple[int, ...], cuts: Cuts, last: int, out: Tensor
) -> None:
    """Read whole rows of dimension ``last - 1`` in pieces, and copy the cut out of them."""
    axis = last - 1
    row = math.prod(shape[axis + 1 :])
    rows_at_once = max(1, _PIECE // (row * dtype.itemsize))
    start, stop, _ = cuts[axis]
    inside = slice(cuts[last][0], cuts[last][1])
    flat = out.view(-1, *out.shape[axis:])
    outer = itertools.product(*(range(begin, end) for begin, end, _ in cuts[:axis]))
    for block, position in enumerate(outer):
        base = 0
        for index, extent in zip(position, shape, strict=False):
            base = base * extent + index
        for begin in range(start, stop, rows_at_once):
            end = min(stop, begin + rows_at_once)
            piece = torch.empty((end - begin, *shape[last:]), dtype=dtype, device="cpu")
            file.read_into(bytes_of(piece), offset + (base * shape[axis] + begin) * row * dtype.itemsize)
            flat[block, begin - start : end - start] = piece[:, inside]
