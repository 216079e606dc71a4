"""Conversion while reading: each piece is converted in the cache, not in a second pass over memory."""

import torch
from torch import Tensor

from safemap._errors import MismatchError
from safemap._file import File
from safemap._parallel import for_each

_PIECE_BYTES = 512 << 10  # of the stored dtype: with its result it fits a second-level cache


def check_cast(name: str, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Refuse the one conversion that silently drops half of the values."""
    if stored.is_complex and not wanted.is_complex:
        raise MismatchError(
            f'tensor "{name}" is {stored}; {wanted} would drop its imaginary part. Read it as stored.'
        )


def read_cast(file: File, offset: int, stored: torch.dtype, out: Tensor, threads: int) -> None:
    """Fill *out*, contiguous and of one dimension, from stored elements of another dtype."""
    step = _PIECE_BYTES // stored.itemsize

    def read_piece(start: int) -> None:
        piece = out[start : start + step]
        memory = bytearray(len(piece) * stored.itemsize)
        file.read_into(memoryview(memory), offset + start * stored.itemsize)
        piece.copy_(torch.frombuffer(memory, dtype=stored))

    with torch.no_grad():
        for_each(read_piece, range(0, len(out), step), threads)
