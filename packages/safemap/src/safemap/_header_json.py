"""The reader for headers of any form: every rule of the format, and of the JSON that other readers accept.

Python's ``json`` is more lenient than the strict parsers that other readers use, so what it lets pass is
checked
here: NaN, numbers out of range, half surrogates, deep nesting, keys given twice.
"""

import json
import math
from typing import NoReturn

from safemap._header import Header, RuleError, make_layout
from safemap._layout import Layout

_MAX_DEPTH = 127  # Source: the recursion limit of serde_json, which the safetensors library uses
_FIELDS = ("dtype", "shape", "data_offsets")
_U64 = 1 << 64


class _Object(dict[str, object]):
    """A JSON object that remembers which of its keys came more than once."""

    repeated: frozenset[str] = frozenset()
    differing: frozenset[str] = frozenset()


def parse_irregular(text: str, data_start: int, data_nbytes: int) -> Header:
    """Read a header, or raise ``RuleError`` with the first rule that it breaks."""
    document = _load_json(text)
    if not isinstance(document, _Object):
        raise RuleError(f"the header must be a JSON object; it is {_describe(document)}")
    _check_repeats(document)
    header = Header(metadata=_metadata(document.pop("__metadata__", None)))
    layouts: dict[tuple[str, tuple[int, ...]], Layout] = {}
    spans: list[tuple[int, int, str]] = []
    for name, value in document.items():
        try:
            code, shape, start, stop = _fields(value)
            layout = layouts.get((code, shape)) or layouts.setdefault((code, shape), make_layout(code, shape))
        except RuleError as error:
            raise RuleError(f'tensor "{name}": {error}') from None
        spans.append((start, stop, name))
        header.names.append(name)
        header.layouts.append(layout)
        header.offsets.append(data_start + start)
    _check_cover(spans, dict(zip(header.names, header.layouts, strict=True)), data_nbytes)
    return header


def _load_json(text: str) -> object:
    try:
        document = json.loads(
            text,
            object_pairs_hook=_make_object,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except RecursionError:
        raise RuleError(f"the header is nested more than {_MAX_DEPTH} levels deep") from None
    except json.JSONDecodeError as error:
        raise RuleError(f"the header is not valid JSON: {error}") from None
    if _depth(document) > _MAX_DEPTH:
        raise RuleError(f"the header is nested more than {_MAX_DEPTH} levels deep")
    if "\\u" in text:
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RuleError(
                f"the header is not valid JSON: half of a surrogate pair ({error.reason})"
            ) from None
    return document


def _make_object(pairs: list[tuple[str, object]]) -> _Object:
    result = _Object(pairs)
    if len(result) != len(pairs):
        seen: dict[str, object] = {}
        repeated, differing = set(), set()
        for key, value in pairs:
            if key in seen:
                repeated.add(key)
                if seen[key] != value:
                    differing.add(key)
            seen[key] = value
        result.repeated, result.differing = frozenset(repeated), frozenset(differing)
    return result


def _refuse_constant(constant: str) -> NoReturn:
    raise RuleError(f"the header is not valid JSON: {constant} is no JSON number")


def _parse_int(digits: str) -> int | float:
    # "-0" and integers beyond 64 bits are floating-point numbers to other readers, so they are no extents
    if len(digits) > 20 or digits == "-0":
        return _parse_float(digits)
    value = int(digits)
    return value if -(1 << 63) <= value < _U64 else float(value)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RuleError(f"the header is not valid JSON: the number {digits:.20} is out of range")
    return value


def _depth(value: object) -> int:
    deepest = 0
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, (dict, list)):
            deepest = max(deepest, depth)
            stack.extend((inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item))
    return deepest


def _check_repeats(document: _Object) -> None:
    if "__metadata__" in document.repeated:
        raise RuleError('the header has the key "__metadata__" twice')
    if document.differing:
        raise RuleError(f'the header describes tensor "{min(document.differing)}" twice, differently')


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, _Object):
        raise RuleError(f'"__metadata__" must map strings to strings; it is {_describe(value)}')
    if value.differing:
        raise RuleError(f'"__metadata__" has the key "{min(value.differing)}" twice, differently')
    metadata = {}
    for key, item in value.items():
        if not isinstance(item, str):
            raise RuleError(f'"__metadata__" must map strings to strings; "{key}" is {_describe(item)}')
        metadata[key] = item
    return metadata


def _fields(value: object) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, start and stop of one entry."""
    if isinstance(value, _Object):
        for key in _FIELDS:
            if key not in value:
                raise RuleError(f'"{key}" is missing')
            if key in value.repeated:
                raise RuleError(f'"{key}" is given twice')
        code, shape, span = (value[key] for key in _FIELDS)
    elif isinstance(value, list) and len(value) == len(_FIELDS):  # the safetensors library reads this too
        code, shape, span = value
    else:
        raise RuleError(f"expected an object with {', '.join(_FIELDS)}; found {_describe(value)}")
    if isinstance(code, _Object) and len(code) == 1 and list(code.values()) == [None]:  # and {"F32": null}
        code = next(iter(code))
    if not isinstance(code, str):
        raise RuleError(f'"dtype" must be a string; it is {_describe(code)}')
    if not isinstance(shape, list) or not all(map(_is_extent, shape)):
        raise RuleError(f'"shape" must be a list of integers that are not negative; it is {_describe(shape)}')
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_extent, span)):
        raise RuleError(f'"data_offsets" must be two integers that are not negative; it is {_describe(span)}')
    return code, tuple(shape), span[0], span[1]


def _is_extent(value: object) -> bool:
    return type(value) is int and value >= 0  # bool is no extent


def _check_cover(spans: list[tuple[int, int, str]], layouts: dict[str, Layout], data_nbytes: int) -> None:
    """Check that the tensors cover the data once, in any order."""
    position, before = 0, "the header"
    for start, stop, name in sorted(spans):
        if start != position:
            what = "overlaps" if start < position else "leaves a hole after"
            raise RuleError(
                f'tensor "{name}" {what} {before}: it starts at byte {start:,} of the data, not at '
                f"{position:,}"
            )
        layout = layouts[name]
        if stop - start != layout.nbytes:
            raise RuleError(
                f'tensor "{name}": data_offsets [{start}, {stop}] are {stop - start:,} bytes, but '
                f"{layout.code} of "
                f"shape {list(layout.shape)} takes {layout.nbytes:,}"
            )
        position, before = stop, f'"{name}"'
    if position != data_nbytes:
        kind = "the file is truncated" if data_nbytes < position else "bytes follow that no tensor covers"
        raise RuleError(f"the tensors take {position:,} bytes of data, the file has {data_nbytes:,}: {kind}")


def _describe(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
