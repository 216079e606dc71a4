"""The header of a safetensors file: from its bytes to the layout and position of every tensor.

A file is ``u64 length | JSON of that length | data``.  The JSON maps names to dtype, shape and ``[start,
stop)`` within the data, and ``__metadata__`` to strings.  The tensors cover the data without holes or
overlaps.
Nothing is allocated because a header says so: the length is checked against the size of the file first.

Note [Two readers]
    Every writer in use gives rows of one form, with data in the order of the rows.  Such a header is read by
    one regular expression; that the rows tile its text proves that nothing else is in it.  Whatever deviates
    in the least goes to ``_header_json``, which knows every rule and names the one that is broken.
"""

import gc
import itertools
import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from safemap._dtypes import BITS, TORCH_DTYPES, pack_shape
from safemap._errors import FormatError
from safemap._layout import Layout

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # Source: the limit of the safetensors library
_U64 = 1 << 64
# what lies between the literals is checked column by column: faster than character by character
_ROW = re.compile(r'"([^"]*)":\{"dtype":"([^\]]*)\],"data_offsets":\[([^\]]*)\]\}[,}]')
_ROW_PUNCTUATION = len('"":{"dtype":"],"data_offsets":[]},')
_SPEC = re.compile(r'([A-Z0-9_]+)","shape":\[((?:0|[1-9][0-9]*)(?:,(?:0|[1-9][0-9]*))*|)', re.ASCII)
_CONTROLS = bytes(range(32))
_METADATA = '{"__metadata__":'
_BLANKS = " \t\r\n"
_MOST_BLANKS = 4096  # at the end of a header of the usual form


@dataclass(slots=True)
class Header:
    """What a header says, in columns.  Offsets count from the start of the file."""

    names: list[str] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


class RuleError(ValueError):
    """A rule of the format is broken; the caller adds the file."""


def header_nbytes(prefix: bytes, file_nbytes: int, path: str) -> int:
    """Return the length of the JSON, given the first eight bytes of the file."""
    if len(prefix) < LENGTH_BYTES:
        raise FormatError(
            f"{path}: {file_nbytes:,} bytes are too few for a safetensors file, whose header takes 8 or "
            "more. The file is empty or truncated: write or download it again."
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: the header claims {length:,} bytes, the format allows {MAX_HEADER_BYTES:,}. "
            "Is this a safetensors file?"
        )
    if LENGTH_BYTES + length > file_nbytes:
        raise FormatError(
            f"{path}: the header claims {length:,} bytes, the whole file has {file_nbytes:,}. "
            "The file is truncated, or not a safetensors file."
        )
    return int(length)


def parse_header(raw: bytes, file_nbytes: int, path: str) -> Header:
    """Read and check a header.

    Args:
        raw: The JSON, without its length.
        file_nbytes: Size of the file.
        path: For messages.

    Raises:
        FormatError: naming the file, the tensor and the rule.
    """
    data_start = LENGTH_BYTES + len(raw)
    data_nbytes = file_nbytes - data_start
    try:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise RuleError(f"the header is not UTF-8: {error}") from None
        header = _parse_regular(text, data_start, data_nbytes)
        if header is None:
            from safemap._header_json import parse_irregular  # needed for few files

            header = parse_irregular(text, data_start, data_nbytes)
    except RuleError as error:
        raise FormatError(f"{path}: {error}") from None
    return header


def make_layout(code: str, shape: tuple[int, ...]) -> Layout:
    """Return the layout of a tensor, or raise ``RuleError``."""
    bits = BITS.get(code)
    if bits is None:
        raise RuleError(f"unknown dtype {code!r:.50}; known are {', '.join(BITS)}")
    numel = 1
    for extent in shape:  # step by step, as readers with 64-bit integers do: [2**40, 2**40, 0] overflows
        numel *= extent
        if numel >= _U64:
            break
    if numel * bits >= _U64:
        raise RuleError(f"shape {list(shape)} of {code} has more bits than 64-bit integers count")
    if numel * bits % 8:
        raise RuleError(f"shape {list(shape)} of {code} is not a whole number of bytes")
    held = pack_shape(code, shape) if max(shape, default=0) < 1 << 63 else None
    dtype = TORCH_DTYPES.get(code) if held is not None else None
    return Layout(code, dtype, shape if held is None else held, numel * bits // 8)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector: it would walk 100,000 new objects again and again, and find nothing.

    Measured on 50,000 tensors: parsing takes a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse_regular(text: str, data_start: int, data_nbytes: int) -> Header | None:
    """Read a header of the usual form; None means that it has another form, right or wrong."""
    tail = text[-_MOST_BLANKS:]
    end = (
        len(text) - len(tail) + len(tail.rstrip(_BLANKS))
    )  # the text itself is not copied: it may have 100 MB
    if not text.startswith("{") or not text.endswith("}}", 0, end):
        return None
    header = Header()
    position = 1
    if text.startswith(_METADATA):
        try:
            metadata, position = json.JSONDecoder(object_pairs_hook=_distinct).raw_decode(
                text, len(_METADATA)
            )
        except ValueError:
            return None
        if not _is_string_map(metadata) or "\\u" in text[:position] or text[position] != ",":
            return None
        header.metadata = metadata
        position += 1
    if text.find("\\", position) >= 0:
        return None  # else a quote always is one, and a name is what it seems
    if text.find("}}", position) != end - 2:
        return None  # else "}" instead of "," follows the last row and no other
    rows: list[tuple[str, str, str]] = _ROW.findall(text, position, end)
    if not rows:
        return None
    names, specs, spans = zip(*rows, strict=True)
    captured = sum(len("".join(column)) for column in (names, specs, spans))
    if captured + _ROW_PUNCTUATION * len(rows) != end - position:
        return None
    raw_names = "".join(names).encode()
    if len(raw_names.translate(None, _CONTROLS)) != len(raw_names):
        return None
    try:
        known = {spec: _spec_layout(spec) for spec in set(specs)}
    except ValueError:
        return None
    layouts = [known[spec] for spec in specs]
    stops = list(itertools.accumulate([layout.nbytes for layout in layouts]))
    starts = [0, *stops[:-1]]
    if stops[-1] != data_nbytes or [f"{a},{b}" for a, b in zip(starts, stops, strict=True)] != list(spans):
        return None
    if len(set(names)) != len(names) or "__metadata__" in names:
        return None
    header.names, header.layouts = list(names), layouts
    header.offsets = [data_start + start for start in starts]
    return header


def _spec_layout(spec: str) -> Layout:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise RuleError(f"not the usual form: {spec!r:.50}")
    code, extents = match.groups()
    shape = tuple(map(int, extents.split(","))) if extents else ()
    if max(shape, default=0) >= _U64:
        raise RuleError(f"an extent beyond 64 bits: {spec!r:.50}")
    return make_layout(code, shape)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key twice")
    return mapping


def _is_string_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
