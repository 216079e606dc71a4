"""Headers: every rule, its message, and what the safetensors library says of the same file."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safemap import DiskMap, FormatError
from safemap.testing import safetensors_bytes
from safetensors import SafetensorError, safe_open


def entry(dtype: str = "U8", shape: object = (1,), span: object = (0, 1)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


GOOD = json.dumps(entry(), separators=(",", ":"))


def row(text: str) -> str:
    return f'{{"a":{text}}}'


def with_field(value: str) -> str:
    return row(f'{{"dtype":"U8","extra":{value},"shape":[1],"data_offsets":[0,1]}}')


#: name -> (header, data, part of the message)
MALFORMED: dict[str, tuple[object, bytes, str]] = {
    "empty header": (b"", b"", "the header is not valid JSON"),
    "not JSON": (b"hello", b"", "the header is not valid JSON"),
    "two documents": (b"{} {}", b"", "the header is not valid JSON: Extra data"),
    "trailing zero byte": (b"{}\x00", b"", "the header is not valid JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "the header is not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "the header is not UTF-8"),
    "null": (b"null", b"", "the header must be a JSON object; it is null"),
    "a list": (b"[]", b"", "the header must be a JSON object; it is []"),
    "control character": (b'{"\n":' + GOOD.encode() + b"}", b"x", "the header is not valid JSON"),
    "half a surrogate pair": (row(GOOD).replace('"a"', '"\\ud800"'), b"x", "half of a surrogate pair"),
    "NaN": (with_field("NaN"), b"x", "NaN is no JSON number"),
    "Infinity": (with_field("-Infinity"), b"x", "-Infinity is no JSON number"),
    "number out of range": (with_field("1e999"), b"x", "the number 1e999 is out of range"),
    "number of 5,000 digits": (with_field("1" * 5000), b"x", "is out of range"),
    "126 brackets deep": (with_field("[" * 126 + "]" * 126), b"x", "nested more than 127 levels deep"),
    "100,000 brackets deep": (b"[" * 100_000, b"", "nested more than 127 levels deep"),
    "metadata is a list": ({"__metadata__": [["a", "b"]]}, b"", '"__metadata__" must map strings to strings'),
    "metadata value is a number": ({"__metadata__": {"a": 1}}, b"", '"a" is 1'),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', b"", 'the key "__metadata__" twice'),
    "entry is a number": (row("5"), b"", 'tensor "a": expected an object with'),
    "entry is a long list": (row('["U8",[1],[0,1],5]'), b"x", 'tensor "a": expected an object with'),
    "no dtype": (row('{"shape":[1],"data_offsets":[0,1]}'), b"x", 'tensor "a": "dtype" is missing'),
    "no shape": (row('{"dtype":"U8","data_offsets":[0,1]}'), b"x", 'tensor "a": "shape" is missing'),
    "no offsets": (row('{"dtype":"U8","shape":[1]}'), b"x", 'tensor "a": "data_offsets" is missing'),
    "dtype twice": (
        row('{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}'), b"x", '"dtype" is given twice',
    ),
    "dtype unknown": ({"a": entry("F31")}, b"x", "unknown dtype 'F31'; known are BOOL, U8"),
    "dtype in lower case": ({"a": entry("u8")}, b"x", "tensor \"a\": unknown dtype 'u8'"),
    "dtype is a number": (row(GOOD).replace('"U8"', "5"), b"x", '"dtype" must be a string; it is 5'),
    "shape is null": ({"a": entry(shape=None)}, b"x", 'tensor "a": "shape" must be a list of integers'),
    "shape negative": ({"a": entry(shape=[-1])}, b"x", 'tensor "a": "shape" must be a list of integers'),
    "shape minus zero": (row(GOOD).replace("[1]", "[-0]"), b"", '"shape" must be a list of integers'),
    "shape a float": ({"a": entry(shape=[1.0])}, b"x", "it is [1.0]"),
    "shape with exponent": (row(GOOD).replace("[1]", "[1e0]"), b"x", "it is [1.0]"),
    "shape true": ({"a": entry(shape=[True])}, b"x", "it is [true]"),
    "shape beyond 64 bits": ({"a": entry(shape=[0, 2**64], span=(0, 0))}, b"", '"shape" must be a list'),
    "size beyond 64 bits": ({"a": entry(shape=[2**40, 2**40, 0], span=(0, 0))}, b"", "64-bit integers"),
    "bits beyond 64 bits": ({"a": entry("F64", [2**62], (0, 0))}, b"", "64-bit integers"),
    "three offsets": ({"a": entry(span=(0, 1, 2))}, b"x", '"data_offsets" must be two integers'),
    "negative offset": ({"a": entry(span=(-1, 0))}, b"x", '"data_offsets" must be two integers'),
    "offsets as an object": ({"a": entry(span={"0": 0})}, b"x", '"data_offsets" must be two integers'),
    "offsets reversed": ({"a": entry(shape=[0], span=(2, 1))}, b"xx", "leaves a hole after the header"),
    "offsets and shape disagree": ({"a": entry(shape=[2])}, b"x", "are 1 bytes, but U8 of shape [2] takes 2"),
    "half a byte": ({"a": entry("F4", [3], (0, 1))}, b"x", "is not a whole number of bytes"),
    "hole": ({"a": entry(), "b": entry(span=(2, 3))}, b"xxx", 'tensor "b" leaves a hole after "a"'),
    "hole at the start": ({"a": entry(span=(1, 2))}, b"xx", 'tensor "a" leaves a hole after the header'),
    "overlap": ({"a": entry(shape=[2], span=(0, 2)), "b": entry(span=(1, 2))}, b"xx", '"b" overlaps "a"'),
    "two names for the same bytes": ({"a": entry(), "b": entry()}, b"x", 'tensor "b" overlaps "a"'),
    "empty tensor inside another": (
        {"a": entry(shape=[2], span=(0, 2)), "b": entry(shape=[0], span=(1, 1))}, b"xx", "overlaps",
    ),
    "data cut off": ({"a": entry(shape=[4], span=(0, 4))}, b"xxx", "take 4 bytes of data, the file has 3"),
    "data left over": ({"a": entry()}, b"xx", "take 1 bytes of data, the file has 2: bytes follow"),
    "no tensors, but data": ({}, b"x", "take 0 bytes of data, the file has 1: bytes follow"),
}  # fmt: skip

ACCEPTED: dict[str, tuple[object, bytes]] = {
    "no tensors": ({}, b""),
    "metadata only": ({"__metadata__": {"a": "b"}}, b""),
    "metadata null": ({"__metadata__": None, "a": entry()}, b"x"),
    "metadata key escaped": ('{"__metadat\\u0061__":{"a":"b"}}', b""),
    "metadata last": ({"a": entry(), "__metadata__": {"a": "b"}}, b"x"),
    "white space in front": (" \n\t{" + f'"a":{GOOD}' + "}", b"x"),
    "white space behind": (row(GOOD) + " \n", b"x"),
    "white space within": (json.dumps({"a": entry()}, indent=2), b"x"),
    "unknown field": (with_field("[1.5,null]"), b"x"),
    "unknown field of 300 digits": (with_field("1" * 300), b"x"),
    "125 brackets deep": (with_field("[" * 125 + "]" * 125), b"x"),
    "the same row twice": (f'{{"a":{GOOD},"a":{GOOD}}}', b"x"),
    "entry as a list": (row('["U8",[1],[0,1]]'), b"x"),
    "dtype as an object": (row(GOOD).replace('"U8"', '{"U8":null}'), b"x"),
    "empty name": (f'{{"":{GOOD}}}', b"x"),
    "escaped name": (f'{{"\\u00e9\\"\\ud83d\\ude00":{GOOD}}}', b"x"),
    "name that needs no escape": (f'{{"é/😀":{GOOD}}}', b"x"),
    "any order": ({"a": entry(shape=[2], span=(2, 4)), "b": entry(shape=[2], span=(0, 2))}, b"wxyz"),
    "empty tensors": (
        {"a": entry(shape=[0], span=(0, 0)), "b": entry(), "c": entry(shape=[3, 0], span=(1, 1))}, b"x",
    ),
    "scalar": ({"a": entry("F32", [], (0, 4))}, b"abcd"),
    "unaligned": ({"a": entry(), "b": entry("F32", [1], (1, 5))}, b"abcde"),
    "every extent within 64 bits": ({"a": entry(shape=[0, 2**40, 2**40], span=(0, 0))}, b""),
    "four bits": ({"a": entry("F4", [2, 4], (0, 4))}, b"abcd"),
    "six bits": ({"a": entry("F6_E2M3", [4], (0, 3))}, b"abc"),
    "bool that is neither": ({"a": entry("BOOL", [2], (0, 2))}, b"\x02\x01"),
}  # fmt: skip


def reference_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str, tmp_path: Path) -> None:
    header, data, message = MALFORMED[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(safetensors_bytes(header, data))
    with pytest.raises(FormatError) as error:
        DiskMap(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert not reference_accepts(path)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, tmp_path: Path, library_knows: Callable[[bytes], bool]) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(safetensors_bytes(*ACCEPTED[name]))
    if not library_knows(path.read_bytes()):
        pytest.skip("the safetensors library does not know this dtype")
    assert_agrees(path)


def assert_agrees(path: Path) -> None:
    """Compare names, metadata and every tensor that the library can make with those of the library."""
    with safe_open(path, framework="pt") as reference, DiskMap(path) as disk_map:
        assert set(disk_map) == set(reference.keys())
        assert dict(disk_map.metadata) == (reference.metadata() or {})
        for name in disk_map:
            try:
                expected = reference.get_tensor(name)
            except (SafetensorError, TypeError, AttributeError):  # torch lacks the dtype
                continue
            found = disk_map[name]
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert (
                found.reshape(-1).view(torch.uint8).tolist()
                == expected.reshape(-1).view(torch.uint8).tolist()
            )


def test_a_name_twice_with_different_rows_is_refused(tmp_path: Path) -> None:
    """The library takes the last; which one was meant cannot be known."""
    empty = json.dumps(entry(shape=[0], span=(0, 0)))
    path = tmp_path / "twice.safetensors"
    path.write_bytes(safetensors_bytes(f'{{"a":{empty},"a":{GOOD}}}', b"x"))
    with pytest.raises(FormatError, match='the header describes tensor "a" twice, differently'):
        DiskMap(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few for a safetensors file"),
        (b"1234567", "7 bytes are too few for a safetensors file"),
        (
            struct.pack("<Q", 1 << 63),
            "the header claims 9,223,372,036,854,775,808 bytes, the format allows 100,000,000",
        ),
        (struct.pack("<Q", 100_000_001) + b"{}", "the header claims 100,000,001 bytes"),
        (struct.pack("<Q", 99_999_999) + b"{}", "the header claims 99,999,999 bytes, the whole file has 10"),
        (struct.pack("<Q", 3) + b"{}", "the header claims 3 bytes, the whole file has 10"),
    ],
    ids=["empty", "seven bytes", "2**63", "over the limit", "longer than the file", "one byte longer"],
)
def test_lying_length(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as error:
        DiskMap(path)
    assert message in str(error.value)
    assert not reference_accepts(path)


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 20, -1])
def test_truncated(nbytes: int, path: str, tmp_path: Path) -> None:
    content = Path(path).read_bytes()
    short = tmp_path / "short.safetensors"
    short.write_bytes(content[:nbytes])
    with pytest.raises(FormatError):
        DiskMap(short)
    assert not reference_accepts(short)


def test_both_readers_agree(path: str) -> None:
    """The regular form and the same header with one blank more give the same table."""
    from safemap import _header, _header_json

    raw = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length].decode()
    fast = _header._parse_regular(text, 8 + length, len(raw) - 8 - length)
    assert fast is not None
    assert fast == _header_json.parse_irregular(text, 8 + length, len(raw) - 8 - length)


def test_the_collector_is_on_again(path: str) -> None:
    import gc

    DiskMap(path)
    assert gc.isenabled()


def test_a_row_that_closes_the_header_is_the_last(tmp_path: Path) -> None:
    """The reader of usual headers accepts "}" for "," after a row; only at the end may it stand."""
    rows = [
        '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',
        '"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}',
    ]
    for text, is_right in (
        ("{" + ",".join(rows) + "}", True),
        ("{" + ",".join(rows) + "}  \n\t ", True),
        ("{" + ",".join(rows) + "}" + " " * 10_000, True),
        ("{" + "}".join(rows) + "}", False),
        ("{" + ",".join(rows) + ",", False),
        ("{" + ",".join(rows) + ",}", False),
        ("{" + ",".join(rows) + "}}", False),
        ("{" + "}".join(rows) + ",", False),
        ("{" + "}".join(rows), False),
    ):
        path = tmp_path / "m.safetensors"
        path.write_bytes(safetensors_bytes(text, b"xy"))
        if is_right:
            assert bytes(DiskMap(path)["b"].tolist()) == b"y"
        else:
            with pytest.raises(FormatError, match="not valid JSON"):
                DiskMap(path)


def test_a_name_with_braces(tmp_path: Path) -> None:
    header = {"a}},": entry(span=(0, 1)), "}}": entry(span=(1, 2))}
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(header, b"xy"))
    assert {name: tensor.item() for name, tensor in DiskMap(tmp_path / "m.safetensors").items()} == {
        "a}},": ord("x"),
        "}}": ord("y"),
    }
