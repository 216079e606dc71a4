"""Files of torch.save: read lazily, with strides and nested containers, and nothing executed."""

import errno
import io
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safemap import ConverterError, DiskMap, FormatError, load_state_dict
from safemap._cli import main
from safemap.testing import assert_same
from torch import nn

BASE = torch.arange(24, dtype=torch.float32).view(4, 6)


def saved(tmp_path: Path, content: object) -> str:
    torch.save(content, tmp_path / "m.pth")
    return str(tmp_path / "m.pth")


@pytest.mark.parametrize(
    "make",
    [
        lambda: BASE,
        lambda: BASE.t(),
        lambda: BASE[1:3],
        lambda: BASE[:, 2:4],
        lambda: BASE[::2],
        lambda: BASE[2, 3],
        lambda: BASE[4:],
        lambda: torch.ones(3).expand(5, 3),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(400, 400)[:, ::50],
        lambda: nn.Parameter(BASE.clone()),
        lambda: BASE.to(torch.complex64),
        lambda: BASE.to(torch.float8_e5m2),
        lambda: torch.tensor([1, 2, 65535], dtype=torch.uint16),
        lambda: torch.tensor(7),
    ],
    ids=[
        *("plain", "transposed", "rows", "columns", "steps", "scalar", "empty", "expanded", "channels-last"),
        *("sparse-steps", "parameter", "complex", "fp8", "uint16", "integer"),
    ],
)  # fmt: skip
def test_values_and_strides(tmp_path: Path, make) -> None:
    tensor = make().detach()
    try:
        path = saved(tmp_path, {"t": tensor, "other": torch.ones(3)})
    except KeyError:
        pytest.skip(f"torch {torch.__version__} cannot save {tensor.dtype}")
    found = DiskMap(path)["t"]
    assert_same(found, torch.load(path, weights_only=True)["t"])
    assert found.untyped_storage().nbytes() <= max(2 * tensor.nbytes, 64)
    assert not found.requires_grad


def test_strides_are_kept(tmp_path: Path) -> None:
    disk_map = DiskMap(saved(tmp_path, {"t": BASE.t()}))
    assert disk_map["t"].stride() == BASE.t().stride()
    assert_same(disk_map.slice("t")[1:3, 2], BASE.t()[1:3, 2])
    part = disk_map.slice("t")[1:3]
    assert part.untyped_storage().nbytes() == part.nbytes  # it does not keep the whole in memory
    out = torch.empty(6, 4, dtype=torch.float64)
    disk_map.read_into("t", out)
    assert_same(out, BASE.t().double())


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    found = DiskMap(saved(tmp_path, {"p": nn.Parameter(BASE.clone())}))["p"]
    assert type(found) is torch.Tensor


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """The bytes of one storage are overwritten: all other tensors, and opening, are unharmed."""
    path = saved(tmp_path, {"a": torch.ones(1000), "b": torch.full((1000,), 2.0)})
    info = DiskMap(path).info("a")
    with open(path, "r+b") as file:
        file.seek(info.offset)
        file.write(bytes(info.nbytes))
    disk_map = DiskMap(path)
    assert_same(disk_map["a"], torch.zeros(1000))
    assert_same(disk_map["b"], torch.full((1000,), 2.0))


def test_shared_storages(tmp_path: Path) -> None:
    path = saved(tmp_path, {"all": BASE, "tie": BASE, "part": BASE[1]})
    disk_map = DiskMap(path)
    assert disk_map.info("all").offset == disk_map.info("tie").offset
    assert disk_map.info("part").offset == disk_map.info("all").offset + 24
    assert_same(disk_map["part"], BASE[1])


