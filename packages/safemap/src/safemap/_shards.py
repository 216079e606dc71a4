"""Which part of a tensor a rank holds, from mesh and placements; arithmetic only.

Note [Ranges of a dimension]
    Placements are applied from left to right; each ``Shard(d)`` keeps one chunk of what the ones before it
    left of dimension *d*.  ``_StridedShard(d, split_factor=n)``, which FSDP2 makes of a parameter that tensor
    parallelism has sharded along the same dimension, first cuts that into *n* pieces and keeps one chunk of
    each: the part is then several ranges.  Chunks are those of ``torch.chunk``: all of one size, rounded up,
    but for the last ones, which may be shorter or empty.
    Source: ``torch/distributed/tensor/placement_types.py``.
"""

import itertools
from collections.abc import Iterator, Sequence

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from safemap._errors import MismatchError

#: [start, stop) along one dimension
Range = tuple[int, int]


def local_ranges(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> list[list[Range]]:
    """Return, for each dimension, the ranges that make up the part of the rank at *coordinate*.

    Raises:
        MismatchError: a placement that is no kind of shard or replica, such as ``Partial``.
    """
    ranges = [[(0, extent)] for extent in shape]
    for size, position, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, Replicate):
            continue
        dim = _sharded_dim(placement)
        pieces = [ranges[dim]]
        split_factor = getattr(placement, "split_factor", None)  # of _StridedShard only
        if split_factor is not None:
            length = _length(ranges[dim])
            pieces = [_between(ranges[dim], *_chunk(length, split_factor, i)) for i in range(split_factor)]
        ranges[dim] = _joined(
            part for piece in pieces for part in _between(piece, *_chunk(_length(piece), size, position))
        )
    return ranges


def boxes(ranges: Sequence[Sequence[Range]]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Give (where in the whole tensor, where in the local part) for everything that lies together."""
    placed = []
    for of_dim in ranges:
        stops = list(itertools.accumulate(stop - start for start, stop in of_dim))
        placed.append(
            [
                (slice(start, stop), slice(end - (stop - start), end))
                for (start, stop), end in zip(of_dim, stops, strict=True)
            ]
        )
    for box in itertools.product(*placed):
        yield tuple(whole for whole, _ in box), tuple(local for _, local in box)


def local_shape(ranges: Sequence[Sequence[Range]]) -> tuple[int, ...]:
    """Return the shape of the local part."""
    return tuple(_length(of_dim) for of_dim in ranges)


def _sharded_dim(placement: Placement) -> int:
    dim = getattr(placement, "dim", None)
    if type(placement).__name__ not in ("Shard", "_StridedShard") or not isinstance(dim, int):
        raise MismatchError(
            f"a parameter is placed as {placement}, which no bytes of a file can fill; "
            "expected Shard or Replicate for every dimension of the mesh"
        )
    return dim


def _chunk(length: int, chunks: int, number: int) -> Range:
    step = -(-length // chunks)
    return min(length, step * number), min(length, step * (number + 1))


def _length(ranges: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _between(ranges: Sequence[Range], first: int, last: int) -> list[Range]:
    """Return the positions *first* to *last* of what *ranges* enumerate."""
    found = []
    position = 0
    for start, stop in ranges:
        begin, end = max(first, position), min(last, position + stop - start)
        if begin < end:
            found.append((start + begin - position, start + end - position))
        position += stop - start
    return found


def _joined(ranges: Iterator[Range]) -> list[Range]:
    """Join ranges that follow each other."""
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
