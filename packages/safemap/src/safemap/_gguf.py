"""The header of a GGUF file: positions of its tensors, and the dtypes of those that are not quantized.

A file is ``"GGUF" | u32 version | u64 tensors | u64 pairs | pairs | descriptions | padding | data``, all
little-endian.  A pair is a string, a type and a value; a description is a name, extents (the fastest first),
a type and an offset into the data.  Quantized blocks are no torch dtype: ``_gguf_blocks`` decodes them.

Source: docs/gguf.md of ggml-org/ggml, versions 2 and 3.  Sizes of blocks: the package gguf 0.19.
"""

import struct
from typing import Any

from safemap._dtypes import TORCH_DTYPES
from safemap._errors import FormatError
from safemap._file import File
from safemap._layout import Blocks, Entry, Layout
from safemap._positional import read_bytes

MAGIC = b"GGUF"
#: number -> (name, elements of a block, bytes of a block)
TYPES = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4)},
    **{27: ("I64", 1, 8), 28: ("F64", 1, 8), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20)},
    **{6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40)},
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)},
    **{14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74)},
    **{18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110)},
    **{22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54)},
    **{35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
}
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type of a value -> code of struct
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_MAX_EXTENTS = 4
_LEAST_PAIR, _LEAST_DESCRIPTION = 13, 28  # bytes
_READ_AT_ONCE = 1 << 20


def read_gguf(file: File) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors of a file, and its strings and numbers as metadata.

    Raises:
        FormatError: naming the file and the rule that is broken.
    """
    try:
        found = _read(file, _Stream(file))
    except (EOFError, UnicodeDecodeError) as error:
        raise FormatError(f"{file.path}: a GGUF file with a damaged header: {error}") from None
    file.check_unchanged(file.open())
    return found


class _Stream:
    """The header, read a piece at a time: its length is not written anywhere."""

    def __init__(self, file: File) -> None:
        self.position = len(MAGIC)  # in the file
        self._file = file
        self._piece, self._start = b"", 0

    def take(self, nbytes: int) -> bytes:
        if nbytes > self._file.nbytes - self.position:
            raise EOFError(f"{nbytes:,} bytes at byte {self.position:,} are beyond the end of the file")
        at = self.position - self._start
        if at + nbytes > len(self._piece):
            descriptor = self._file.open()
            self._piece = read_bytes(descriptor.fd, max(nbytes, _READ_AT_ONCE), self.position)
            self._start, at = self.position, 0
        self.position += nbytes
        taken = self._piece[at : at + nbytes]
        if len(taken) != nbytes:
            raise EOFError("it ends early")
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return a string or a number; None for an array, which is passed over."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY or depth > 8:
            raise EOFError(f"unknown type of value {kind} before byte {self.position:,}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        if count > self._file.nbytes - self.position:
            raise EOFError(f"an array of {count:,} values before byte {self.position:,} is too long")
        for _ in range(count):
            self.value(inner, depth + 1)
        return None


def _read(file: File, stream: _Stream) -> tuple[dict[str, Entry], dict[str, str]]:
    version = stream.number("I")
    if version not in (2, 3):
        raise FormatError(
            f"{file.path}: a GGUF file of version {version}, or of the other byte order; only versions 2 and "
            "3, little-endian, can be read. Convert it with the tool of the program that made it."
        )
    tensors, pairs = stream.number("Q"), stream.number("Q")
    if tensors * _LEAST_DESCRIPTION + pairs * _LEAST_PAIR > file.nbytes:
        raise EOFError(f"{tensors:,} tensors and {pairs:,} pairs are more than the file can hold")
    values: dict[str, Any] = {}
    alignment = 32
    for _ in range(pairs):
        key, kind = stream.string(), stream.number("I")
        values[key] = stream.value(kind)
        if key == "general.alignment":
            alignment = values[key] if kind == _UINT32 else 0
    if alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"{file.path}: general.alignment must be a power of two; it is {alignment}")
    described: dict[str, tuple[Layout, int]] = {}
    for _ in range(tensors):
        name = stream.string()
        if name in described:
            raise FormatError(f'{file.path}: describes tensor "{name}" twice')
        described[name] = _description(stream, name, file.path, alignment)
    start = -(-stream.position // alignment) * alignment
    _check_spans(file, described, start)
    table = {name: (file, layout, start + offset) for name, (layout, offset) in described.items()}
    return table, {key: str(value) for key, value in values.items() if value is not None}


def _description(stream: _Stream, name: str, path: str, alignment: int) -> tuple[Layout, int]:
    count = stream.number("I")
    if count > _MAX_EXTENTS:
        raise FormatError(f'{path}: tensor "{name}" has {count} extents; at most {_MAX_EXTENTS} are allowed')
    shape = tuple(reversed([stream.number("Q") for _ in range(count)]))
    number, offset = stream.number("I"), stream.number("Q")
    if number not in TYPES:
        raise FormatError(f'{path}: tensor "{name}" has the unknown type {number}')
    if offset % alignment:
        raise FormatError(f'{path}: tensor "{name}" at {offset:,} is not aligned to {alignment} bytes')
    code, block, block_nbytes = TYPES[number]
    if shape and shape[-1] % block:
        raise FormatError(
            f'{path}: tensor "{name}" has rows of {shape[-1]} elements; {code} has blocks of {block}'
        )
    numel = 1
    for extent in shape:
        numel *= extent
        if numel >= 1 << 63:
            raise FormatError(f'{path}: tensor "{name}" has shape {list(shape)}, more than 64 bits count')
    blocks = Blocks(number, block, block_nbytes) if block > 1 else None
    dtype = TORCH_DTYPES.get(code) if blocks is None else None
    return Layout(code, dtype, shape, numel // block * block_nbytes, blocks=blocks), offset


def _check_spans(file: File, described: dict[str, tuple[Layout, int]], start: int) -> None:
    position = 0
    for offset, nbytes, name in sorted((at, layout.nbytes, name) for name, (layout, at) in described.items()):
        if offset < position:
            raise FormatError(f'{file.path}: tensor "{name}" overlaps the one before it')
        position = offset + nbytes
        if start + position > file.nbytes:
            raise FormatError(
                f'{file.path}: tensor "{name}" ends at byte {start + position:,}, the file has '
                f"{file.nbytes:,}. It is truncated: download it again."
            )
