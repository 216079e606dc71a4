"""Conversion while reading: each piece is converted in the cache, not in a second pass over memory.

Note [Tables for eight bits]
    torch converts eight-bit floating-point numbers one by one (0.25 GB/s).  A table with the result for every
    pair of bytes, made by torch's own conversion and therefore exact, NaN included, gives 3 GB/s.
"""

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from safemap._dtypes import TORCH_DTYPES
from safemap._errors import MismatchError
from safemap._file import File
from safemap._parallel import for_each

_PIECE_BYTES = 512 << 10  # of the stored dtype: with its result it fits a second-level cache
_WORTH_A_TABLE = 1 << 20  # elements; making a table takes as long as converting about as many

Convert = Callable[[Tensor, Tensor], object]  # (out, stored), flat and of the same length
_scratch = threading.local()


def check_cast(name: str, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Refuse conversions that torch lacks, and the one that silently drops half of the values."""
    if stored.is_complex and not wanted.is_complex:
        raise MismatchError(
            f'tensor "{name}" is {stored}; {wanted} would drop its imaginary part. Read it as stored.'
        )
    if TORCH_DTYPES.get("F4") in (stored, wanted) and stored != wanted:
        raise MismatchError(
            f'tensor "{name}" is {stored}, wanted is {wanted}; torch cannot convert two values in one '
            "element. Read it as stored."
        )


def read_cast(file: File, offset: int, stored: torch.dtype, out: Tensor, threads: int) -> None:
    """Fill *out*, contiguous and of one dimension, from stored elements of another dtype."""
    step = _PIECE_BYTES // stored.itemsize
    convert = _conversion(stored, out)

    def read_piece(start: int) -> None:
        piece = out[start : start + step]
        memory = _scratch_memory()[: len(piece) * stored.itemsize]
        file.read_into(memory, offset + start * stored.itemsize)
        with torch.no_grad():  # in each thread
            convert(piece, torch.frombuffer(memory, dtype=stored))

    for_each(read_piece, range(0, len(out), step), threads)


def _scratch_memory() -> memoryview:
    memory: memoryview | None = getattr(_scratch, "memory", None)
    if memory is None:
        memory = _scratch.memory = memoryview(bytearray(_PIECE_BYTES))
    return memory


def _conversion(stored: torch.dtype, out: Tensor) -> Convert:
    """Choose how to convert; see Note [Tables for eight bits]."""
    is_small_float = stored.is_floating_point and stored.itemsize == 1
    pairs = {2: torch.int32, 4: torch.int64}.get(out.dtype.itemsize)
    if not is_small_float or pairs is None or len(out) < _WORTH_A_TABLE or out.storage_offset() % 2:
        return Tensor.copy_
    table = _table(stored, out.dtype, pairs)

    def look_up(piece: Tensor, source: Tensor) -> None:
        even = len(piece) & ~1
        index = source[:even].view(torch.uint16).to(torch.int32)
        torch.index_select(table, 0, index, out=piece[:even].view(pairs))
        piece[even:].copy_(source[even:])

    return look_up


@functools.lru_cache(maxsize=8)
def _table(stored: torch.dtype, wanted: torch.dtype, pairs: torch.dtype) -> Tensor:
    """Return the converted value of every pair of bytes, indexed by the pair as a 16-bit number."""
    with no_dispatch():  # it is kept: a mode such as FakeTensorMode must not make a fake one of it
        every_pair = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16)
        return every_pair.view(torch.uint8).view(stored).to(wanted).view(pairs)
