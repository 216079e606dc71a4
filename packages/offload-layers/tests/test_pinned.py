"""Page-locked slabs: packed, given back, and done without where there are none."""

import itertools
import logging
import weakref

import pytest
import torch
from offload_layers import _pinned
from offload_layers._pinned import SLAB, PinnedSlabs
from torch import Tensor, nn


class Driver:
    """Gives ordinary memory for page-locked one, and can refuse."""

    def __init__(self) -> None:
        self.slabs: list[weakref.ref[Tensor]] = []
        self.refuses = False

    def __call__(self, nbytes: int) -> Tensor:
        if self.refuses:
            raise RuntimeError("out of page-locked memory\nand more")
        slab = torch.empty(nbytes, dtype=torch.uint8)
        self.slabs.append(weakref.ref(slab))
        return slab


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def slabs(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> PinnedSlabs:
    monkeypatch.setattr(_pinned, "available_ram", lambda: 10 * SLAB)
    return PinnedSlabs(driver)


def test_tensors_lie_in_one_slab(driver: Driver, slabs: PinnedSlabs) -> None:
    tensors = [torch.randn(size) for size in (1, 1000, 77)]
    tensors += [torch.randn(4, 5).T, torch.arange(5), torch.randn(3).bfloat16(), torch.randn(())]
    copies = [slabs.lock(tensor) for tensor in tensors]
    assert len(driver.slabs) == 1
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr()
    ranges = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_a_slab_goes_with_its_last_tensor(driver: Driver, slabs: PinnedSlabs) -> None:
    half = torch.zeros(SLAB // 2 + 1, dtype=torch.uint8)
    first, second = slabs.lock(half), slabs.lock(half)
    storages = [weakref.ref(copy.untyped_storage()) for copy in (first, second)]
    assert len(driver.slabs) == 2
    assert driver.slabs[0]() is None  # nothing holds the slab but the tensor in it
    del first
    assert storages[0]() is None
    assert torch.equal(second, half)


def test_what_cannot_be_locked_is_left_as_it_is(driver: Driver, slabs: PinnedSlabs) -> None:
    large = torch.empty(SLAB + 1, dtype=torch.uint8)
    empty, sparse = torch.empty(0), torch.eye(3).to_sparse()
    for tensor in (large, empty, sparse):
        assert slabs.lock(tensor) is tensor
    assert driver.slabs == []
    parameter = nn.Parameter(torch.ones(3))
    assert torch.equal(slabs.lock(parameter), parameter)


def test_a_driver_that_refuses(driver: Driver, slabs: PinnedSlabs, caplog: pytest.LogCaptureFixture) -> None:
    driver.refuses = True
    tensor = torch.ones(3)
    with caplog.at_level(logging.WARNING, "offload_layers.transfer"):
        assert slabs.lock(tensor) is tensor
    (record,) = caplog.records
    assert record.getMessage() == (
        "the driver gives no page-locked memory (out of page-locked memory); weights in host memory cross to "
        "the device more slowly"
    )
    driver.refuses = False
    assert slabs.lock(tensor) is not tensor


def test_short_memory_is_left_to_others(
    driver: Driver, slabs: PinnedSlabs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pinned, "available_ram", lambda: 2 * SLAB - 1)
    tensor = torch.ones(3)
    assert slabs.lock(tensor) is tensor
    assert driver.slabs == []
