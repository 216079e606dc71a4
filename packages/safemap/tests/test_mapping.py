"""The laws of Mapping, for every kind of map and source."""

import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safemap import ClosedMapError, DiskMap, MissingTensorError
from safemap.testing import MappingTests, assert_same
from torch import Tensor


@pytest.fixture(autouse=True)
def _save(request: pytest.FixtureRequest, save) -> None:
    if request.instance is not None:
        request.instance.save = staticmethod(save)


class TestPlainDict(MappingTests):
    """The laws themselves, on what certainly is a mapping."""

    def make(self, tensors: dict[str, Tensor], folder: Path) -> Mapping[str, Tensor]:
        class Copies(dict):
            def __getitem__(self, name):
                return super().__getitem__(name).clone()

            def items(self):
                return [(name, self[name]) for name in self]

            def values(self):
                return [self[name] for name in self]

        return Copies(tensors)


class TestOneFile(MappingTests):
    def make(self, tensors: dict[str, Tensor], folder: Path) -> DiskMap:
        return DiskMap(self.save(folder / "model.safetensors", tensors))


class TestShards(MappingTests):
    def make(self, tensors: dict[str, Tensor], folder: Path) -> DiskMap:
        names = list(tensors)
        weight_map = {name: f"shard-{i % 3}.safetensors" for i, name in enumerate(names)}
        for shard in set(weight_map.values()):
            self.save(folder / shard, {name: tensors[name] for name in names if weight_map[name] == shard})
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return DiskMap(index)


class TestTorchZip(MappingTests):
    def make(self, tensors: dict[str, Tensor], folder: Path) -> DiskMap:
        torch.save(tensors, folder / "model.pth")
        return DiskMap(folder / "model.pth")


class TestLegacyPickle(MappingTests):
    pytestmark = pytest.mark.filterwarnings("ignore:.*read as a whole")

    @pytest.fixture(autouse=True)
    def _legacy(self, save_legacy) -> None:
        self.save_legacy = save_legacy

    def sample(self) -> dict[str, Tensor]:
        tensors = super().sample()
        del tensors["eight.bits"]  # torch writes such files, but does not read them
        return tensors

    def make(self, tensors: dict[str, Tensor], folder: Path) -> DiskMap:
        return DiskMap(self.save_legacy(folder / "model.bin", tensors))


class TestRenamed(MappingTests):
    def make(self, tensors: dict[str, Tensor], folder: Path) -> DiskMap:
        path = self.save(folder / "model.safetensors", {f"old.{name}": t for name, t in tensors.items()})
        return DiskMap(
            path, state_dict_converter=lambda sd: {k.removeprefix("old."): v for k, v in sd.items()}
        )


class TestConverted(MappingTests):
    def make(self, tensors: dict[str, Tensor], folder: Path) -> DiskMap:
        return DiskMap(self.save(folder / "model.safetensors", tensors), torch_dtype=torch.complex128)

    def expected(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.complex128)


class TestOneThread(MappingTests):
    def make(self, tensors: dict[str, Tensor], folder: Path) -> DiskMap:
        return DiskMap(self.save(folder / "model.safetensors", tensors), threads=1)


class TestMapped(MappingTests):
    def make(self, tensors: dict[str, Tensor], folder: Path) -> DiskMap:
        return DiskMap(self.save(folder / "model.safetensors", tensors), mmap=True)

    def test_values_are_independent(self, tmp_path: Path) -> None:
        """Views of one mapping share memory, as documented; the file does not change."""
        path = self.save(tmp_path / "model.safetensors", {"a": torch.ones(4)})
        view = DiskMap(path, mmap=True)["a"]
        view.zero_()
        assert_same(DiskMap(path)["a"], torch.ones(4))


def test_is_a_mapping(path: str) -> None:
    assert isinstance(DiskMap(path), Mapping)


def test_missing_name_tells_what_is_close(path: str) -> None:
    with pytest.raises(MissingTensorError) as error:
        DiskMap(path)["blocks.0.weihgt"]
    assert str(error.value) == (
        f'no tensor "blocks.0.weihgt" in {path} (1 file, 11 names). '
        "Closest: 'blocks.0.weight', 'blocks.0.bias', 'blocks.1.large'."
    )


def test_equal_only_to_itself(path: str) -> None:
    first, second = DiskMap(path), DiskMap(path)
    assert first == first
    assert first != second
    assert len({first, second}) == 2


def test_info(path: str, tensors: dict[str, Tensor]) -> None:
    with DiskMap(path, torch_dtype=torch.float64) as disk_map:
        for name, tensor in tensors.items():
            info = disk_map.info(name)
            assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tensor.shape, tensor.nbytes)
            assert disk_map.nbytes(name) == tensor.nbytes
            assert info.file == path
            raw = Path(path).read_bytes()[info.offset : info.offset + info.nbytes]
            assert raw == bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        with pytest.raises(MissingTensorError):
            disk_map.info("nothing")


def test_metadata(path: str) -> None:
    metadata = DiskMap(path).metadata
    assert dict(metadata) == {"format": "pt", "made-by": "tests"}
    with pytest.raises(TypeError):
        metadata["format"] = "np"


