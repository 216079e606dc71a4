"""What a converter did, as values: operations, and views of the storages that they read.

A recorded graph is immutable and knows neither files nor threads, so it can be shared and pickled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from safemap._lazy_content import Content, Piece, Result, Source

CPU = torch.device("cpu")

#: a strided view becomes a list of runs only if that is cheaper than copying its elements: few runs, or runs
#: that are long compared with the cost of a system call
_FEW_RUNS = 32
_MANY_RUNS = 1 << 16
_LONG_RUN = 16 << 10  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor: what torch calls dtype, size, stride and storage offset, over a content instead of memory.

    Attributes:
        offset: Position of the first element in the content, in bytes.
        device: Where the tensor is when it is evaluated.
    """

    content: Content
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    device: torch.device = CPU

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.dtype.itemsize

    @property
    def hull_nbytes(self) -> int:
        """Bytes from the first element in memory to the end of the last one."""
        return hull_numel(self.shape, self.stride) * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """True if the elements, in whatever order, fill their hull."""
        return self.nbytes == self.hull_nbytes and is_dense(self.shape, self.stride)

    @property
    def is_row_major(self) -> bool:
        """True if the elements lie in order, without gaps."""
        return is_row_major(self.shape, self.stride)

    def hull(self) -> list[Piece]:
        """Return the pieces from the first element in memory to the last one."""
        if not self.hull_nbytes:  # its offset may lie behind the end
            return []
        return self.content.part(self.offset, self.offset + self.hull_nbytes)

    def runs(self) -> list[tuple[int, int]] | None:
        """Return (position in the content, nbytes) of all elements in row-major order, or None if too many.

        Consecutive runs may touch.  A stride of zero repeats a run.
        """
        if not self.nbytes:
            return []
        run, outer = self.dtype.itemsize, len(self.shape)
        while outer and (self.shape[outer - 1] == 1 or self.stride[outer - 1] * self.dtype.itemsize == run):
            outer -= 1
            run *= self.shape[outer]
        count = math.prod(self.shape[:outer])
        if count > _MANY_RUNS or (count > _FEW_RUNS and run < _LONG_RUN):
            return None
        pitches = [stride * self.dtype.itemsize for stride in self.stride[:outer]]
        return [
            (self.offset + sum(map(int.__mul__, position, pitches)), run)
            for position in itertools.product(*map(range, self.shape[:outer]))
        ]

    def gathered(self) -> list[Piece] | None:
        """Return the pieces of all elements in row-major order, or None if there would be too many."""
        if self.is_row_major:
            return self.hull()
        runs = self.runs()
        if runs is None:
            return None
        return [piece for start, nbytes in runs for piece in self.content.part(start, start + nbytes)]

    def needed(self) -> list[Piece]:
        """Return the pieces that evaluating this view looks at."""
        if self.is_dense:
            return self.hull()
        gathered = self.gathered()
        return self.hull() if gathered is None else gathered

    def cut(self, cuts: Iterable[tuple[int, int, int]]) -> View:
        """Return ``view[start:stop, ...]``, a range for each dimension; steps are ignored."""
        starts, stops = (
            zip(*((start, stop) for start, stop, _ in cuts), strict=True) if self.shape else ((), ())
        )
        shift = sum(start * stride for start, stride in zip(starts, self.stride, strict=True))
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        offset = self.offset + (shift * self.dtype.itemsize if math.prod(shape) else 0)
        return View(self.content, self.dtype, shape, self.stride, offset, self.device)


@dataclass(frozen=True, slots=True)
class OutputInfo:
    """What an output of an operation was recorded to be; a replay that differs is an error."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that holds it."""
        return hull_numel(self.shape, self.stride) * self.dtype.itemsize


class Operation:
    """A call of an ATen operator; ``View`` objects stand for the tensors among its arguments.

    An operator that writes has one output: the whole storage of its first argument after the call, for which
    ``Whole`` stands.

    Attributes:
        outputs: None for outputs that are no tensors.
        depth: Length of the longest chain of operations that ends here.
    """

    __slots__ = ("args", "depth", "function", "kwargs", "outputs")

    def __init__(
        self,
        function: torch._ops.OpOverload[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[OutputInfo | None],
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.outputs = outputs
        before = {
            piece.leaf.operation.depth
            for argument in self.arguments()
            for piece in (argument.view if isinstance(argument, Whole) else argument).content.pieces
            if isinstance(piece.leaf, Result)
        }
        self.depth: int = 1 + max(before, default=0)

    def __repr__(self) -> str:
        return f"<Operation {self.function}>"

    def arguments(self) -> Iterator[View | Whole]:
        """Return the tensors among the arguments, each as often as it occurs."""
        for leaf in tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, (View, Whole)):
                yield leaf


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """Stands for an argument that is written to: the view, and all of its storage."""

    view: View

    def needed(self) -> list[Piece]:
        """Return the pieces of the storage."""
        return list(self.view.content.pieces)


def replace_leaves(tree: Any, kind: type | tuple[type, ...], change: Any) -> Any:
    """Return *tree* (tuples, lists, dicts) with *change* applied to the leaves of a *kind*."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, kind) else leaf, tree)


def source_ranges(needed: Iterable[View | Whole]) -> dict[Source, list[tuple[int, int]]]:
    """Return which bytes of which sources an evaluation reads, disjoint and sorted."""
    ranges: dict[Source, list[tuple[int, int]]] = {}
    seen: set[Operation] = set()
    pending = [view.needed() for view in needed]
    for pieces in pending:  # which grows meanwhile
        for piece in pieces:
            leaf = piece.leaf
            if isinstance(leaf, Source):
                ranges.setdefault(leaf, []).append((piece.start, piece.stop))
            elif isinstance(leaf, Result) and leaf.operation not in seen:
                seen.add(leaf.operation)
                pending += [argument.needed() for argument in leaf.operation.arguments()]
    return {source: _united(found) for source, found in ranges.items()}


def _united(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    united: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(stop, united[-1][1])
        else:
            united.append((start, stop))
    return united


def hull_numel(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the number of elements from the first to the last one in memory."""
    if 0 in shape:
        return 0
    return 1 + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))


def is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether the elements lie in order, without gaps."""
    expected = 1
    for extent, step in zip(reversed(shape), reversed(stride), strict=True):
        if extent == 0:
            return True
        if extent != 1 and step != expected:
            return False
        expected *= extent
    return True


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether the elements, in some order of the dimensions, lie without gaps or overlap."""
    axes = sorted((step, extent) for extent, step in zip(shape, stride, strict=True) if extent != 1)
    return is_row_major(tuple(e for _, e in reversed(axes)), tuple(s for s, _ in reversed(axes)))
