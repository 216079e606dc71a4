"""GGUF files: what is not quantized is read as from any file, the rest is decoded by the package gguf."""

import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safemap import ConverterError, DiskMap, FileChangedError, FormatError, UnsupportedTensorError
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


def quantized(tmp_path: Path, code: str, shape: tuple[int, ...] = (2, 512)) -> Path:
    """A file with the tensor "q" of finite random blocks, and one that is not quantized after it."""
    number, (_, elements, nbytes) = NUMBERS[code], TYPES[NUMBERS[code]]
    size = torch.Size(shape).numel() // elements * nbytes
    generator = torch.Generator().manual_seed(number)
    data = bytes(torch.randint(0, 60, (size,), generator=generator).tolist())
    padded = data + bytes(-size % 32)
    tensors = [describe("q", shape, code, 0), describe("plain", (4,), "I8", len(padded))]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(tensors, padded + b"abcd"))
    return tmp_path / "m.gguf"


def test_without_the_package_quantized_tensors_are_listed_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    disk_map = DiskMap(quantized(tmp_path, "Q8_0"))
    info = disk_map.info("q")
    assert (info.dtype, info.shape, info.encoding) == (torch.float32, (2, 512), "Q8_0")
    assert info.nbytes == disk_map.nbytes("q") == 1088
    assert disk_map.info("plain").encoding is None
    assert disk_map["plain"].tolist() == [97, 98, 99, 100]
    with pytest.raises(UnsupportedTensorError, match=r'tensor "q" of .*Q8_0.*pip install safemap\[gguf\]'):
        disk_map["q"]


def decoded(path: Path) -> torch.Tensor:
    """What the package reads, by its own reader."""
    gguf = pytest.importorskip("gguf")
    tensor = gguf.GGUFReader(str(path)).tensors[0]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.copy()).view(tuple(reversed(tensor.shape.tolist())))


@pytest.mark.parametrize("code", [code for code, block, _ in TYPES.values() if block > 1])
def test_quantized_tensors_equal_those_of_the_package(code: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = quantized(tmp_path, code)
    try:
        expected = decoded(path)
    except (NotImplementedError, ValueError):  # a type that the package can only list, or does not know
        with pytest.raises(UnsupportedTensorError, match=f"{code}, which the installed package gguf cannot"):
            DiskMap(path)["q"]
        return
    assert gguf.GGMLQuantizationType(NUMBERS[code]).name == code
    assert expected.abs().sum() > 0
    assert_same(DiskMap(path)["q"], expected)
    assert_same(DiskMap(path, torch_dtype=torch.bfloat16)["q"], expected.bfloat16())


def test_quantized_tensors_in_pieces_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = quantized(tmp_path, "Q4_K", (3, 5, 512))
    expected = decoded(path)
    monkeypatch.setattr("safemap._gguf_blocks._PIECE", 1024)  # several pieces, the last one shorter
    for options in ({}, {"threads": 2}, {"mmap": True}):
        disk_map = DiskMap(path, **options)
        assert_same(disk_map["q"], expected)
        assert_same(disk_map.read_into("q", torch.empty(3, 5, 512).half()), expected.half())
        strided = torch.empty(512, 5, 3).permute(2, 1, 0)
        assert torch.equal(disk_map.read_into("q", strided), expected)
        for key in (slice(1, 2), (slice(1, 3), 2, slice(3, 9)), (0, slice(None), -1), slice(2, 2)):
            part = disk_map.slice("q")[key]
            assert_same(part, expected[key])
            assert part.untyped_storage().nbytes() == part.nbytes
        out = torch.empty(2, 5, 4)
        assert_same(
            disk_map.slice("q").read_into((slice(1, 3), ..., slice(8, 12)), out), expected[1:3, :, 8:12]
        )
    assert disk_map.slice("q").nbytes(slice(1, 3)) == disk_map.nbytes("q") // 3 * 2
    disk_map.prefetch(["q"])


def test_a_quantized_tensor_of_a_file_that_was_edited_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = quantized(tmp_path, "Q8_0")
    disk_map = DiskMap(path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(FileChangedError):
        disk_map["q"]


def test_converters_pass_quantized_tensors_on(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = quantized(tmp_path, "Q8_0")
    disk_map = DiskMap(path, state_dict_converter=lambda state_dict: {"new": state_dict["q"]})
    assert_same(disk_map["new"], decoded(path))


def test_converters_that_compute_with_quantized_tensors_are_told(tmp_path: Path) -> None:
    path = quantized(tmp_path, "Q8_0")
    with pytest.raises(
        ConverterError, match="stored as Q8_0 can be passed on by a converter, not computed with"
    ):
        DiskMap(path, state_dict_converter=lambda state_dict: {"new": state_dict["q"] * 2})


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
