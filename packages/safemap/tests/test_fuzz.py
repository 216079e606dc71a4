"""Random files: whatever the safetensors library accepts is accepted and read alike, the rest is refused."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safemap import DiskMap, FormatError, UnsupportedTensorError
from safemap._dtypes import BITS
from safemap.testing import safetensors_bytes
from safetensors import SafetensorError, safe_open

pytestmark = pytest.mark.slow
fuzz = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)

names = st.text(st.characters(codec="utf-8"), max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header whose tensors cover the data, and the number of data bytes."""
    header: dict[str, Any] = {}
    start = 0
    for name in draw(st.lists(names.filter(lambda n: n != "__metadata__"), unique=True, max_size=5)):
        code = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        bits = BITS[code]
        for extent in shape:
            bits *= extent
        if bits % 8:
            continue
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, start + bits // 8]}
        start += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
    if draw(st.booleans()):
        header = dict(draw(st.permutations(list(header.items()))))
    return header, start


@st.composite
def damaged_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A valid header of which one part was replaced by anything."""
    header, nbytes = draw(valid_headers())
    where = draw(st.sampled_from(["entry", "field", "metadata", "offset", "shape", "data"]))
    rows = [name for name in header if name != "__metadata__"]
    if where == "metadata" or not rows:
        header["__metadata__"] = draw(json_values)
        return header, nbytes
    name = draw(st.sampled_from(rows))
    if where == "entry":
        header[name] = draw(json_values)
    elif where == "field":
        header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(json_values)
    elif where == "offset":
        header[name]["data_offsets"][draw(st.integers(0, 1))] += draw(st.integers(-3, 3))
    elif where == "shape":
        header[name]["shape"] = draw(st.lists(st.integers(-1, 1 << 65), max_size=3))
    else:
        nbytes = max(0, nbytes + draw(st.integers(-3, 3)))
    return header, nbytes


def check(content: bytes, library_knows: Callable[[bytes], bool]) -> None:
    """Open *content* with both libraries and compare."""
    assume(library_knows(content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content)
        try:
            reference = safe_open(path, framework="pt")
        except SafetensorError:
            with pytest.raises(FormatError):
                DiskMap(path)
            return
        with reference, DiskMap(path) as disk_map:
            assert set(disk_map) == set(reference.keys())
            assert dict(disk_map.metadata) == (reference.metadata() or {})
            for name in disk_map:
                compare(disk_map, reference, name)


def compare(disk_map: DiskMap, reference: Any, name: str) -> None:
    try:
        expected = reference.get_tensor(name)
    except (SafetensorError, TypeError, RuntimeError, AttributeError):  # torch lacks the dtype
        with pytest.raises(UnsupportedTensorError):
            disk_map[name]
        return
    found = disk_map[name]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()


def data_of(nbytes: int) -> bytes:
    return bytes(i * 37 % 251 for i in range(nbytes))


@fuzz
@given(valid_headers(), st.booleans(), st.sampled_from([None, 1]))
def test_valid(
    library_knows, header: tuple[dict[str, Any], int], ascii_only: bool, indent: int | None
) -> None:
    fields, nbytes = header
    separators = (",", ":") if indent is None else None
    text = json.dumps(fields, ensure_ascii=ascii_only, indent=indent, separators=separators)
    check(safetensors_bytes(text, data_of(nbytes)), library_knows)


@fuzz
@given(damaged_headers())
def test_damaged(library_knows, header: tuple[dict[str, Any], int]) -> None:
    fields, nbytes = header
    check(safetensors_bytes(fields, data_of(nbytes)), library_knows)


@fuzz
@given(valid_headers(), st.data())
def test_damaged_bytes(library_knows, header: tuple[dict[str, Any], int], data: st.DataObject) -> None:
    """Bytes of the file are replaced, inserted, removed."""
    fields, nbytes = header
    content = bytearray(safetensors_bytes(fields, data_of(nbytes)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["replace", "insert", "remove"]))
        byte = data.draw(st.sampled_from(list(b'0123456789{}[],:"\\ue- \n\x00\xff')))
        if change == "replace":
            content[at] = byte
        elif change == "insert":
            content.insert(at, byte)
        elif len(content) > 1:
            del content[at]
    check(bytes(content), library_knows)


@fuzz
@given(st.binary(max_size=64))
def test_noise(library_knows, content: bytes) -> None:
    check(content, library_knows)
