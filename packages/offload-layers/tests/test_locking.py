"""Weights that wait in host memory are moved to memory from which they cross faster: whose, and when."""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, disable_vram_management, enable_vram_management
from offload_layers import _locking as locking
from offload_layers._locking import CROSSINGS, lock_pages
from offload_layers._pinned import PinnedSlabs
from offload_layers.testing import FakeDevice, with_own_budget
from torch import Tensor, nn

WIDTH = 16
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
ROLES = ("offload", "onload", "preparing")
HOST: dict[str, Any] = {
    **{f"{role}_dtype": torch.float32 for role in (*ROLES, "computation")},
    **{f"{role}_device": "cpu" for role in (*ROLES, "computation")},
}
HALF = HOST | {f"{role}_dtype": torch.bfloat16 for role in ROLES}


class Locking(FakeDevice):
    """Has better memory, as long as there is some."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_full = False
        self.locked: set[int] = set()

    def lock(self, tensor: Tensor) -> Tensor:
        if self.is_full:
            return tensor
        better = tensor.detach().clone()
        self.locked.add(better.data_ptr())
        return better

    def has(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() in self.locked


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.arange(12.0).view(3, 4))


# -- whose -------------------------------------------------------------------------------------------


def test_a_parameter_stays_the_same_object_with_the_same_values() -> None:
    device, its = Locking(), parameter()
    before, version = its.data_ptr(), its._version
    assert lock_pages(its, device)
    assert device.has(its)
    assert its.data_ptr() != before
    assert its._version == version
    assert its.requires_grad
    assert torch.equal(its, parameter())


@pytest.mark.parametrize("kind", ["detached", "view", "slice", "state dict", "saved for backward"])
def test_memory_that_somebody_else_has_stays_where_it_is(kind: str) -> None:
    device, its = Locking(), parameter()
    other: Any = {
        "detached": lambda: its.detach(),
        "view": lambda: its.view(-1),
        "slice": lambda: its[1],
        "state dict": lambda: nn.ParameterDict({"its": its}).state_dict(),
        "saved for backward": lambda: torch.enable_grad()(torch.mul)(its, its.detach()),
    }[kind]()
    before = its.data_ptr()
    assert not lock_pages(its, device)
    assert its.data_ptr() == before
    del other
    gc.collect()
    assert lock_pages(its, device)


@pytest.mark.parametrize("kind", ["shared", "part of something", "inference", "other class", "meta"])
def test_what_cannot_be_moved_stays(kind: str) -> None:
    class Other(nn.Parameter):
        pass

    def inference() -> nn.Parameter:
        with torch.inference_mode():
            return parameter()

    its = {
        "shared": lambda: nn.Parameter(torch.ones(3).share_memory_()),
        "part of something": lambda: nn.Parameter(whole[1:3]),
        "inference": inference,
        "other class": lambda: Other(torch.ones(3)),
        "meta": lambda: nn.Parameter(torch.ones(3, device="meta")),
    }
    whole = torch.ones(10)
    assert not lock_pages(its[kind](), Locking())


def test_memory_that_was_exported_stays_where_it_is() -> None:
    its = parameter()
    capsule = torch.utils.dlpack.to_dlpack(its)
    assert not lock_pages(its, Locking())
    del capsule
    assert lock_pages(its, Locking())


def test_without_a_count_of_who_has_memory_nothing_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert not locking._is_alone(parameter())


# -- when --------------------------------------------------------------------------------------------


@pytest.fixture
def bus() -> Iterator[Locking]:
    bus = Locking()
    with bus.installed():
        yield bus


def managed(config: dict[str, Any], limit: float | None = 0, *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))).requires_grad_(False)
    if tied:
        model[3].weight = model[0].weight
    if config is HALF:
        model.to(torch.bfloat16)
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config, limit)
    with_own_budget(model)
    return model


def at_rest(model: Any) -> list[Tensor]:
    return [layer._owner().weights[0].registered for layer in model]


@pytest.mark.parametrize("limit", [0, None])
def test_weights_are_moved_when_they_have_crossed_several_times(bus: Locking, limit: float | None) -> None:
    model = managed(HALF, limit)
    expected, before = model(X), at_rest(model)
    for _ in range(CROSSINGS - 2):
        model(X)
        assert not bus.locked
    for _ in range(3):
        assert torch.equal(model(X), expected)
        assert all(bus.has(weight) for weight in at_rest(model))
        assert len(bus.locked) == 4
    assert [id(weight) for weight in at_rest(model)] == [id(weight) for weight in before]


def test_what_others_have_is_moved_by_none(bus: Locking) -> None:
    model = managed(HALF, tied=True)
    state = {"1.weight": model[1].state_dict()["weight"]}
    for _ in range(CROSSINGS + 1):
        model(X)
    moved = [bus.has(weight) for weight in at_rest(model)]
    assert moved == [False, False, True, False]
    assert torch.equal(state["1.weight"], model.state_dict()["1.weight"])
    assert at_rest(model)[0] is at_rest(model)[3]


def test_no_memory_for_it_is_no_error(bus: Locking) -> None:
    bus.is_full = True
    model = managed(HALF)
    for _ in range(CROSSINGS + 1):
        model(X)
    assert not bus.locked


def test_what_is_resident_or_on_this_processor_is_not_moved(bus: Locking) -> None:
    model = managed(HOST, None)
    for _ in range(CROSSINGS + 1):
        model(X)
    assert not bus.locked


def test_weights_that_were_moved_can_be_changed_and_are_given_back(bus: Locking) -> None:
    model = managed(HALF)
    for _ in range(CROSSINGS):
        model(X)
    expected = 2 * model(X)
    with torch.no_grad():
        at_rest(model)[1].mul_(2)
    assert torch.equal(model(X), expected)
    model[2].load_state_dict({"weight": torch.eye(WIDTH, dtype=torch.bfloat16)})
    changed = model(X)
    assert not torch.equal(changed, expected)
    disable_vram_management(model)
    assert torch.equal(model.float()(X), changed)


def test_what_others_had_at_first_is_moved_later(bus: Locking) -> None:
    model = managed(HALF)
    state = model.state_dict()
    for _ in range(CROSSINGS + 1):
        model(X)
    assert not bus.locked
    del state
    for _ in range(CROSSINGS - 1):
        model(X)
    assert len(bus.locked) == 4


def test_what_is_saved_or_given_back_has_no_part_of_a_slab(bus: Locking, tmp_path: Path) -> None:
    slabs = PinnedSlabs(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    bus.lock = slabs.lock  # type: ignore[method-assign]
    model = managed(HALF)
    for _ in range(CROSSINGS):
        model(X)
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in at_rest(model))
    torch.save(model.state_dict(), tmp_path / "saved.pt")
    assert (tmp_path / "saved.pt").stat().st_size < 100_000
    before = [weight.data_ptr() for weight in at_rest(model)]
    disable_vram_management(model)
    assert not {weight.data_ptr() for weight in model.parameters()} & set(before)


# -- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_a_gpu_weights_are_page_locked_and_may_be_changed_at_once(accelerator: torch.device) -> None:
    torch.manual_seed(0)
    width = 4096  # so that a copy takes longer than a call
    plain = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(6))).requires_grad_(False)
    model, x = copy.deepcopy(plain), torch.randn(8, width, device=accelerator)
    config = HOST | {"computation_device": accelerator}
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config, 0)
    plain.to(accelerator)
    for _ in range(CROSSINGS + 1):
        expected = plain(x)
        assert torch.equal(model(x), expected)
    assert all(weight.is_pinned() for weight in at_rest(model))
    for _ in range(3):
        torch.get_device_module(accelerator).synchronize()
        out = model(x)
        for weight in at_rest(model):  # while the device is still at work
            weight.zero_()
        assert torch.equal(out, expected)
        model.load_state_dict(plain.state_dict())
