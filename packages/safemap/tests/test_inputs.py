"""What may be passed as a path, and what is said of paths that lead nowhere."""

import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safemap import DiskMap, DuplicateTensorError, FormatError, MissingFileError, load_state_dict
from safemap.testing import assert_same

ONE, TWO = torch.ones(3), torch.full((2,), 2.0)


@pytest.fixture
def shards(tmp_path: Path, save) -> Path:
    """A folder with two shards and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "m-00001-of-00002.safetensors", {"one": ONE})
    save(folder / "m-00002-of-00002.safetensors", {"two": TWO})
    weight_map = {"one": "m-00001-of-00002.safetensors", "two": "m-00002-of-00002.safetensors"}
    (folder / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "of",
    [
        lambda folder: folder,
        lambda folder: str(folder),
        lambda folder: folder / "m.safetensors.index.json",
        lambda folder: sorted(folder.glob("*.safetensors")),
        lambda folder: tuple(map(str, sorted(folder.glob("*.safetensors")))),
        lambda folder: folder / "m-*.safetensors",
        lambda folder: [folder / "m-00001*", folder / "m-00002-of-00002.safetensors"],
        lambda folder: os.path.relpath(folder),
    ],
    ids=["folder", "str", "index", "list", "tuple", "pattern", "list with a pattern", "relative"],
)
def test_ways_to_name_a_checkpoint(shards: Path, of) -> None:
    disk_map = DiskMap(of(shards))
    assert list(disk_map) == ["one", "two"]
    assert_same(disk_map["one"], ONE)
    assert_same(disk_map["two"], TWO)
    assert [Path(file).parent for file in disk_map.files] == [shards, shards]


def test_other_objects_than_paths(tmp_path: Path) -> None:
    for wrong in (3, None, b"x", [3], [b"x"]):
        with pytest.raises(TypeError, match="path must be a str"):
            DiskMap(wrong)
    with pytest.raises(MissingFileError, match="the list is empty"):
        DiskMap([])


def test_home_folder(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shards.parent))
    assert len(DiskMap("~/model")) == 2


@pytest.mark.parametrize("name", ["モデル.safetensors", "with space.safetensors", "a[1]*.safetensors"])
def test_names_of_files(name: str, tmp_path: Path, save) -> None:
    """Characters that are not ASCII, and those of patterns, are taken as they are if such a file exists."""
    assert_same(DiskMap(save(tmp_path / name, {"one": ONE}))["one"], ONE)


def test_symbolic_link(shards: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(shards / "m-00001-of-00002.safetensors")
    assert_same(DiskMap(link)["one"], ONE)
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(MissingFileError, match="no such file"):
        DiskMap(link)


def test_a_file_without_suffix(tmp_path: Path, save) -> None:
    assert_same(DiskMap(save(tmp_path / "blob", {"one": ONE}))["one"], ONE)
    torch.save({"one": ONE}, tmp_path / "torch-blob")
    assert_same(DiskMap(tmp_path / "torch-blob")["one"], ONE)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as error:
        DiskMap(tmp_path / "none.safetensors")
    assert str(error.value) == f"{tmp_path}/none.safetensors: no such file"
    assert isinstance(error.value, FileNotFoundError)


def test_pattern_without_match(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as error:
        DiskMap(tmp_path / "*.safetensors")
    assert str(error.value) == f"{tmp_path}/*.safetensors: no file matches this pattern"


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingFileError, match="a folder without weights; looked for"):
        DiskMap(tmp_path)


def test_folder_prefers_safetensors(tmp_path: Path, save) -> None:
    save(tmp_path / "model.safetensors", {"one": ONE})
    torch.save({"two": TWO}, tmp_path / "model.bin")
    assert list(DiskMap(tmp_path)) == ["one"]


def test_folder_with_two_indexes(shards: Path) -> None:
    (shards / "m.fp16.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(FormatError, match=r"more than one index \(m.fp16.safetensors.index"):
        DiskMap(shards)


def test_missing_shard_is_named(shards: Path) -> None:
    (shards / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError) as error:
        DiskMap(shards)
    assert str(error.value) == (
        f'{shards}/m.safetensors.index.json: the shard "m-00002-of-00002.safetensors", which holds 1 of 2 '
        "tensors, "
        f"is missing. It should be at {shards}/m-00002-of-00002.safetensors: download it again."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a valid index"),
        ("[]", 'an index must have a "weight_map"'),
        ('{"weight_map": [1]}', 'an index must have a "weight_map"'),
        ('{"weight_map": {"a": 3}}', 'an index must have a "weight_map"'),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside the folder of the index"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "outside the folder of the index"),
        ('{"weight_map": {"one": "m-00002-of-00002.safetensors"}}', 'says that tensor "one" is in'),
    ],
    ids=["no JSON", "a list", "map a list", "number", "parent", "absolute", "wrong shard"],
)
def test_bad_index(shards: Path, content: str, message: str) -> None:
    (shards / "m.safetensors.index.json").write_text(content)
    with pytest.raises(FormatError) as error:
        DiskMap(shards / "m.safetensors.index.json")
    assert message in str(error.value)


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such index"):
        DiskMap(tmp_path / "m.safetensors.index.json")


def test_an_index_decides_between_shards(shards: Path, save) -> None:
    """Both shards hold "two"; the index says whose it is."""
    save(shards / "m-00001-of-00002.safetensors", {"one": ONE, "two": torch.zeros(2)})
    assert_same(DiskMap(shards)["two"], TWO)


def test_duplicate_names(tmp_path: Path, save) -> None:
    first = save(tmp_path / "1.safetensors", {"a": ONE, "b": ONE, "c": ONE})
    second = save(tmp_path / "2.safetensors", {"a": TWO, "b": TWO})
    with pytest.raises(DuplicateTensorError) as error:
        DiskMap([first, second])
    assert str(error.value) == (
        f'tensor "a" is in {second} and {first} (1 more names are in both). Pass the files of one '
        'checkpoint only, or on_duplicate="last" to let later files win.'
    )
    assert_same(DiskMap([first, second], on_duplicate="last")["a"], TWO)
    assert_same(DiskMap([second, first], on_duplicate="last")["a"], ONE)
    assert_same(load_state_dict([first, second])["a"], TWO)


def test_duplicates_between_formats(tmp_path: Path, save) -> None:
    first = save(tmp_path / "1.safetensors", {"a": ONE})
    torch.save({"a": {"nested": TWO}}, tmp_path / "2.pth")
    with pytest.raises(DuplicateTensorError):
        DiskMap([first, tmp_path / "2.pth"])
    assert list(DiskMap([first, tmp_path / "2.pth"], on_duplicate="last")["a"]) == ["nested"]
    assert_same(DiskMap([tmp_path / "2.pth", first], on_duplicate="last")["a"], ONE)


def test_fifo(tmp_path: Path) -> None:
    """Opening must not wait for a writer."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FormatError, match="a FIFO, not a regular file"):
        DiskMap(tmp_path / "pipe.safetensors")


def test_device_file() -> None:
    with pytest.raises(FormatError, match="a device, not a regular file"):
        DiskMap("/dev/zero")


def test_permission(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read everything, so a mode of 000 would prove nothing
    with pytest.raises(PermissionError) as error:
        DiskMap(path)
    assert str(error.value) == f"[Errno 13] Permission denied: not allowed to read: {path!r}"


def test_containers_keep_their_type(tmp_path: Path) -> None:
    torch.save({"a": OrderedDict(x=ONE), "b": (ONE, [TWO])}, tmp_path / "m.pth")
    disk_map = DiskMap(tmp_path / "m.pth")
    assert type(disk_map["a"]) is OrderedDict
    assert type(disk_map["b"]) is tuple
    assert_same(disk_map["b"][1][0], TWO)