def test_nested_containers_pass_through(tmp_path: Path) -> None:
    content = {"encoder": {"w": BASE, "n": 3, "deep": [torch.ones(2), ("x", None)]}, "step": 7, 5: "five"}
    disk_map = DiskMap(saved(tmp_path, content), torch_dtype=torch.float64)
    assert set(disk_map) == {"encoder", "step", 5}
    encoder = disk_map["encoder"]
    assert_same(encoder["w"], BASE.double())
    assert_same(encoder["deep"][0], torch.ones(2).double())
    assert encoder["deep"][1] == ("x", None)
    assert (encoder["n"], disk_map["step"], disk_map[5]) == (3, 7, "five")
    with pytest.raises(TypeError, match="is a dict, not a tensor"):
        disk_map.info("encoder")


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model_state"])
def test_unwrapping(tmp_path: Path, wrapper: str) -> None:
    path = saved(tmp_path, {wrapper: {"w": BASE, "n": 3}})
    assert list(DiskMap(path)) == [wrapper]
    assert list(DiskMap(path, unwrap=True)) == ["w", "n"]
    loaded = load_state_dict(path, torch_dtype=torch.float16)
    assert loaded["n"] == 3
    assert_same(loaded["w"], BASE.half())


def test_no_unwrapping_of_two_keys_or_another_name(tmp_path: Path) -> None:
    two_keys = saved(tmp_path, {"state_dict": {"w": BASE}, "epoch": 1})
    assert list(load_state_dict(two_keys)) == ["state_dict", "epoch"]
    assert list(load_state_dict(saved(tmp_path, {"model": {"w": BASE}}))) == ["model"]


@pytest.mark.parametrize("content", [BASE, [BASE], 3], ids=["tensor", "list", "number"])
def test_no_mapping(tmp_path: Path, content: object) -> None:
    with pytest.raises(FormatError, match="expected a dict from names to tensors"):
        DiskMap(saved(tmp_path, content))


class _Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:.*read as a whole")
def test_code_is_not_run(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": _Malicious()}, "m.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="torch's weights-only loading refuses it"):
        DiskMap("m.pth")
    assert not Path("executed").exists()


def test_legacy_is_read_whole_with_a_warning(tmp_path: Path, save_legacy) -> None:
    path = save_legacy(tmp_path / "m.bin", {"a": BASE, "b": {"c": torch.ones(2)}})
    with pytest.warns(UserWarning, match="m.bin: read as a whole, because it is in the format from"):
        disk_map = DiskMap(path, torch_dtype=torch.float64)
    assert_same(disk_map["a"], BASE.double())
    assert_same(disk_map["b"]["c"], torch.ones(2).double())
    info = disk_map.info("a")
    assert (info.dtype, info.nbytes, info.file, info.offset) == (torch.float32, 96, path, None)
    assert_same(disk_map.slice("a")[1:3], BASE[1:3].double())
    assert_same(disk_map.read_into("a", torch.empty(4, 6)), BASE)


@pytest.mark.filterwarnings("ignore:.*read as a whole", "ignore:Sparse", "ignore:Validating sparse")
def test_what_meta_tensors_cannot_stand_for_is_read_whole(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    conjugate = torch.tensor([1 + 2j]).conj()
    for content in ({"s": sparse, "w": BASE}, {"c": conjugate, "w": BASE}):
        disk_map = DiskMap(saved(tmp_path, content))
        assert_same(disk_map["w"], BASE)
    assert_same(disk_map["c"].resolve_conj(), torch.tensor([1 - 2j]))


@pytest.mark.filterwarnings("ignore:.*read as a whole")
def test_conjugate_and_negative_tensors_mean_the_same_whoever_reads_them(tmp_path: Path) -> None:
    stored = {"c": torch.tensor([1 + 2j, 3j]).conj(), "n": torch._neg_view(BASE), "w": BASE}
    path = saved(tmp_path, stored)
    copied = DiskMap(path, state_dict_converter=lambda s: {name: t.clone() for name, t in s.items()})
    together = DiskMap(path).tensors()
    for name, tensor in stored.items():
        assert_same(copied[name], tensor)
        assert_same(together[name], tensor)
    assert main(["convert", path, str(tmp_path / "m.safetensors")]) == 0
    for name, tensor in stored.items():
        assert_same(DiskMap(tmp_path / "m.safetensors")[name], tensor)


@pytest.mark.filterwarnings("ignore:.*read as a whole", "ignore:.*uantized", "ignore:Typed")
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:Validating sparse")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.quantize_per_tensor(BASE, 0.5, 0, torch.qint8), "qint8"),
    ],
    ids=["sparse", "rows", "quantized"],
)
def test_what_is_no_plain_memory_is_passed_on(make, kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path, {"s": make(), "w": BASE})
    plain = DiskMap(path)
    renamed = DiskMap(path, state_dict_converter=lambda s: {"t": s["s"], "x": s["w"] * 2})
    assert plain.info("s").nbytes > 0
    for found in (plain["s"], plain.tensors()["s"], renamed["t"], renamed.tensors()["t"]):
        assert found.layout == make().layout
        assert found.is_quantized == make().is_quantized
        assert_same(_dense(found), _dense(make()))
    assert_same(renamed["x"], BASE * 2)
    with pytest.raises(ConverterError, match=f"stored as {kind} can be passed on by a converter"):
        DiskMap(path, state_dict_converter=lambda s: {"t": s["s"] + s["w"]})
    for command in (["ls", path], ["show", path, "s"], ["verify", path, "--nan", "--checksum"]):
        with pytest.warns(UserWarning, match="read as a whole"):
            assert main(command) == 0
    assert main(["convert", path, str(tmp_path / "m.safetensors")]) == 1
    assert os.listdir(tmp_path) == ["m.pth"]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor.to_dense()


