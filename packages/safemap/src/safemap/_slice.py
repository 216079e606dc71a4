"""A part of one tensor: only the bytes of that part are read.

Note [Runs]
    What follows the last dimension that is cut lies in one run.  The runs of neighbours along the cut
    dimension before it, with all that lies between, are one pitch apart: they are a block, and read by
    ``read_runs`` straight into their place.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from safemap._buffers import bytes_of
from safemap._cast import check_cast
from safemap._errors import MismatchError
from safemap._file import File
from safemap._layout import TensorInfo
from safemap._runs import read_runs, span

#: for each dimension (start, stop, step), step > 0
Cuts = list[tuple[int, int, int]]


class TensorSlice:
    """A tensor of a map that has not been read; index it with integers and slices to read a part.

    ``map.slice(name)[i:j]`` equals ``map[name][i:j]`` in memory of its own.  Integers, slices with positive
    steps and ``...`` may be combined, one for each dimension.
    """

    def __init__(self, name: str, info: TensorInfo, part: "Part") -> None:
        self._name = name
        self._info = info
        self._part = part

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
        ranged = self._part.read(cuts)
        part = ranged[
            tuple(0 if axis in squeezed else slice(None, None, cut[2]) for axis, cut in enumerate(cuts))
        ]
        # a step must not keep what was only read on the way
        return part if part.numel() == ranged.numel() else part.clone()

    def nbytes(self, key: Any) -> int:
        """Return how many bytes reading ``slice[key]`` takes from files."""
        cuts, _ = _normalize(key, tuple(self.shape), self._name)
        return self._part.nbytes(cuts)

    def read_into(self, key: Any, out: Tensor) -> Tensor:
        """Read ``slice[key]`` into *out*, without a temporary where the part is one run of the file.

        Args:
            key: Slices with step 1 and ``...``.
            out: Of the shape of the part; values are converted to its dtype.

        Returns:
            *out*.

        Raises:
            MismatchError: *out* has another shape, or a dtype that would drop the imaginary part.
        """
        cuts, squeezed = _normalize(key, tuple(self.shape), self._name)
        if squeezed or any(step != 1 for _, _, step in cuts):
            raise TypeError(f'tensor "{self._name}": only slices with step 1 can be read into memory given')
        extents = [stop - start for start, stop, _ in cuts]
        if list(out.shape) != extents:
            raise MismatchError(
                f'the part of tensor "{self._name}" has shape {extents}; '
                f"the destination has {list(out.shape)}"
            )
        check_cast(self._name, self.dtype, out.dtype)
        with torch.no_grad():
            self._part.read_into(cuts, out.detach())
        return out


class Part(Protocol):
    """Parts of one tensor, wherever it comes from."""

    def read(self, cuts: Cuts) -> Tensor:
        """Return a part in memory of its own."""

    def read_into(self, cuts: Cuts, out: Tensor) -> None:
        """Fill *out*, of the part's shape, converting to its dtype."""

    def nbytes(self, cuts: Cuts) -> int:
        """Return how many bytes of files that takes."""


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


def contiguous_run(shape: tuple[int, ...], cuts: Cuts) -> tuple[int, int] | None:
    """Return first element and length of a part that lies in one run, or None."""
    if not shape:
        return 0, 1
    extents = _extents(cuts)
    last = _last_cut(shape, extents)
    if any(extent != 1 for extent in extents[:last]):
        return None
    inner = math.prod(shape[last + 1 :])
    first, pitch = 0, inner
    for axis in range(last, -1, -1):
        first += cuts[axis][0] * pitch
        pitch *= shape[axis]
    return first, math.prod(extents)


def ranges_nbytes(dtype: torch.dtype, shape: tuple[int, ...], cuts: Cuts) -> int:
    """Return how many bytes ``read_ranges`` reads for a part."""
    numel = math.prod(_extents(cuts))
    if not numel or contiguous_run(shape, cuts) is not None:
        return numel * dtype.itemsize
    blocks = _blocks(dtype.itemsize, shape, cuts)
    return len(blocks.starts) * span(blocks.run, blocks.pitch, blocks.count)


def read_ranges(
    file: File, offset: int, dtype: torch.dtype, shape: tuple[int, ...], cuts: Cuts, out: Tensor
) -> None:
    """Read ``tensor[start:stop, ...]`` of a stored row-major tensor, no scalar; steps are ignored.

    *out* is contiguous, on the CPU, and has the dtype and shape of the part.
    """
    if not out.numel():
        return
    view = bytes_of(out)
    blocks = _blocks(dtype.itemsize, shape, cuts)
    nbytes = blocks.count * blocks.run
    for number, start in enumerate(blocks.starts):
        place = view[number * nbytes : (number + 1) * nbytes]
        read_runs(file, offset + start, blocks.run, blocks.pitch, place)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Where a part lies: from each of *starts*, *count* runs of *run* bytes, *pitch* bytes apart."""

    run: int
    pitch: int
    count: int
    starts: list[int]


def _blocks(itemsize: int, shape: tuple[int, ...], cuts: Cuts) -> _Blocks:
    """See Note [Runs]; the part is not empty."""
    extents = _extents(cuts)
    last = _last_cut(shape, extents)
    inner = math.prod(shape[last + 1 :]) * itemsize
    pitch = shape[last] * inner
    first = cuts[last][0] * inner
    if last == 0:
        return _Blocks(extents[0] * inner, pitch, 1, [first])
    before = _last_cut(shape[:last], extents[:last])
    between = math.prod(shape[before + 1 : last])
    starts = []
    for position in itertools.product(*(range(start, stop) for start, stop, _ in cuts[:before])):
        row = 0
        for index, extent in zip((*position, cuts[before][0]), shape, strict=False):
            row = row * extent + index
        starts.append(row * between * pitch + first)
    return _Blocks(extents[last] * inner, pitch, extents[before] * between, starts)


def _extents(cuts: Cuts) -> list[int]:
    return [stop - start for start, stop, _ in cuts]


def _last_cut(shape: tuple[int, ...], extents: list[int]) -> int:
    """Return the last dimension of which only a part is wanted; 0 if the whole is."""
    return max((axis for axis, extent in enumerate(extents) if extent != shape[axis]), default=0)
