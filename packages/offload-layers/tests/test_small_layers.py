"""The smallest layers keep the copies they compute with, within the limit, and never stale ones."""

import copy
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    disable_vram_management,
    enable_vram_management,
)
from offload_layers.testing import CountingSource, assert_invariants, residencies
from torch import Tensor, nn

WIDTH = 64
NORM_NBYTES = WIDTH * 4
RESTING = ("offload", "onload", "preparing")
DISK: dict[str, Any] = {
    **{f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")},
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.linears = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linears(self.norm(x))  # type: ignore[no-any-return]


def plain() -> nn.Module:
    torch.manual_seed(0)
    block = Block()
    nn.init.uniform_(block.norm.weight)
    return block.requires_grad_(False)


@pytest.fixture
def source() -> CountingSource:
    return CountingSource(plain().state_dict())


@pytest.fixture
def model(source: CountingSource) -> Any:
    faces = {nn.Linear: AutoWrappedLinear, nn.RMSNorm: AutoWrappedModule}
    return enable_vram_management(plain(), faces, DISK, None, source)


def test_only_the_small_one_is_read_once(model: Any, source: CountingSource) -> None:
    for _ in range(4):
        assert torch.equal(model(X), plain()(X))
    assert source.reads.count("norm.weight") == 1
    assert source.reads.count("linears.0.weight") > 2
    assert [r.keeps_staged for r in residencies(model)] == [True] + 8 * [False]
    assert_invariants(model)


def test_the_model_holds_nothing_of_it(model: Any) -> None:
    model(X)
    assert model.norm._parameters["weight"].is_meta
    assert "weight" not in model.norm.__dict__
    assert torch.equal(model.norm.weight, plain().norm.weight)
    assert torch.equal(model.state_dict()["norm.weight"], plain().state_dict()["norm.weight"])


@pytest.mark.parametrize("limit", [0, 1e-9])
def test_a_limit_without_room_keeps_nothing(source: CountingSource, limit: float) -> None:
    faces = {nn.Linear: AutoWrappedLinear, nn.RMSNorm: AutoWrappedModule}
    model = enable_vram_management(plain(), faces, DISK, limit, source)
    lent = residencies(model)[0].budget.statistics().lent_nbytes
    for _ in range(3):
        assert torch.equal(model(X), plain()(X))
    assert source.reads.count("norm.weight") == 3
    assert residencies(model)[0].budget.statistics().lent_nbytes == lent


def test_it_leaves_when_it_is_offloaded_or_room_is_needed(model: Any, source: CountingSource) -> None:
    budget = residencies(model)[0].budget
    model(X)
    lent = budget.statistics().lent_nbytes
    assert residencies(model)[0].try_demote()
    assert budget.statistics().lent_nbytes == lent - NORM_NBYTES
    model.norm(X)
    assert source.reads.count("norm.weight") == 2
    model.norm.offload()
    model.norm(X)
    assert source.reads.count("norm.weight") == 3
    assert_invariants(model)


def test_new_values_are_used(model: Any) -> None:
    oracle: Any = plain()
    for factor in (2.0, 3.0):
        model(X)
        new = {name: factor * tensor for name, tensor in plain().state_dict().items()}
        model.load_state_dict(new)
        oracle.load_state_dict(new)
        assert torch.equal(model(X), oracle(X))


def test_a_change_of_the_copy_is_kept(model: Any) -> None:
    model(X)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    oracle: Any = plain()
    oracle.norm.weight.mul_(2)
    assert torch.equal(model(X), oracle(X))
    assert torch.equal(model(X), oracle(X))


def test_copies_and_the_plain_model_do_not_share_it(model: Any) -> None:
    model(X)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), plain()(X))
    assert residencies(twin)[0].keeps_staged
    disable_vram_management(model, "cpu", torch.float32)
    assert torch.equal(model(X), plain()(X))
    assert type(model.norm) is nn.RMSNorm


def test_gradients_pass_through_it(model: Any) -> None:
    model(X)
    with torch.enable_grad():
        x = X.clone().requires_grad_(True)
        model(x).sum().backward()
        y = X.clone().requires_grad_(True)
        plain()(y).sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_what_was_kept_in_inference_mode_serves_outside_of_it(model: Any) -> None:
    with torch.inference_mode():
        model(X)
    with torch.enable_grad():
        x = X.clone().requires_grad_(True)
        model(x).sum().backward()
    assert x.grad is not None


def test_what_was_read_in_inference_mode_serves_outside_of_it(model: Any) -> None:
    with torch.inference_mode():
        assert model.linears[0].weight.shape == (WIDTH, WIDTH)
    with torch.enable_grad():
        x = X.clone().requires_grad_(True)
        model.linears[0](x).sum().backward()
    assert x.grad is not None
