"""A device that is really full, and what escapes from it: on one whose size can be chosen."""

import copy
import gc
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, AutoWrappedModule, enable_vram_management
from offload_layers._placement import GIB
from offload_layers.testing import residencies
from torch import Tensor, nn

pytestmark = pytest.mark.cuda
WIDTH, MB = 1024, 1 << 20  # so that a layer has 4 MB
MAP: Any = {nn.Linear: AutoWrappedLinear}


def config(device: torch.device, preparing: Any = "cpu") -> dict[str, Any]:
    places = {"offload": "cpu", "onload": "cpu", "preparing": preparing, "computation": device}
    return {f"{role}_dtype": torch.float32 for role in places} | {f"{r}_device": d for r, d in places.items()}


def linears(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))).requires_grad_(False)


class Room:
    """As much memory of the device as a test wants."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._module = device, torch.get_device_module(device)
        self.all_of_it()

    def leave(self, nbytes: int) -> None:
        self._module.empty_cache()
        self._module.resize(self._module.memory_allocated() + nbytes, others_nbytes=0)

    @property
    def nbytes(self) -> int:
        return int(self._module.mem_get_info()[1])

    def all_of_it(self) -> None:
        gc.collect()
        self._module.resize()


@pytest.fixture
def room(accelerator: torch.device) -> Any:
    if accelerator.type != "simulated":
        pytest.skip("the memory of a real device is what it is")
    room = Room(accelerator)
    yield room
    room.all_of_it()


def test_what_was_fetched_ahead_makes_room(room: Room) -> None:
    plain = linears(6)
    model = enable_vram_management(copy.deepcopy(plain), MAP, config(room.device))
    room.leave(24 * MB)
    for rows in (256, 256, 1280, 1280):  # the last ones need 19 MB, and 8 MB are ahead
        x = torch.randn(rows, WIDTH)
        there = x.to(room.device)
        assert torch.equal(model(there).cpu(), plain(x))
        del there


def test_an_adapter_makes_room_or_leaves_everything_as_it_was(room: Room) -> None:
    x = torch.randn(64, WIDTH).to(room.device)
    model: Any = enable_vram_management(linears(5), MAP, config(room.device, room.device))
    expected = model(x)
    assert all(layer.resident for layer in residencies(model))
    room.leave(3 * MB // 2)
    model[2].add_lora(torch.zeros(256, WIDTH), torch.zeros(WIDTH, 256))  # 1 MB each
    assert len(model[2].lora_A_weights) == len(model[2].lora_B_weights) == 1
    assert torch.equal(model(x), expected)


class Scaled(nn.Module):
    """A layer with a buffer, and much memory beside its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(x) * self.scale] * 4, 1)[:, :WIDTH].clone()


def test_a_layer_that_may_not_run_twice_makes_room_for_the_next_forward(room: Room) -> None:
    plain = nn.Sequential(*linears(4), Scaled(), *linears(1)).requires_grad_(False)
    layers = MAP | {Scaled: AutoWrappedModule}
    settings = config(room.device, room.device)
    room.leave(30 * MB)
    model = enable_vram_management(copy.deepcopy(plain), layers, settings, room.nbytes / GIB)
    few, many = torch.randn(16, WIDTH), torch.randn(640, WIDTH)
    for _ in range(2):
        assert torch.equal(model(few.to(room.device)).cpu(), plain(few))
    with pytest.raises(torch.OutOfMemoryError):
        model(many.to(room.device))
    gc.collect()
    assert torch.equal(model(many.to(room.device)).cpu(), plain(many))


class Returning(nn.Module):
    """A layer that returns its own weight, or keeps a part of it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.mean = way, nn.Parameter(torch.randn(8))

    def forward(self) -> Tensor:
        if self.way == "itself":
            return self.mean
        if self.way == "a view":
            return self.mean.view(2, -1).view(-1)
        self.kept = self.mean.view(2, -1)
        return self.mean * 1


class Centred(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.statistics, self.linear = Returning(way), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.statistics()
        if self.statistics.way == "kept":
            x = x + self.statistics.kept.view(-1)
        return self.linear(x)


@pytest.mark.parametrize("way", ["itself", "a view", "kept"])
def test_a_weight_may_leave_its_layer(accelerator: torch.device, way: str) -> None:
    model: Any = Centred(way).requires_grad_(False)
    plain = copy.deepcopy(model).to(accelerator)
    enable_vram_management(model, MAP | {Returning: AutoWrappedModule}, config(accelerator))
    x = torch.randn(3, 8).to(accelerator)
    for _ in range(3):
        assert torch.equal(model(x), plain(x))
