"""Layers on disk whose checkpoint is mapped compute in place, and never with a file that has changed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, enable_vram_management
from offload_layers.testing import residencies
from safemap import DiskMap, FileChangedError
from safetensors.torch import save_file
from torch import nn

WIDTH, LAYERS = 256, 4
ON_DISK = {
    f"{role}_{what}": "disk" for role in ("offload", "onload", "preparing") for what in ("dtype", "device")
}
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(plain().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def manage(source: DiskMap) -> Any:
    config = ON_DISK | {"computation_dtype": torch.float32, "computation_device": "cpu"}
    return enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, config, None, source)


def test_views_are_made_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = manage(DiskMap(path, mmap=True))
    for _ in range(2):
        assert torch.equal(model(X), plain()(X))
    reads: list[str] = []
    read = DiskMap.__getitem__
    monkeypatch.setattr(DiskMap, "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    assert torch.equal(model(X), plain()(X))
    assert reads == []
    for residency in residencies(model):
        residency.offload()
    assert torch.equal(model(X), plain()(X))
    assert sorted(reads) == sorted(plain().state_dict())


def test_a_mapping_that_is_renewed_is_read_again(path: Path) -> None:
    numel = sum(parameter.numel() for parameter in plain().parameters())
    source = DiskMap(path, mmap=True, buffer_size=numel // 2)
    model = manage(source)
    for _ in range(3):
        assert torch.equal(model(X), plain()(X))
    assert all(residency._views is None for residency in residencies(model))


@pytest.mark.parametrize("nbytes", [0, 1000, None], ids=["emptied", "truncated", "touched"])
def test_a_file_that_changes_between_two_forwards_fails_the_second(path: Path, nbytes: int | None) -> None:
    model = manage(DiskMap(path, mmap=True))
    for _ in range(2):
        model(X)
    whole = path.read_bytes()
    os.truncate(path, len(whole) if nbytes is None else nbytes)
    os.utime(path, ns=(0, 0))
    with pytest.raises(FileChangedError, match="changed after it was opened"):
        model(X)
    path.write_bytes(whole)
    source = DiskMap(path, mmap=True)
    for residency in residencies(model):
        residency.source = source
    assert torch.equal(model(X), plain()(X))


def test_what_is_written_to_a_view_reaches_neither_the_file_nor_another_map(path: Path) -> None:
    model = manage(DiskMap(path, mmap=True))
    model(X)
    model[1].weight.zero_()
    expected = plain()
    expected[1].weight.zero_()
    for _ in range(2):
        assert torch.equal(model(X), expected(X))
    assert torch.equal(manage(DiskMap(path, mmap=True))(X), plain()(X))