class _Pair(NamedTuple):
    x: object
    y: object


class _Holder:
    """An object that a user has allowed, with a tensor among its attributes."""

    def __init__(self, inner: object) -> None:
        self.inner = inner


def loaded(path: str) -> dict[str, Any]:
    """Return what torch loads, or skip the test: older releases refuse some containers."""
    try:
        return torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        pytest.skip(f"torch {torch.__version__}: {error}")


@pytest.fixture
def allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([_Pair, _Holder]):
        yield


@pytest.mark.usefixtures("allowed")
@pytest.mark.filterwarnings("ignore:Typed")
@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch before 2.5")
@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda: {BASE}, lambda found: next(iter(found))),
        (lambda: _Pair(BASE, 1), lambda found: found.x),
        (lambda: _Pair(1, {"deep": [BASE]}), lambda found: found.y["deep"][0]),
        (lambda: _Holder({"deep": BASE}), lambda found: found.inner["deep"]),
        (lambda: BASE.untyped_storage(), lambda found: torch.tensor(found.tolist())),
        (lambda: BASE.storage(), lambda found: torch.tensor(found.tolist())),
    ],
    ids=["set", "named tuple", "deep in one", "object", "untyped storage", "typed storage"],
)
def test_tensors_in_other_containers_make_the_file_be_read_whole(tmp_path: Path, make, values) -> None:
    path = saved(tmp_path, {"x": make(), "w": torch.ones(2)})
    expected = loaded(path)["x"]
    with pytest.warns(UserWarning, match="read as a whole, because it holds tensors or their memory in"):
        disk_map = DiskMap(path)
    assert type(disk_map["x"]) is type(expected)
    assert_same(values(disk_map["x"]), values(expected))
    assert_same(disk_map["w"], torch.ones(2))


@pytest.mark.usefixtures("allowed")
@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch before 2.5")
@pytest.mark.filterwarnings("error")
def test_other_containers_without_tensors_pass_through(tmp_path: Path) -> None:
    path = saved(tmp_path, {"s": {1, "a"}, "p": _Pair(1, {"k": None}), "w": BASE})
    loaded(path)
    disk_map = DiskMap(path)
    assert (disk_map["s"], disk_map["p"]) == ({1, "a"}, _Pair(1, {"k": None}))
    assert disk_map.info("w").offset is not None


def test_counts_are_not_added_up(tmp_path: Path) -> None:
    counts = Counter({"x": 2, "y": 3})
    path = saved(tmp_path, {"counts": counts, "nested": {"counts": counts}, "w": BASE})
    loaded(path)
    for opened in (DiskMap(path), DiskMap(path, state_dict_converter=lambda s: s)):
        found = opened["counts"]
        assert type(found) is Counter
        assert found == counts
        assert opened["nested"]["counts"] == counts


