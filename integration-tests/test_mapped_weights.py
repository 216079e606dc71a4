"""Layers on disk whose checkpoint is mapped compute in place, and never with a file that has changed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, enable_vram_management
from offload_layers._merge import MergedSource
from offload_layers._source import TiedSource, owning
from offload_layers.testing import residencies, with_own_budget
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


def lies_in(path: Path, tensor: torch.Tensor) -> bool:
    """Tell whether *tensor* is a view of the mapped file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
        if start <= address < end:
            return str(path) in line
    raise AssertionError(f"no memory at {address:x}")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped where")
@pytest.mark.parametrize(("part", "in_file"), [(0.75, {False}), (2, {True})], ids=["half", "everything"])
def test_what_stays_beside_others_does_not_depend_on_the_page_cache(
    path: Path, part: float, in_file: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_layers._schedule.KEPT_NBYTES", -1)
    config = ON_DISK | {f"{role}_dtype": torch.float32 for role in ("preparing", "computation")}
    config |= {"preparing_device": "cpu", "computation_device": "cpu"}
    nbytes = part * sum(parameter.nbytes for parameter in plain().parameters())
    model = enable_vram_management(
        plain(), {nn.Linear: AutoWrappedLinear}, config, nbytes / 2**30, DiskMap(path, mmap=True)
    )
    with_own_budget(model)
    for _ in range(3):
        assert torch.equal(model(X), plain()(X))
    stay = [weight.held for layer in residencies(model) if layer.resident for weight in layer.weights]
    assert len(stay) == (2 if part < 1 else 2 * LAYERS)
    assert {lies_in(path, tensor) for tensor in stay} == in_file


def test_sources_over_a_mapped_file_pass_on_that_what_stays_is_owned(path: Path) -> None:
    source = DiskMap(path, mmap=True)
    tied = TiedSource(source, {"head.weight": "0.weight"})
    adapter = torch.zeros(1, WIDTH), torch.zeros(WIDTH, 1)
    for lending in (tied, MergedSource(tied, "1.weight", (adapter,), None)):
        owned = owning(lending)
        for name in ("head.weight", "0.bias", "1.weight"):
            assert torch.equal(owned[name], lending[name])
        assert lending["0.bias"].data_ptr() == lending["0.bias"].data_ptr()
        assert owned["0.bias"].data_ptr() != lending["0.bias"].data_ptr()
        assert owned["head.weight"].data_ptr() != lending["head.weight"].data_ptr()