def test_metadata_of_shards_is_merged(tmp_path: Path, save) -> None:
    one = save(
        tmp_path / "1.safetensors", {"a": torch.ones(1)}, {"format": "pt", "layers": '["a","b"]', "n": "1"}
    )
    two = save(
        tmp_path / "2.safetensors", {"b": torch.ones(1)}, {"format": "pt", "layers": '["b","c"]', "n": "2"}
    )
    metadata = DiskMap([one, two]).metadata
    assert dict(metadata) == {"format": "pt", "layers": '["a", "b", "c"]', "n": "2"}


def test_repr(path: str) -> None:
    disk_map = DiskMap(path, torch_dtype=torch.bfloat16)
    assert repr(disk_map) == f"<DiskMap {path} 11 names on cpu as torch.bfloat16>"
    disk_map.close()
    assert repr(disk_map) == f"<DiskMap {path} closed>"


def test_closed(path: str, tensors: dict[str, Tensor]) -> None:
    with DiskMap(path) as disk_map:
        kept = disk_map["embedding"]
        part = disk_map.slice("embedding")
    disk_map.close()  # again, to no effect
    assert_same(kept, tensors["embedding"])
    for use in (
        lambda: disk_map["embedding"],
        lambda: len(disk_map),
        lambda: list(disk_map),
        lambda: "embedding" in disk_map,
        lambda: disk_map.info("embedding"),
        lambda: disk_map.read_into("embedding", kept),
        lambda: disk_map.prefetch(["embedding"]),
        lambda: disk_map.__enter__(),
        lambda: part[0],
    ):
        with pytest.raises(ClosedMapError, match="the map was closed"):
            use()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"torch_dtype": "bfloat16"}, TypeError, "torch_dtype must be a torch.dtype or None; got 'bfloat16'"),
        ({"on_duplicate": "first"}, ValueError, 'on_duplicate must be "error" or "last"; got \'first\''),
        ({"buffer_size": -1}, ValueError, "buffer_size must not be negative; got -1"),
    ],
    ids=["dtype", "on_duplicate", "buffer_size"],
)
def test_bad_arguments(path: str, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        DiskMap(path, **arguments)
    assert str(raised.value) == message


def test_buffer_size(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFSYNTH_DISK_MAP_BUFFER_SIZE", raising=False)
    assert DiskMap(path).buffer_size == sys.maxsize  # never renewed
    monkeypatch.setenv("DIFFSYNTH_DISK_MAP_BUFFER_SIZE", "5000")
    assert DiskMap(path).buffer_size == 5000
    assert DiskMap(path, buffer_size=7).buffer_size == 7
    monkeypatch.setenv("DIFFSYNTH_DISK_MAP_BUFFER_SIZE", "1GB")
    with pytest.raises(ValueError, match="must be a number of elements; it is '1GB'"):
        DiskMap(path)


def test_a_mapping_is_renewed_after_buffer_size(path: str, tensors: dict[str, Tensor]) -> None:
    disk_map = DiskMap(path, mmap=True, buffer_size=1000)
    first = disk_map["blocks.0.bias"]
    again = disk_map["blocks.0.bias"]
    assert first.data_ptr() == again.data_ptr()  # one mapping
    disk_map["embedding"]  # more than 1,000 elements
    assert disk_map["blocks.0.bias"].data_ptr() != first.data_ptr()
    assert_same(first, tensors["blocks.0.bias"])  # a view keeps its mapping


def test_the_same_map_with_other_threads(path: str, tensors: dict[str, Tensor]) -> None:
    disk_map = DiskMap(path, torch_dtype=torch.float64)
    alone = disk_map.with_threads(1)
    assert alone.files == disk_map.files
    assert alone._reader.threads == 1
    assert disk_map._reader.threads == DiskMap(path)._reader.threads
    assert_same(alone["embedding"], tensors["embedding"].double())
    alone_again = pickle.loads(pickle.dumps(alone))
    assert alone_again._reader.threads == 1
    disk_map.close()
    with pytest.raises(ClosedMapError):
        disk_map.with_threads(2)
    with pytest.raises(ClosedMapError):  # the files are shared
        alone["embedding"]


def test_a_map_of_views_gives_tensors_in_memory_of_their_own(path: str, tensors: dict[str, Tensor]) -> None:
    disk_map = DiskMap(path, mmap=True)
    owned = disk_map.owned()
    assert owned.owned() is owned
    view, own = disk_map["embedding"], owned["embedding"]
    assert disk_map["embedding"].data_ptr() == view.data_ptr()
    assert owned["embedding"].data_ptr() != own.data_ptr() != view.data_ptr()
    assert_same(own, tensors["embedding"])
    assert pickle.loads(pickle.dumps(owned)).renew(["embedding"]) is False
    disk_map.close()
    with pytest.raises(ClosedMapError):
        disk_map.owned()
    with pytest.raises(ClosedMapError):  # the files are shared
        owned["embedding"]


def test_maps_over_the_same_files_share_the_memory_that_they_keep(path: str) -> None:
    disk_map = DiskMap(path, threads=2)
    assert disk_map.with_threads(1)._reader.pool is disk_map._reader.pool
