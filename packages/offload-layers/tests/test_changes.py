"""Changes of weights that torch does not count: through the ``.data`` of what the model holds at rest."""

import copy
import pickle
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, AutoWrappedModule, enable_vram_management
from offload_layers.testing import CountingSource, FakeDevice, residencies, with_own_budget
from torch import Tensor, nn

WIDTH = 64
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
FACES = {nn.Linear: AutoWrappedLinear, nn.RMSNorm: AutoWrappedModule}
HALF: dict[str, Any] = {
    **{f"{role}_dtype": torch.bfloat16 for role in ("offload", "onload", "preparing")},
    "computation_dtype": torch.float32,
    **{f"{role}_device": "cpu" for role in ("offload", "onload", "preparing", "computation")},
}


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(12)]
    return nn.Sequential(*blocks).to(torch.bfloat16).requires_grad_(False)


def managed() -> Any:
    return enable_vram_management(plain(), FACES, HALF)


def halve(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def test_copies_that_are_kept_are_made_anew() -> None:
    model, oracle = managed(), plain().float()
    assert torch.equal(model(X), oracle(X))
    kept = [layer for layer in residencies(model) if layer.keeps_staged]
    assert kept
    for _ in range(2):
        halve(model)
        halve(oracle)
        before = [layer.counters.misses for layer in kept]
        assert torch.equal(model(X), oracle(X))
        assert torch.equal(model(X), oracle(X))
        assert [layer.counters.misses for layer in kept] == [misses + 1 for misses in before]


def test_what_was_fetched_ahead_is_fetched_anew() -> None:
    with FakeDevice().installed():
        model, oracle = managed(), plain().float()
        with_own_budget(model)
        schedule = residencies(model)[0].schedule
        assert schedule is not None
        model(X)  # in which the order is learned
        for _ in range(3):
            assert torch.equal(model(X), oracle(X))
            schedule.prefetcher.settle()
            assert schedule.prefetcher.ahead_nbytes() > 0  # of the next forward
            halve(model)
            halve(oracle)
        assert torch.equal(model(X), oracle(X))


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["onload", "preparing"])
def test_weights_that_rest_on_the_device_in_another_dtype(accelerator: torch.device, where: str) -> None:
    roles = ("preparing",) if where == "preparing" else ("onload", "preparing")
    config = HALF | {f"{role}_device": accelerator for role in (*roles, "computation")}
    model: Any = enable_vram_management(plain(), FACES, config)
    oracle, x = plain().float().to(accelerator), X.to(accelerator)
    for _ in range(4):
        assert torch.equal(model(x), oracle(x))
        halve(model)
        halve(oracle)


def test_a_change_through_what_was_taken_long_before() -> None:
    model, oracle = managed(), plain().float()
    values, its = ([parameter.data for parameter in m.parameters()] for m in (model, oracle))
    for _ in range(2):
        assert torch.equal(model(X), oracle(X))
        for tensor in (*values, *its):
            tensor.mul_(0.5)
    assert torch.equal(model(X), oracle(X))


def test_new_data_may_lie_where_the_old_ones_lay() -> None:
    model = enable_vram_management(nn.Sequential(nn.RMSNorm(1 << 16, dtype=torch.bfloat16)), FACES, HALF)
    (parameter,) = model.parameters()
    x = torch.ones(1, 1 << 16)
    for factor in range(1, 12):
        for other in (100.0, 0.0):
            parameter.data = torch.full_like(parameter, factor + other)
        assert torch.allclose(model(x), factor * x, rtol=1e-2)


def test_a_change_of_nothing_but_the_order_is_seen() -> None:
    model, oracle = managed(), plain().float()
    for _ in range(3):
        for module in (model, oracle):
            for parameter in module.parameters():
                parameter.data.copy_(parameter.data.flip(0).clone())
        assert torch.equal(model(X), oracle(X))


def test_parameters_at_rest_are_what_they_were() -> None:
    model = managed()
    before = list(model.parameters())
    for _ in range(3):
        model(X)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert {type(parameter) for parameter in before} == {nn.Parameter}
    assert not any(vars(parameter) for parameter in before)
    assert torch.equal(nn.Parameter(before[0], requires_grad=False), before[0])
    twin, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(X), model(X))
    assert torch.equal(read.float()(X), plain().float()(X))


class Overwriting(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._parameters["weight"].data.copy_(state_dict[prefix + "weight"])  # type: ignore[union-attr]


@pytest.mark.parametrize("disk", [False, True])
def test_a_module_may_load_its_weights_through_data(disk: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Overwriting(WIDTH, WIDTH, bias=False)).requires_grad_(False)
    source = CountingSource(copy.deepcopy(model.state_dict()))
    roles = ("offload", "onload", "preparing")
    at_rest = {f"{role}_{what}": "disk" for role in roles for what in ("dtype", "device")}
    config = HALF | {f"{role}_dtype": torch.float32 for role in roles} | (at_rest if disk else {})
    enable_vram_management(model, {Overwriting: AutoWrappedModule}, config, None, source if disk else None)
    model(X)
    new = {"0.weight": torch.eye(WIDTH)}
    model.load_state_dict(new)
    assert torch.equal(model(X), X)
    assert torch.equal(model.state_dict()["0.weight"], new["0.weight"])


def test_reading_data_does_not_move_a_weight_from_disk_to_memory() -> None:
    model = plain()
    source = CountingSource(copy.deepcopy(model.state_dict()))
    roles = ("offload", "onload", "preparing")
    config = HALF | {f"{role}_{what}": "disk" for role in roles for what in ("dtype", "device")}
    enable_vram_management(model, FACES, config, None, source)
    for parameter in model.parameters():
        _ = parameter.data
    values: list[Tensor] = [layer.weight.data for block in model for layer in block]
    assert values
    model(X)
    assert all(parameter.is_meta for parameter in model.parameters())


class Looking(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = prefix + "weight"
        state_dict[name] = state_dict[name].to(self._parameters["weight"].data.dtype)  # type: ignore[union-attr]
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_load_that_is_refused_changes_nothing_of_a_weight_on_disk() -> None:
    model: Any = nn.Sequential(Looking(WIDTH, WIDTH, bias=False)).requires_grad_(False)
    source = CountingSource(copy.deepcopy(model.state_dict()))
    roles = ("offload", "onload", "preparing")
    config = HALF | {f"{role}_{what}": "disk" for role in roles for what in ("dtype", "device")}
    enable_vram_management(model, {Looking: AutoWrappedModule}, config, None, source)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.zeros(WIDTH + 1, WIDTH)})
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.state_dict()["0.weight"], source["0.weight"])
    model.load_state_dict({"0.weight": torch.eye(WIDTH)})
    assert torch.equal(model(X), X)
