"""The bytes of a storage that has not been read: a list of pieces of things that can be.

Note [Ropes]
    A storage is described by where its bytes come from, not by the operations that made it: ``Content`` is a
    sequence of pieces, each a range of one ``Leaf``.  Taking a part, concatenating, and writing a known range
    into a known place only rearrange pieces, so after any number of them a tensor is still a list of ranges
    of files, which are read straight into place.  Everything else becomes one leaf, ``Result``: a recorded
    operation that is run again when its bytes are wanted.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safemap._lazy_graph import Operation


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Bytes of the checkpoint.

    Attributes:
        index: Position in the list of sources of the map.
        name: A tensor that lies there, for messages.
    """

    index: int
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """One element, repeated without end."""

    element: Tensor  # (1,)

    def __reduce__(self) -> tuple[object, ...]:
        # as bytes: torch cannot unpickle tensors of the newer dtypes
        return _fill_of, (self.element.view(torch.uint8), self.element.dtype)


def _fill_of(element: Tensor, dtype: torch.dtype) -> Fill:
    return Fill(element.view(dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Bytes in memory that nobody else refers to."""

    bytes: Tensor  # (nbytes,) uint8


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The memory of one output of an operation."""

    operation: Operation
    output: int


Leaf = Source | Fill | Held | Result


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The bytes from *start* to *stop* of a leaf."""

    leaf: Leaf
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


class Content:
    """Pieces in order; immutable."""

    __slots__ = ("_ends", "nbytes", "pieces")

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = tuple(_merged(pieces))
        self._ends = list(itertools.accumulate(piece.nbytes for piece in self.pieces))
        self.nbytes = self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[object, ...]:
        return Content, (self.pieces,)

    def __repr__(self) -> str:
        return f"<Content {self.nbytes:,} bytes in {len(self.pieces):,} pieces>"

    @classmethod
    def of(cls, leaf: Leaf, nbytes: int) -> Content:
        """Return the first *nbytes* bytes of *leaf*."""
        return cls([Piece(leaf, 0, nbytes)])

    def part(self, start: int, stop: int) -> list[Piece]:
        """Return the pieces between two positions in bytes.

        Raises:
            IndexError: they are not within the content.
        """
        if not 0 <= start <= stop <= self.nbytes:
            raise IndexError(f"bytes {start:,} to {stop:,} of a storage with {self.nbytes:,} bytes")
        found = []
        position = bisect_right(self._ends, start)
        while start < stop:
            piece = self.pieces[position]
            begin = self._ends[position] - piece.nbytes
            end = min(stop, self._ends[position])
            found.append(Piece(piece.leaf, piece.start + start - begin, piece.start + end - begin))
            start = end
            position += 1
        return found

    def replaced(self, runs: Iterable[tuple[int, int]], pieces: Iterable[Piece]) -> Content:
        """Return the content with the bytes of *pieces* written, in order, into *runs* of (start, nbytes)."""
        news = Content(pieces)
        written: list[tuple[int, int, int]] = []
        taken = 0
        for start, nbytes in runs:
            written.append((start, nbytes, taken))
            taken += nbytes
        written.sort()
        result: list[Piece] = []
        position = 0
        for start, nbytes, at in written:
            result += self.part(position, start)
            result += news.part(at, at + nbytes)
            position = start + nbytes
        return Content([*result, *self.part(position, self.nbytes)])


def _merged(pieces: Iterable[Piece]) -> Iterable[Piece]:
    """Drop empty pieces and join neighbours."""
    last: Piece | None = None
    for piece in pieces:
        if not piece.nbytes:
            continue
        if last is not None and last.leaf is piece.leaf and last.stop == piece.start:
            last = Piece(last.leaf, last.start, piece.stop)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
