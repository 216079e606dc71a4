"""GGUF files: what is not quantized is read as from any file, the rest is refused by name."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safemap import DiskMap, FormatError, UnsupportedTensorError
from safemap._gguf import TYPES
from safemap.testing import assert_same

NUMBERS = {code: number for number, (code, _, _) in TYPES.items()}


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def describe(name: str, shape: tuple[int, ...], code: str | int, offset: int) -> bytes:
    number = NUMBERS[code] if isinstance(code, str) else code
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset)


def gguf_bytes(tensors: list[bytes], data: bytes, pairs: list[bytes] = [], **change: Any) -> bytes:  # noqa: B006
    head = struct.pack(
        "<4sIQQ", b"GGUF", change.get("version", 3), change.get("count", len(tensors)), len(pairs)
    )
    head += b"".join([*pairs, *tensors])
    return head + bytes(-len(head) % change.get("alignment", 32)) + data


PAIRS = [
    string("general.name") + struct.pack("<I", 8) + string("täst"),
    string("numbers") + struct.pack("<IIQ3i", 9, 5, 3, 1, 2, 3),
    string("words") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
    string("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ2B", 0, 2, 1, 2),
    string("flag") + struct.pack("<I?", 7, True),
    string("general.alignment") + struct.pack("<II", 4, 64),
]


@pytest.mark.parametrize("code", ["F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"])
def test_plain_types(code: str, tmp_path: Path) -> None:
    from safemap._dtypes import TORCH_DTYPES

    values = torch.arange(12).to(TORCH_DTYPES[code]).view(3, 4)
    raw = bytes(values.view(torch.uint8).flatten().tolist())
    data = raw + bytes(-len(raw) % 64) + raw[: len(raw) // 12]
    tensors = [describe("a", (3, 4), code, 0), describe("b", (), code, len(data) // 64 * 64)]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tensors, data, PAIRS, alignment=64))
    with DiskMap(path) as disk_map:
        assert list(disk_map) == ["a", "b"]
        assert_same(disk_map["a"], values)
        assert_same(disk_map["b"], values[0, 0])
        assert_same(disk_map.slice("a")[1:, 2], values[1:, 2])
        assert disk_map.metadata == {"general.name": "täst", "flag": "True", "general.alignment": "64"}


def test_quantized_tensors_are_refused_by_name(tmp_path: Path) -> None:
    tensors = [describe("q", (2, 64), "Q8_0", 0), describe("plain", (4,), "I8", 160)]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(tensors, bytes(136 + 24) + b"abcd"))
    disk_map = DiskMap(tmp_path / "m.gguf")
    assert disk_map.nbytes("q") == 136
    assert disk_map["plain"].tolist() == [97, 98, 99, 100]
    for use in (disk_map.__getitem__, disk_map.info):
        with pytest.raises(
            UnsupportedTensorError, match=r'tensor "q" of .* has dtype Q8_0 and shape \[2, 64\]'
        ):
            use("q")


ONE = describe("a", (4,), "I8", 0)
BROKEN = {
    "empty": (b"GGUF", "damaged header"),
    "version": (gguf_bytes([ONE], b"abcd", version=1), "of version 1"),
    "other byte order": (gguf_bytes([ONE], b"abcd", version=3 << 24), "the other byte order"),
    "lying count": (gguf_bytes([ONE], b"abcd", count=1 << 60), "more than the file can hold"),
    "one tensor too many": (gguf_bytes([ONE], b"", count=2), "damaged header"),
    "truncated data": (gguf_bytes([ONE], b"abc"), 'tensor "a" ends at byte 68, the file has 67'),
    "twice": (gguf_bytes([ONE, ONE], b"abcd"), 'describes tensor "a" twice'),
    "overlap": (gguf_bytes([ONE, describe("b", (4,), "I8", 0)], b"abcd"), 'tensor "b" overlaps'),
    "unaligned": (gguf_bytes([describe("a", (1,), "I8", 8)], bytes(99)), "not aligned to 32"),
    "unknown type": (gguf_bytes([describe("a", (1,), 99, 0)], b"a"), "unknown type 99"),
    "extents": (gguf_bytes([describe("a", (1,) * 5, "I8", 0)], b"a"), "has 5 extents"),
    "overflow": (gguf_bytes([describe("a", (1 << 40, 1 << 40), "I8", 0)], b"a"), "more than 64 bits count"),
    "part of a block": (gguf_bytes([describe("a", (33,), "Q8_0", 0)], bytes(99)), "blocks of 32"),
    "not UTF-8": (gguf_bytes([], b"", [string(b"\xff") + struct.pack("<IB", 0, 0)]), "damaged header"),
    "long string": (gguf_bytes([], b"", [struct.pack("<Q", 1 << 62) + bytes(99)]), "beyond the end"),
    "long array": (gguf_bytes([], b"", [string("k") + struct.pack("<IIQ", 9, 8, 1 << 62)]), "too long"),
    "long numbers": (
        gguf_bytes([], b"", [string("k") + struct.pack("<IIQ", 9, 0, 1 << 62)]),
        "beyond the end",
    ),
    "unknown value": (gguf_bytes([], b"", [string("k") + struct.pack("<I", 77)]), "unknown type of value 77"),
    "deep": (
        gguf_bytes([], b"", [string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50]),
        "unknown",
    ),
    "alignment": (
        gguf_bytes([], b"", [string("general.alignment") + struct.pack("<II", 4, 48)]),
        "must be a power of two; it is 48",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(what: str, tmp_path: Path) -> None:
    raw, message = BROKEN[what]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(FormatError) as error:
        DiskMap(tmp_path / "m.gguf")
    assert message in str(error.value)
    assert "m.gguf" in str(error.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = gguf_bytes([ONE, describe("b", (2, 2), "I16", 32)], b"abcd" + bytes(28) + b"12345678", PAIRS[:4])
    for nbytes in range(8, len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:nbytes])
        with pytest.raises(FormatError):
            DiskMap(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(whole)
    assert DiskMap(tmp_path / "m.gguf")["b"].shape == (2, 2)


def test_the_package_gguf_agrees(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    types = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: types[number] for number in TYPES if number in types} == {
        number: TYPES[number] for number in TYPES if number in types
    }
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "test")
    values = np.arange(640, dtype=np.float32).reshape(5, 128)
    quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("f", values)
    writer.add_tensor("h", values.astype(np.float16))
    writer.add_tensor("i", np.arange(7))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    disk_map = DiskMap(tmp_path / "m.gguf")
    for tensor in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors:
        assert disk_map.nbytes(tensor.name) == tensor.n_bytes
        if tensor.name != "q":
            assert disk_map.info(tensor.name).offset == tensor.data_offset
            assert_same(disk_map[tensor.name], torch.from_numpy(np.array(tensor.data)))
