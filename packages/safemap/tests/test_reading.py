"""Values: dtypes, destinations, parts, threads, memory."""

import contextlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safemap import (
    ConverterError,
    DiskMap,
    MismatchError,
    UnsupportedTensorError,
    _cast,
    _read,
    load_state_dict,
)
from safemap._buffers import MIB, bytes_of
from safemap._dtypes import TORCH_DTYPES
from safemap.testing import assert_same, safetensors_bytes
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

FLOATS = [dtype for dtype in TORCH_DTYPES.values() if dtype.is_floating_point and dtype.itemsize > 1]
EIGHT_BITS = [
    dtype for dtype in TORCH_DTYPES.values() if dtype.is_floating_point and dtype.itemsize == 1
    and dtype is not getattr(torch, "float4_e2m1fn_x2", None)
]  # fmt: skip


def every_bit_pattern(dtype: torch.dtype) -> Tensor:
    """Every value of an 8-bit dtype, and of a 16-bit one; random bits of wider ones."""
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(-(2**31), 2**31, (4096 * dtype.itemsize // 4,), generator=generator).int().view(dtype)
    )


def assert_same_values(found: Tensor, expected: Tensor) -> None:
    """As ``assert_same``, but one NaN is as good as another."""
    assert found.dtype == expected.dtype
    missing = expected.float().isnan()
    assert torch.equal(found.float().isnan(), missing)
    assert_same(found[~missing], expected[~missing])


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("stored", [*EIGHT_BITS, *FLOATS], ids=str)
def test_conversion_while_reading_is_that_of_torch(stored, to, tmp_path: Path, save) -> None:
    """Bit for bit, at sizes below and above the pieces in which large tensors are read."""
    patterns = every_bit_pattern(stored)
    large = patterns.repeat(-(-1_100_000 // len(patterns)))[:1_100_003]
    disk_map = DiskMap(save(tmp_path / "m.safetensors", {"small": patterns, "large": large}), torch_dtype=to)
    for name, tensor in (("small", patterns), ("large", large)):
        assert_same_values(disk_map[name], tensor.to(to))


def test_integers_are_converted_too(tmp_path: Path, save) -> None:
    path = save(tmp_path / "m.safetensors", {"i": torch.arange(5), "b": torch.tensor([True, False])})
    disk_map = DiskMap(path, torch_dtype=torch.float16)
    assert_same(disk_map["i"], torch.arange(5).half())
    assert_same(disk_map["b"], torch.tensor([1.0, 0.0]).half())


def test_complex_to_real_is_refused(path: str) -> None:
    with pytest.raises(MismatchError) as error:
        DiskMap(path, torch_dtype=torch.float32)["spectrum"]
    assert str(error.value) == (
        'tensor "spectrum" is torch.complex64; torch.float32 would drop its imaginary part. '
        "Read it as stored."
    )
    with pytest.raises(MismatchError):
        DiskMap(path).read_into("spectrum", torch.empty(5))


@pytest.mark.skipif("F4" not in TORCH_DTYPES, reason="this torch has no dtype of four bits")
def test_four_bits_are_read_but_not_converted(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(header, b"ab"))
    assert DiskMap(tmp_path / "m.safetensors")["a"].view(torch.uint8).tolist() == [97, 98]
    with pytest.raises(MismatchError, match="torch cannot convert two values in one element"):
        DiskMap(tmp_path / "m.safetensors", torch_dtype=torch.bfloat16)["a"]


def test_dtype_that_torch_lacks(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(header, b"abc"))
    disk_map = DiskMap(tmp_path / "m.safetensors")
    for use in (disk_map.__getitem__, disk_map.info, disk_map.slice):
        with pytest.raises(
            UnsupportedTensorError, match=r'tensor "a" of .* has dtype F6_E2M3 and shape \[4\]'
        ):
            use("a")
    assert disk_map.nbytes("a") == 3


# ---------------------------------------------------------------------- read_into


@pytest.mark.parametrize("name", ["blocks.0.weight", "embedding", "scale", "empty", "ids"])
def test_read_into(name: str, path: str, tensors: dict[str, Tensor]) -> None:
    out = torch.full_like(tensors[name], 1)
    assert DiskMap(path).read_into(name, out) is out
    assert_same(out, tensors[name])


def test_read_into_another_dtype(path: str, tensors: dict[str, Tensor]) -> None:
    """The destination decides, not the dtype of the map."""
    out = torch.empty(1200, 1000, dtype=torch.float64)
    DiskMap(path, torch_dtype=torch.float16).read_into("embedding", out)
    assert_same(out, tensors["embedding"].double())


def test_read_into_a_view(path: str, tensors: dict[str, Tensor]) -> None:
    """Contiguous or not, only the view is written."""
    rows = torch.zeros(66, 32)
    DiskMap(path).read_into("blocks.0.weight", rows[1:65])
    assert_same(rows[1:65], tensors["blocks.0.weight"])
    assert not rows[0].any()
    assert not rows[65].any()
    columns = torch.zeros(64, 64)
    DiskMap(path).read_into("blocks.0.weight", columns[:, ::2])
    assert_same(columns[:, ::2], tensors["blocks.0.weight"])
    assert not columns[:, 1::2].any()


def test_read_into_a_parameter(path: str, tensors: dict[str, Tensor]) -> None:
    for dtype in (torch.float32, torch.float64):
        parameter = torch.nn.Parameter(torch.zeros(64, 32, dtype=dtype))
        DiskMap(path).read_into("blocks.0.weight", parameter)
        assert_same(parameter.detach(), tensors["blocks.0.weight"].to(dtype))


def test_a_read_within_a_fake_mode_does_no_harm(path: str, tensors: dict[str, Tensor]) -> None:
    """What is kept for later reads must be real."""
    disk_map = DiskMap(path)
    _cast._table.cache_clear()
    with FakeTensorMode(), contextlib.suppress(Exception):  # there is no memory to read into
        disk_map["blocks.0.weight"]
    with FakeTensorMode(), contextlib.suppress(Exception):
        _cast._table(torch.float8_e4m3fn, torch.float16, torch.int32)
    assert_same(disk_map["blocks.0.weight"], tensors["blocks.0.weight"])
    assert type(_cast._table(torch.float8_e4m3fn, torch.float16, torch.int32)) is Tensor


@pytest.fixture
def flipped(tmp_path: Path, save) -> dict[str, DiskMap]:
    """Maps with a complex and a real tensor: stored, and computed by a converter."""
    stored = {"c": torch.tensor([[1 + 2j, 3 - 4j], [5j, 6]]), "r": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    path = save(tmp_path / "flipped.safetensors", stored)
    maps = {"stored": DiskMap(path)}
    maps["computed"] = DiskMap(path, state_dict_converter=lambda s: {name: t * 1 for name, t in s.items()})
    return maps


@pytest.mark.parametrize("kind", ["stored", "computed"])
def test_read_into_conjugate_and_negative_views(kind: str, flipped: dict[str, DiskMap]) -> None:
    disk_map = flipped[kind]
    outs = {
        "c": lambda dtype: torch.zeros(2, 2, dtype=dtype).conj(),
        "r": lambda dtype: torch._neg_view(torch.zeros(2, 2, dtype=dtype)),
    }
    for name, dtypes in {"c": (torch.complex64, torch.complex128), "r": (torch.float32, torch.half)}.items():
        expected = disk_map[name]
        for dtype in dtypes:
            for key in (..., slice(1, 2), (slice(None), slice(1, 2))):
                out = outs[name](dtype)
                disk_map.slice(name).read_into(key, out[key])
                assert_same(out[key].resolve_conj().resolve_neg(), expected[key].to(dtype))
            whole = disk_map.read_into(name, outs[name](dtype))
            assert_same(whole.resolve_conj().resolve_neg(), expected.to(dtype))
    with pytest.raises(ValueError, match="a conjugate or negative view"):
        bytes_of(outs["c"](torch.complex64))


@pytest.mark.parametrize("kind", ["stored", "computed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_read_into_tells_autograd(kind: str, dtype: torch.dtype, flipped: dict[str, DiskMap]) -> None:
    """A backward pass must not use values that were read after its forward."""
    disk_map = flipped[kind]
    reads = [
        lambda out: disk_map.read_into("r", out),
        lambda out: disk_map.slice("r").read_into(slice(0, 2), out),
        lambda out: disk_map.slice("r").read_into((slice(None), slice(0, 1)), out[:, :1]),
    ]
    for read in reads:
        weight = torch.ones(2, 2, dtype=dtype, requires_grad=True)
        product = (weight * weight).sum()
        read(weight.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        assert_same(disk_map.read_into("r", torch.ones(2, 2)), disk_map["r"])


def test_read_into_the_wrong_shape(path: str) -> None:
    out = torch.zeros(32, 64)
    with pytest.raises(MismatchError) as error:
        DiskMap(path).read_into("blocks.0.weight", out)
    assert str(error.value) == 'tensor "blocks.0.weight" has shape [64, 32]; the destination has [32, 64]'
    assert not out.any()


# ---------------------------------------------------------------------- parts

CUTS = [
    0,
    -1,
    slice(None),
    slice(1, 3),
    slice(2),
    slice(-2, None),
    slice(3, 1),
    slice(0, 100),
    slice(None, None, 2),
]


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 5, 6)], ids=str)
def test_every_part(shape: tuple[int, ...], tmp_path: Path, save) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    part = DiskMap(save(tmp_path / "m.safetensors", {"t": tensor})).slice("t")
    for key in itertools.chain.from_iterable(
        itertools.product(CUTS, repeat=n) for n in range(len(shape) + 1)
    ):
        assert_same(part[key], tensor[key])
        assert_same(part[(..., *key)], tensor[(..., *key)])


def test_part_of_a_scalar(path: str, tensors: dict[str, Tensor]) -> None:
    assert_same(DiskMap(path).slice("scale")[()], tensors["scale"])
    assert_same(DiskMap(path).slice("scale")[...], tensors["scale"])


@pytest.mark.parametrize(
    "key",
    [
        slice(100, 900),
        (slice(None), slice(10, 20)),
        (slice(3, 5), slice(10, 900)),
        (slice(None), slice(0, 999)),
        3,
    ],
    ids=["rows", "narrow columns", "wide block", "most columns", "row"],
)
def test_parts_of_a_large_tensor(key, path: str, tensors: dict[str, Tensor]) -> None:
    for dtype in (None, torch.float32):
        found = DiskMap(path, torch_dtype=dtype).slice("embedding")[key]
        assert_same(found, tensors["embedding"][key].to(dtype or torch.bfloat16))
        assert found.untyped_storage().nbytes() == found.nbytes


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (64, IndexError, "index 64 is out of range for dimension 0 (64)"),
        ((0, -33), IndexError, "index -33 is out of range for dimension 1 (32)"),
        ((0, 0, 0), IndexError, "has 2 dimensions; the index has 3"),
        ((..., ...), IndexError, 'an index can have only one "..."'),
        (slice(None, None, -1), ValueError, "the step of a slice must be positive; got -1"),
        (None, TypeError, 'only integers, slices and "..." can index it; got None'),
        (True, TypeError, 'only integers, slices and "..." can index it; got True'),
        ("a", TypeError, "can index it; got 'a'"),
    ],
    ids=["beyond", "below", "too many", "two ellipses", "backwards", "None", "bool", "str"],
)
def test_bad_index(key, error: type[Exception], message: str, path: str) -> None:
    with pytest.raises(error) as raised:
        DiskMap(path).slice("blocks.0.weight")[key]
    assert message in str(raised.value)
    assert '"blocks.0.weight"' in str(raised.value)


def test_a_slice_tells_what_it_is(path: str) -> None:
    part = DiskMap(path).slice("blocks.0.weight")
    assert (part.shape, part.dtype) == (torch.Size([64, 32]), torch.float32)
    assert repr(part) == "<TensorSlice 'blocks.0.weight' torch.float32 [64, 32]>"


PARTS = {
    "rows": slice(100, 900),
    "narrow columns": (slice(None), slice(10, 20)),
    "wide block": (slice(3, 5), slice(10, 900)),
    "all": ...,
    "nothing": slice(3, 3),
}


@pytest.mark.parametrize("key", PARTS.values(), ids=PARTS.keys())
def test_parts_into_memory_given(key, path: str, tensors: dict[str, Tensor]) -> None:
    """Contiguous or not, of the stored dtype or another; what lies around is left alone."""
    for dtype in (torch.bfloat16, torch.float32):
        expected = tensors["embedding"][key].to(dtype)
        part = DiskMap(path).slice("embedding")
        out = torch.empty(expected.shape, dtype=dtype)
        assert part.read_into(key, out) is out
        assert_same(out, expected)
        frame = torch.full((expected.shape[0], expected.shape[1] + 2), 5, dtype=dtype)
        part.read_into(key, frame[:, 1:-1])
        assert_same(frame[:, 1:-1].contiguous(), expected)
        assert frame[:, [0, -1]].eq(5).all()


def test_parts_into_unfit_memory(path: str) -> None:
    disk_map = DiskMap(path)
    with pytest.raises(
        MismatchError, match=r'the part of tensor "blocks\.0\.weight" has shape \[3, 32\]; the'
    ):
        disk_map.slice("blocks.0.weight").read_into(slice(2, 5), torch.empty(4, 32))
    with pytest.raises(MismatchError, match="would drop its imaginary part"):
        disk_map.slice("spectrum").read_into(..., torch.empty(5))
    for key in (0, slice(None, None, 2)):
        with pytest.raises(TypeError, match="only slices with step 1 can be read into memory given"):
            disk_map.slice("blocks.0.weight").read_into(key, torch.empty(32))


# ---------------------------------------------------------------------- device, threads


def test_device(device: torch.device, path: str, tensors: dict[str, Tensor]) -> None:
    for dtype in (None, torch.float16, torch.float64):
        disk_map = DiskMap(path, device, torch_dtype=dtype)
        for name in ("blocks.0.weight", "embedding", "ids", "empty", "eight.bits"):
            found = disk_map[name]
            assert found.device.type == device.type
            assert_same(found, tensors[name].to(dtype or tensors[name].dtype))
        assert disk_map.slice("embedding")[3:5].device.type == device.type
    out = torch.empty(1200, 1000, dtype=torch.bfloat16, device=device)
    assert_same(DiskMap(path).read_into("embedding", out), tensors["embedding"])


def test_ways_to_name_a_device(path: str) -> None:
    assert DiskMap(path, "cpu").device == DiskMap(path, torch.device("cpu")).device == torch.device("cpu")
    assert DiskMap(path, "meta")["embedding"].device.type == "meta"


@pytest.mark.cuda
def test_device_index(path: str, tensors: dict[str, Tensor], accelerator: torch.device) -> None:
    assert_same(DiskMap(path, 0)["embedding"], tensors["embedding"])
    assert DiskMap(path, 0).device == torch.device(accelerator.type, 0)
    assert DiskMap(path, pin_memory=True)["embedding"].is_pinned()


def test_threads_share_a_map(path: str, tensors: dict[str, Tensor]) -> None:
    disk_map = DiskMap(path)
    work = [name for name in tensors for _ in range(20)]
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(work, pool.map(disk_map.__getitem__, work), strict=True):
            assert_same(found, tensors[name])


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"]
)
def test_modes_of_the_caller_change_no_value(mode, stored: torch.dtype, tmp_path: Path, save) -> None:
    tensor = torch.randn(1500, 1000).to(stored)
    path = save(tmp_path / "m.safetensors", {"t": tensor})
    _cast._table.cache_clear()
    with mode():
        inside = DiskMap(path, torch_dtype=torch.bfloat16, threads=3)["t"]
    assert_same(inside, tensor.to(torch.bfloat16))
    assert_same(DiskMap(path, torch_dtype=torch.bfloat16, threads=3)["t"], inside)  # nothing is left behind


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("mib", [4, 18, 100])
def test_threads_that_share_a_tensor_end_at_about_the_same_time(threads: int, mib: int) -> None:
    nbytes = mib * MIB + 7
    pieces = _read._shrinking_pieces(nbytes, threads)
    sizes = [stop - start for start, stop in pieces]
    assert [0, *(stop for _, stop in pieces)] == [*(start for start, _ in pieces), nbytes]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= _read.CHUNK
    busy = [0] * threads  # bytes of each, where each takes the next piece when it is free
    for size in sizes:
        busy[busy.index(min(busy))] += size
    assert max(busy) - min(busy) <= MIB + 7


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_one_tensor_by_several_threads(threads: int, tmp_path: Path, save) -> None:
    tensor = torch.arange(5_000_000)  # 40 MB: several pieces
    disk_map = DiskMap(save(tmp_path / "m.safetensors", {"t": tensor}), threads=threads)
    assert_same(disk_map["t"], tensor)
    assert_same(DiskMap(disk_map.files, torch_dtype=torch.float64, threads=threads)["t"], tensor.double())


def test_prefetch_of_what_is_cached_wakes_no_thread(path: str, tensors: dict, monkeypatch) -> None:
    from safemap import _prefetch

    asked: list[object] = []
    monkeypatch.setattr(_prefetch, "one_by_one", asked.append)
    monkeypatch.setattr(_prefetch, "is_cached", lambda file, start, stop: True)
    with DiskMap(path) as disk_map:
        disk_map.prefetch(tensors)
        assert asked == []
        monkeypatch.setattr(_prefetch, "is_cached", lambda file, start, stop: None)  # it cannot be told
        disk_map.prefetch(["scale"])
        assert len(asked) == 1


def test_prefetch_asks_for_every_byte_in_small_requests(
    path: str, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel drops what exceeds its window, so a large tensor takes many requests."""
    import os

    from safemap import _prefetch

    asked: set[int] = set()

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        assert length <= 128 << 10
        assert advice == os.POSIX_FADV_WILLNEED
        asked.update(range(offset, offset + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(_prefetch, "one_by_one", lambda task: task())
    monkeypatch.setattr(_prefetch, "is_cached", lambda file, start, stop: False)
    with DiskMap(path) as disk_map:
        disk_map.prefetch(["embedding", "scale", "empty"])
        infos = [disk_map.info(name) for name in ("embedding", "scale")]
    assert asked == {byte for info in infos for byte in range(info.offset, info.offset + info.nbytes)}


def test_prefetch_is_only_a_hint(path: str, tensors: dict[str, Tensor]) -> None:
    disk_map = DiskMap(path)
    disk_map.prefetch(disk_map)
    disk_map.close()  # while it may still be under way
    with DiskMap(path) as disk_map, pytest.raises(KeyError):
        disk_map.prefetch(["nothing"])


# ---------------------------------------------------------------------- converters, load_state_dict


def test_two_names_for_one_tensor(path: str, tensors: dict[str, Tensor]) -> None:
    disk_map = DiskMap(
        path, state_dict_converter=lambda sd: {"head": sd["embedding"], "tail": sd["embedding"]}
    )
    assert list(disk_map) == ["head", "tail"]
    assert disk_map.info("head") == disk_map.info("tail")
    assert_same(disk_map["tail"], tensors["embedding"])
    assert "embedding" not in disk_map


def test_load_state_dict(path: str, tensors: dict[str, Tensor]) -> None:
    loaded = load_state_dict(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)


def test_load_state_dict_logs_or_draws_progress(path: str, caplog, monkeypatch, capsys) -> None:
    import sys

    load_state_dict(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    with caplog.at_level("INFO", logger="safemap.load"):
        load_state_dict(path, verbose=1)
    assert caplog.messages[-1] == "Loading: 3,248,733 of 3,248,733 bytes"


def test_a_converter_that_fails_is_named(path: str) -> None:
    def fails(state_dict: dict) -> dict:
        raise KeyError("model.diffusion_model")

    with pytest.raises(ConverterError, match=r"fails .*KeyError: 'model.diffusion_model'"):
        DiskMap(path, state_dict_converter=fails)


@pytest.mark.parametrize("result", [None, 3, ["a"]])
def test_a_converter_that_returns_no_dict_is_named(result: object, path: str) -> None:
    with pytest.raises(ConverterError, match="must return a dict; got"):
        DiskMap(path, state_dict_converter=lambda sd: result)


@pytest.mark.parametrize("nbytes", [64, 600 << 10, 3 << 20])
def test_an_ambient_device_does_not_matter(tmp_path: Path, nbytes: int) -> None:
    tensors = {"t": torch.randn(nbytes // 16, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    with torch.device("meta"):
        disk_map = DiskMap(tmp_path / "m.safetensors")
        assert torch.equal(disk_map["t"], tensors["t"])
        assert torch.equal(disk_map.slice("t")[1:3, 1], tensors["t"][1:3, 1])
        half = DiskMap(tmp_path / "m.safetensors", torch_dtype=torch.float16)["t"]
        assert torch.equal(half, tensors["t"].half())


@pytest.mark.parametrize("nbytes", [64, 6 << 10, 300 << 10, 3 << 20, 5 << 20, 10 << 20])
@pytest.mark.parametrize(("code", "threads"), [("F32", 1), ("F32", 3), ("BF16", 1), ("BF16", 3)])
def test_memory_is_aligned_wherever_the_file_has_its_bytes(
    nbytes: int, code: str, threads: int, tmp_path: Path
) -> None:
    """Results of wide matrix products differ in the last bit with the alignment of their operands."""
    names, dtype = ["a", "b"], TORCH_DTYPES[code]
    size = nbytes // dtype.itemsize
    for pad in (0, 8, 40, 64):  # before the end of a page
        header = {
            name: {"dtype": code, "shape": [size], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
            for i, name in enumerate(names)
        }
        text = json.dumps(header)
        text += " " * ((4096 - 8 - pad - len(text)) % 4096)
        data = torch.randint(0, 256, (len(names), nbytes), dtype=torch.uint8)
        path = tmp_path / f"{pad}.safetensors"
        path.write_bytes(safetensors_bytes(text, bytes(bytes_of(data))))
        disk_map = DiskMap(path, threads=threads)
        for name, expected in zip(names, data, strict=True):
            found = disk_map[name]
            apart = found.data_ptr() - disk_map.info(name).offset
            assert found.data_ptr() % 64 == 0 or (dtype.itemsize == 2 and apart % 64 == 0)
            assert_same(found, expected.view(dtype))
        path.unlink()


def test_a_map_that_was_read_from_can_be_pickled(path: str, tensors: dict[str, Tensor]) -> None:
    """What layouts remember for the next read stays behind."""
    import pickle

    disk_map = DiskMap(path, state_dict_converter=lambda sd: {"a": sd["scale"], "b": sd["blocks.0.bias"] + 1})
    before = dict(disk_map)
    copy = pickle.loads(pickle.dumps(disk_map))
    for name, tensor in before.items():
        assert_same(copy[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_products_do_not_depend_on_alignment(dtype: torch.dtype) -> None:
    """On this the choice of where large narrow tensors begin rests."""

    def at(tensor: Tensor, offset: int) -> Tensor:
        memory = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
        start = (offset - memory.data_ptr()) % 64
        return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((257, 129), (512, 768), (1000, 1000)):
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        for batch in (1, 2, 5, 33):
            x = torch.randn(batch, columns, generator=generator).to(dtype)
            expected = torch.nn.functional.linear(x, at(weight, 0))
            for offset in (8, 16, 40, 56):
                assert torch.equal(torch.nn.functional.linear(x, at(weight, offset)), expected)