def test_a_container_that_contains_itself_is_refused(tmp_path: Path, save_legacy) -> None:
    cyclic: dict[str, object] = {"w": BASE}
    cyclic["self"] = cyclic
    with pytest.raises(FormatError, match=r"m\.pth: holds a container that contains itself"):
        DiskMap(saved(tmp_path, cyclic))
    with (
        pytest.warns(UserWarning, match="read as a whole"),
        pytest.raises(FormatError, match=r"old\.pth: holds a container that contains itself"),
    ):
        DiskMap(save_legacy(tmp_path / "old.pth", cyclic))


def rewritten(path: str, change) -> str:
    """Write the archive anew, its members passed through *change(name, data) -> data or None*."""
    members = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            data = change(name, archive.read(name))
            if data is not None:
                members[name] = data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        ("data.pkl", lambda data: None, "no data.pkl"),
        ("data/0", lambda data: None, "the storage '0' is missing"),
        ("data/0", lambda data: data[:8], "has 8 bytes; its tensors need 96"),
        ("data.pkl", lambda data: data[:20], "torch's weights-only loading refuses it"),
        ("data.pkl", lambda data: b"junk", "torch's weights-only loading refuses it"),
    ],
    ids=["no pickle", "no storage", "short storage", "short pickle", "no pickle in it"],
)
def test_damaged_archive(tmp_path: Path, member: str, change, message: str) -> None:
    path = rewritten(
        saved(tmp_path, {"w": BASE}), lambda name, data: change(data) if name.endswith(member) else data
    )
    with pytest.raises(FormatError) as error:
        DiskMap(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_truncated_archive(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": BASE})
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 30)
    with pytest.raises(FormatError, match="a damaged zip archive"):
        DiskMap(path)


def test_damage_that_the_zip_module_meets(tmp_path: Path) -> None:
    no_text = rewritten(
        saved(tmp_path, {"w": BASE}), lambda name, data: b"\xb8" if "byteorder" in name else data
    )
    with pytest.raises(FormatError, match=r"m\.pth: a damaged zip archive: UnicodeDecodeError"):
        DiskMap(no_text)
    path = Path(saved(tmp_path, {"w": BASE}))
    content = path.read_bytes()
    entry = content.index(b"PK\x01\x02")  # of the directory at the end: what it takes to unpack, and a place
    for position, value, error in ((entry + 6, 197, "NotImplementedError"), (entry + 45, 0xFF, "")):
        path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
        with pytest.raises(FormatError, match=rf"m\.pth: a damaged zip archive: {error}"):
            DiskMap(path)


@pytest.mark.filterwarnings("ignore:.*read as a whole")
def test_damaged_legacy_files(tmp_path: Path, save_legacy) -> None:
    path = Path(save_legacy(tmp_path / "old.pth", {"w": BASE, "b": torch.ones(3)}))
    content = path.read_bytes()
    for length in range(2, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"old\.pth"):
            DiskMap(path)


def test_errors_of_the_system_are_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        DiskMap(saved(tmp_path, {"w": BASE}))


@pytest.mark.filterwarnings("ignore:.*TorchScript|.*torch.jit:DeprecationWarning")
def test_script_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}))
        archive.writestr("m/constants.pkl", pickle.dumps(()))
    with pytest.raises(FormatError, match="a TorchScript archive"):
        DiskMap(tmp_path / "m.pt")


def test_other_byte_order_is_read_by_torch(tmp_path: Path) -> None:
    """Bytes are swapped by torch; the file says that it comes from such a machine."""

    def swap(name: str, data: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        if "data/0" not in name:
            return data
        return b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))

    path = rewritten(saved(tmp_path, {"w": BASE}), swap)
    with pytest.warns(UserWarning, match="written on a machine of the other byte order"):
        disk_map = DiskMap(path)
    assert_same(disk_map["w"], BASE)


def test_reads_what_a_stream_wrote(tmp_path: Path) -> None:
    """Archives written to a stream have their name from nowhere: the prefix is "archive"."""
    buffer = io.BytesIO()
    torch.save({"w": BASE}, buffer)
    (tmp_path / "m.ckpt").write_bytes(buffer.getvalue())
    assert_same(DiskMap(tmp_path / "m.ckpt")["w"], BASE)
