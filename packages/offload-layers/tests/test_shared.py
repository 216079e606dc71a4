"""A parameter of several layers is in each placement once, and a change of it is seen by all of them."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, AutoWrappedModule, enable_vram_management
from offload_layers.testing import CountingSource, FakeDevice, assert_invariants
from torch import Tensor, nn

MAP: dict[Any, Any] = {nn.Linear: AutoWrappedLinear, nn.Embedding: AutoWrappedModule}
X = torch.arange(6)
HALF, FULL = torch.bfloat16, torch.float32


class Model(nn.Module):
    """An embedding that is the head as well, and as large as all else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(x)))  # type: ignore[no-any-return]


def placed(*places: object) -> dict[str, Any]:
    """Return a vram_config from (dtype, device) of offload, onload, preparing and computation."""
    roles = ("offload", "onload", "preparing", "computation")
    settings: dict[str, Any] = {}
    for role, place in zip(roles, places, strict=True):
        dtype, device = ("disk", "disk") if place == "disk" else (place, "cpu")
        settings |= {f"{role}_dtype": dtype, f"{role}_device": device}
    return settings


DISK = placed("disk", "disk", FULL, FULL)
HOST = placed(HALF, HALF, FULL, FULL)


@pytest.fixture
def plain() -> Model:
    torch.manual_seed(0)
    return Model().to(HALF).to(FULL)  # so that halves lose nothing


def stored(plain: Model) -> dict[str, Tensor]:
    return {name: value for name, value in plain.state_dict().items() if name != "head.weight"}


def skeleton() -> Model:
    with torch.device("meta"):
        model = Model()
    model.head.weight = model.embed.weight
    return model


def from_disk(plain: Model) -> Any:
    return enable_vram_management(skeleton(), MAP, DISK, None, CountingSource(stored(plain)))


def from_host(plain: Model) -> Any:
    model = Model()
    model.load_state_dict(plain.state_dict())
    return enable_vram_management(model, MAP, HOST, None)


MAKERS = pytest.mark.parametrize("make", [from_disk, from_host])
Make = Callable[[Model], Any]


@MAKERS
@torch.no_grad()
def test_it_is_on_the_device_once(plain: Model, make: Make) -> None:
    with FakeDevice().installed() as device:
        model = make(plain)
        before = device.used_nbytes
        assert torch.equal(model(X), plain(X))
        assert model.embed.weight is model.head.weight
        assert device.used_nbytes - before == 4 * (100 * 16 + 16 * 16 + 16)
        for layer in (model.embed, model.middle, model.head):
            layer.offload()
        assert device.used_nbytes == before
        assert torch.equal(model(X), plain(X))
    assert_invariants(model)


def test_it_is_read_once(plain: Model) -> None:
    source = CountingSource(stored(plain))
    model: Any = enable_vram_management(skeleton(), MAP, DISK, None, source)
    model(X)
    assert sorted(source.reads) == ["embed.weight", "middle.bias", "middle.weight"]
    model.embed.offload()
    model(X)  # the head has it still
    assert sorted(source.reads) == ["embed.weight", "middle.bias", "middle.weight"]


def test_host_memory_holds_it_once(plain: Model) -> None:
    model = from_host(plain)
    homes = [layer._owner()._tiers.top[0] for layer in (model.embed, model.head)]
    assert homes[0] is homes[1]
    assert homes[0].dtype == HALF


@MAKERS
@torch.no_grad()
def test_a_change_is_seen_by_all(plain: Model, make: Make) -> None:
    model = make(plain)
    model(X)
    for one in (model, plain):
        one.embed.weight.mul_(2)
    assert torch.equal(model(X), plain(X))
    for layer in (model.head, model.embed):
        layer.offload()
    assert torch.equal(model(X), plain(X))
    assert_invariants(model)


@pytest.mark.parametrize("changed", ["embed", "head"])
@torch.no_grad()
def test_a_change_that_is_written_back_is_seen_by_a_layer_that_is_on_disk(plain: Model, changed: str) -> None:
    model = from_disk(plain)
    model(X)
    other = "head" if changed == "embed" else "embed"
    for _ in range(2):
        getattr(model, other).offload()
        for one in (model, plain):
            getattr(one, changed).weight.mul_(2)
        getattr(model, changed).offload()
        assert torch.equal(model.state_dict()[f"{other}.weight"], plain.head.weight)
        assert torch.equal(model(X), plain(X))
        assert model.embed.weight is model.head.weight
    assert_invariants(model)


@MAKERS
@pytest.mark.parametrize("name", ["embed", "head"])
@torch.no_grad()
def test_values_loaded_under_one_name_are_seen_by_all(plain: Model, make: Make, name: str) -> None:
    model = make(plain)
    for at_rest in (True, False, True):
        values = {f"{name}.weight": torch.randn(100, 16).to(HALF).to(FULL)}
        for one in (model, plain):
            one.load_state_dict(values, strict=False)
        assert torch.equal(model(X), plain(X))
        if at_rest:
            model.head.offload()
    assert torch.equal(model.state_dict()["embed.weight"].to(FULL), plain.embed.weight)
    assert torch.equal(model.state_dict()["head.weight"].to(FULL), plain.embed.weight)
    assert_invariants(model)


@torch.no_grad()
def test_a_change_of_a_weight_that_stays_on_disk_is_seen_by_all(plain: Model) -> None:
    model: Any = enable_vram_management(
        skeleton(), MAP, placed("disk", "disk", "disk", FULL), None, CountingSource(stored(plain))
    )
    for name in ("embed", "head"):
        for one in (model, plain):
            getattr(one, name).weight.mul_(2)
        assert torch.equal(model(X), plain(X))
    assert model.embed.weight is model.head.weight
    assert_invariants(model)


def test_another_parameter_ends_the_tie(plain: Model) -> None:
    model = from_disk(plain)
    model(X)
    for one in (model, plain):
        one.embed.weight = nn.Parameter(torch.ones(100, 16))
    assert torch.equal(model(X), plain(X))
    model.embed.offload()
    model.head.offload()
    assert torch.equal(model(X), plain(X))


def test_a_file_with_values_for_each_name_is_believed(plain: Model) -> None:
    both = stored(plain) | {"head.weight": torch.ones(100, 16)}
    model: Any = enable_vram_management(skeleton(), MAP, DISK, None, CountingSource(both))
    untied = Model()
    untied.head.weight = nn.Parameter(torch.empty(100, 16))
    untied.load_state_dict(both)
    for _ in range(2):
        assert torch.equal(model(X), untied(X))


def test_training_reaches_it_from_both_sides(plain: Model) -> None:
    model = enable_vram_management(skeleton(), MAP, placed(*["disk"] * 3, FULL) | {
        "onload_dtype": FULL, "onload_device": "cpu", "preparing_dtype": FULL, "preparing_device": "cpu"
    }, None, CountingSource(stored(plain)))  # fmt: skip
    model(X)
    model.embed.weight.requires_grad_(True)
    for one in (model, plain):
        with torch.enable_grad():
            one(X).sum().backward()
    assert model.embed.weight.grad is not None
    assert torch.equal(model.embed.weight.grad, plain.embed.weight.grad)  # type: ignore[arg-type]


def test_nothing_is_kept_alive(plain: Model) -> None:
    model = from_disk(plain)
    model(X)
    shared = model.embed._owner().schedule.shared
    assert shared._copies
    del model
    gc.collect()
    assert not shared._copies
