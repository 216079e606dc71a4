"""A device that is full: residents leave, the layer tries once more, then there is a clear error."""

from typing import Any

import pytest
import torch
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    BudgetExceededError,
    State,
    enable_vram_management,
)
from offload_layers._device import OutOfMemory
from offload_layers._placement import GIB
from offload_layers._schedule import _FULL_ROUNDS
from offload_layers.testing import CountingSource, assert_invariants, residencies, with_own_budget
from torch import Tensor, nn

RESTING = ("offload", "onload", "preparing")
DISK: dict[str, Any] = {
    **{f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")},
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}
PREPARING = {**DISK, "preparing_dtype": torch.float32, "preparing_device": "cpu"}
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


@pytest.fixture(params=[DISK, PREPARING], ids=["staged", "resident"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param  # type: ignore[no-any-return]


def test_residents_leave_and_the_transfer_is_tried_again(config: dict[str, Any]) -> None:
    source = CountingSource(plain().state_dict())
    model: Any = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, config, None, source)
    model[0].preparing()
    model[1].preparing()
    source.out_of_memory = 1
    assert torch.equal(model[2](X), plain()[2](X))
    if config is PREPARING:
        assert [layer.state for layer in model] == [State.ONLOAD, State.ONLOAD, State.PREPARING]
    assert torch.equal(model(X), plain()(X))
    assert_invariants(model)


def test_when_that_does_not_help_the_error_says_so(config: dict[str, Any]) -> None:
    source = CountingSource(plain().state_dict())
    model: Any = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, config, None, source)
    lent = residencies(model)[0].budget.statistics().lent_nbytes
    source.out_of_memory = 100
    with pytest.raises(BudgetExceededError) as caught:
        model(X)
    assert str(caught.value).startswith(
        'no memory on cpu for bringing the weights of layer "0", also after every layer that could '
        "leave had left: the device is full."
    )
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value.__cause__, OutOfMemory)
    assert_invariants(model)
    assert residencies(model)[0].budget.statistics().lent_nbytes == lent
    source.out_of_memory = 0
    assert torch.equal(model(X), plain()(X))


class Hungry(nn.Module):
    """A layer whose forward finds the device full as long as one of the *others* stays there."""

    def __init__(self, *others: Any, buffered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.others = list(others)
        self.calls = 0
        if buffered:
            self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if any(other.state is State.PREPARING for other in self.others):
            raise OutOfMemory("the device is full.")
        return x * self.weight


@pytest.mark.parametrize("itself", [DISK, PREPARING], ids=["staged", "resident"])
def test_a_forward_is_run_again_when_others_have_left(itself: dict[str, Any]) -> None:
    linear = nn.Linear(4, 4)
    other = AutoWrappedLinear(linear, **PREPARING, disk_map=dict(linear.state_dict()))
    other.preparing()
    layer = AutoWrappedModule(
        Hungry(other, buffered=False), **itself, disk_map={"weight": torch.full((4,), 2.0)}
    )
    assert torch.equal(layer(X), 2 * X)
    assert layer.calls == 2
    assert other.state is State.ONLOAD
    assert_invariants(nn.ModuleList([layer, other]))


def test_a_forward_that_may_have_written_to_buffers_is_not_run_twice() -> None:
    linear = nn.Linear(4, 4)
    other = AutoWrappedLinear(linear, **PREPARING, disk_map=dict(linear.state_dict()))
    other.preparing()
    layer = AutoWrappedModule(Hungry(other, buffered=True), **DISK, disk_map={"weight": torch.ones(4)})
    with pytest.raises(OutOfMemory):
        layer(X)
    assert layer.calls == 1
    assert_invariants(layer)


def test_a_device_that_is_full_below_the_limit_is_believed_for_a_while() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(*plain(), Hungry(buffered=False), nn.Linear(4, 4))

    before = make()
    faces: dict[type[nn.Module], type] = {nn.Linear: AutoWrappedLinear, Hungry: AutoWrappedModule}
    limit = 4 * 80 / GIB  # two of the linear layers stay, and two pass
    source = CountingSource(before.state_dict())
    model: Any = enable_vram_management(make(), faces, PREPARING, limit, source)
    layers = residencies(model)
    budget = with_own_budget(model)
    assert torch.equal(model(X), before(X))
    model[3].others = [model[0], model[1], model[2], model[4]]
    calls = model[3].calls
    for _ in range(3):
        assert torch.equal(model(X), before(X))
        assert not any(layer.resident for layer in layers if layer.name != "3")
    assert model[3].calls > calls + 3  # run once more after the others had left
    calls = model[3].calls
    for _ in range(3):  # less stays now than the limit allows
        assert torch.equal(model(X), before(X))
    assert model[3].calls == calls + 3
    model[3].others = []
    for _ in range(_FULL_ROUNDS + 1):
        assert torch.equal(model(X), before(X))
    assert [layer.resident for layer in layers].count(True) >= 2
    layers[0].schedule.forget()  # what was fetched ahead
    assert_invariants(model, budget)
