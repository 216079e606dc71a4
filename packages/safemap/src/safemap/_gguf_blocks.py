"""Tensors of quantized blocks in GGUF files: a piece is read, decoded by the package ``gguf``, and put away.

Note [Pieces]
    Blocks do not depend on each other, so any run of them may be decoded alone.  The package decodes to
    float32 by numpy, with temporaries several times as large as the result; of a piece these stay small,
    where a whole tensor would take several times its memory.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safemap._errors import UnsupportedTensorError
from safemap._layout import Entry, Layout
from safemap._parallel import for_each
from safemap._slice import Cuts

_PIECE = 1 << 18  # elements

Decode = Callable[[bytearray], Any]  # blocks -> an array of float32 of the package numpy


def decode_into(name: str, entry: Entry, out: Tensor, threads: int) -> None:
    """Read quantized blocks and fill *out*, flat and on the CPU, converting from float32 to its dtype.

    Raises:
        UnsupportedTensorError: the package ``gguf`` is not installed, or cannot decode this type.
    """
    file, layout, offset = entry
    blocks = layout.blocks
    assert blocks is not None
    decode = _decoder(name, entry)
    at_once = max(1, _PIECE // blocks.elements)
    total = layout.nbytes // blocks.nbytes

    def read_piece(first: int) -> None:
        count = min(at_once, total - first)
        raw = bytearray(count * blocks.nbytes)
        file.read_into(memoryview(raw), offset + first * blocks.nbytes)
        values = torch.frombuffer(decode(raw), dtype=torch.float32)
        start = first * blocks.elements
        with torch.no_grad():  # in each thread
            out[start : start + len(values)].copy_(values)

    for_each(read_piece, range(0, total, at_once), threads)


def rows_of(entry: Entry, cuts: Cuts) -> Entry:
    """Return the rows of the first dimension that a part needs; all where that is the only one."""
    file, layout, offset = entry
    if len(layout.shape) < 2 or not layout.nbytes:
        return entry
    start, stop, _ = cuts[0]
    row = layout.nbytes // layout.shape[0]
    shape = (stop - start, *layout.shape[1:])
    rows = Layout(layout.code, None, shape, (stop - start) * row, blocks=layout.blocks)
    return file, rows, offset + start * row


def _decoder(name: str, entry: Entry) -> Decode:
    file, layout, _ = entry
    assert layout.blocks is not None
    what = f'tensor "{name}" of {file.path} has quantized blocks of type {layout.code}'
    try:
        gguf, numpy = importlib.import_module("gguf"), importlib.import_module("numpy")
    except ImportError as error:
        raise UnsupportedTensorError(
            f"{what}; decoding them takes the package gguf ({error}). Install it: pip install safemap[gguf]."
        ) from None
    try:
        kind = gguf.GGMLQuantizationType(layout.blocks.number)
        nothing = numpy.zeros((1, layout.blocks.nbytes), dtype=numpy.uint8)
        with numpy.errstate(all="ignore"):
            gguf.quants.dequantize(nothing, kind)
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedTensorError(
            f"{what}, which the installed package gguf cannot decode: {error}. Use a newer one, or convert "
            "the file to another type."
        ) from None

    def decode(raw: bytearray) -> Any:
        array = numpy.frombuffer(raw, dtype=numpy.uint8).reshape(1, -1)
        with numpy.errstate(all="ignore"):  # NaN and overflow are values of the file
            return gguf.quants.dequantize(array, kind)

    return decode
