"""Random models, configurations and actions: whatever is done to a model, it computes as the plain one."""

import copy
import io
import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    disable_vram_management,
    enable_vram_management,
    offload,
)
from offload_layers._placement import GIB
from offload_layers.testing import CountingSource, assert_invariants
from torch import Tensor, nn

WIDTH = 24
F32, BF16 = torch.float32, torch.bfloat16
DISK = ("disk", "disk")


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.shift


class Block(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(WIDTH))
        self.norm = Norm()
        self.up, self.down = nn.Linear(WIDTH, factor * WIDTH), nn.Linear(factor * WIDTH, WIDTH, bias=False)
        self.read = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate * self.down(torch.tanh(self.up(self.norm(x))))
        return x + torch.tanh(nn.functional.linear(x, self.read.weight, self.read.bias))


class Net(nn.Module):
    def __init__(self, blocks: int, factor: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(factor) for _ in range(blocks))

    def tie(self) -> None:
        self.blocks[-1].read.weight = self.blocks[0].read.weight

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        for index in order:
            x = self.blocks[index](x)
        return x


MAP: Any = {nn.Linear: AutoWrappedLinear, Norm: AutoWrappedModule, Block: AutoWrappedNonRecurseModule}


class Run:
    """A plain model, the same model managed in some way, and what can be done to both."""

    def __init__(self, rng: random.Random, device: torch.device) -> None:
        torch.manual_seed(rng.randrange(1 << 30))
        self.rng, self.device = rng, device
        plain = Net(rng.randint(2, 5), rng.choice([1, 2, 4])).requires_grad_(rng.random() < 0.3)
        is_tied = rng.random() < 0.3
        if is_tied:
            plain.tie()
        stored = rng.choice([F32, BF16])
        for parameter in plain.parameters():
            parameter.data = parameter.data.to(stored).to(F32)
        values = {name: p.detach().to(stored) for name, p in plain.named_parameters()}
        values |= dict(plain.named_buffers())
        self.model: Any = copy.deepcopy(plain)
        if rng.random() < 0.7:
            for module in self.model.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        empty = torch.empty_like(p, device="meta")
                        module._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
            if is_tied:
                self.model.tie()
        self.nbytes = sum(4 * p.numel() for p in plain.parameters())
        self.plain = plain.to(device)
        if is_tied:
            plain.tie()  # torch unties parameters on their way to some devices
        source, self.handle = CountingSource(values), None
        if rng.random() < 0.2:
            vram = int(self.taken() + max(self.nbytes * rng.random() * 1.5, 90_000))
            self.handle = offload(self.model, device=device, dtype=F32, vram=vram, ram="1GB", source=source)
        else:
            enable_vram_management(self.model, MAP, self.config(stored), self.limit(), source)

    def config(self, stored: torch.dtype) -> dict[str, Any]:
        there = [(stored, self.device), (F32, self.device)]
        resting = self.rng.choice([DISK, (stored, "cpu")])
        onload = self.rng.choice([resting, (stored, "cpu"), *there])
        preparing = self.rng.choice([onload, *there])
        roles = {"offload": resting, "onload": onload, "preparing": preparing, "computation": there[1]}
        return {
            f"{role}_{what}": value
            for role, placement in roles.items()
            for what, value in zip(("dtype", "device"), placement, strict=True)
        }

    def taken(self) -> int:
        if self.device.type == "cpu":
            return 0
        free, total = torch.get_device_module(self.device).mem_get_info(self.device)
        return int(total - free)

    def limit(self) -> float | None:
        some = (self.taken() + self.rng.random() * 1.3 * self.nbytes) / GIB
        return self.rng.choice([None, 0, some, some])

    @property
    def layers(self) -> list[AutoTorchModule]:
        return [module for module in self.model.modules() if isinstance(module, AutoTorchModule)]

    # -- what is done

    def forward(self) -> None:
        rng, blocks = self.rng, len(self.plain.blocks)
        in_order = rng.random() < 0.7
        order = list(range(blocks)) if in_order else [rng.randrange(blocks) for _ in range(blocks)]
        x = torch.randn(3, WIDTH).to(self.device)
        with_gradients, in_a_stream = rng.random() < 0.25, self.device.type != "cpu" and rng.random() < 0.3
        with torch.set_grad_enabled(with_gradients), ExitStack() as stack:
            if in_a_stream:
                module = torch.get_device_module(self.device)
                module.synchronize()
                stack.callback(module.synchronize)
                stack.enter_context(module.stream(module.Stream(self.device)))
            x.requires_grad_(with_gradients)
            found, expected = self.model(x, order), self.plain(x, order)
            assert torch.equal(found, expected)
            if with_gradients:
                gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
                assert torch.equal(*gradients)

    def move_all(self) -> None:
        for layer in self.layers:
            getattr(layer, self.rng.choice(["offload", "onload", "preparing"]))()

    def move_one(self) -> None:
        getattr(self.rng.choice(self.layers), self.rng.choice(["offload", "onload", "preparing"]))()

    def change_the_limit(self) -> None:
        if self.handle is None:
            for layer in self.layers:
                layer.vram_limit = self.limit()

    def change_a_weight(self) -> None:
        name = self.rng.choice([name for name, _ in self.plain.named_parameters()])
        its, factor = dict(self.model.named_parameters())[name], self.rng.choice([0.5, 2.0])
        if its.is_meta:
            return
        own = self.plain.get_parameter(name)
        own.mul_(factor)
        way = self.rng.randrange(3)
        if way == 0:
            its.mul_(factor)
        elif way == 1:
            its.data.mul_(factor)
        else:
            its.copy_(own.to(its.device, its.dtype))

    def read_a_weight(self) -> None:
        name = self.rng.choice(
            [name for name, part in self.plain.named_modules() if isinstance(part, nn.Linear)]
        )
        weight = self.model.get_submodule(name).weight
        assert torch.equal(weight.to(self.device, F32), self.plain.get_submodule(name).weight)

    def save_and_load(self) -> None:
        found, expected = self.model.state_dict(), self.plain.state_dict()
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.equal(found[name].to("cpu", F32), values.cpu()), name
        torch.save(found, io.BytesIO())
        if self.rng.random() < 0.5:
            self.model.load_state_dict(found)

    def copy(self) -> None:
        if self.handle is None:
            self.model = copy.deepcopy(self.model)

    def take_back(self) -> None:
        plain = disable_vram_management(copy.deepcopy(self.model)).to(self.device, F32)
        x, order = torch.randn(3, WIDTH).to(self.device), list(range(len(self.plain.blocks)))
        assert torch.equal(plain(x, order), self.plain(x, order))


@pytest.mark.parametrize("seed", range(40))
def test_a_managed_model_is_the_plain_one(device: torch.device, seed: int) -> None:
    run = Run(random.Random(seed), device)
    actions: list[Callable[[], None]] = [
        run.move_all,
        run.move_one,
        run.change_the_limit,
        run.change_a_weight,
        run.read_a_weight,
        run.save_and_load,
        run.copy,
        run.take_back,
    ]
    for _ in range(run.rng.randint(3, 12)):
        run.forward()
        if run.rng.random() < 0.6:
            run.rng.choice(actions)()
    assert_invariants(run.model)
