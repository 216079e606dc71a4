"""Random sequences of everything that can happen to a managed model, beside a plain one."""

import copy
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    disable_vram_management,
    enable_vram_management,
)
from offload_layers.testing import CountingSource, assert_invariants, residencies
from torch import Tensor, nn

WIDTH = 4
F32 = torch.float32
PLACEMENTS = {"disk": ("disk", "disk"), "cpu": (F32, "cpu"), "double": (torch.float64, "cpu")}
#: offload, onload, preparing; a layer never goes back to disk on its way to computation
PATHS = [
    ("disk", "disk", "disk"),
    ("disk", "disk", "cpu"),
    ("disk", "cpu", "cpu"),
    ("disk", "double", "cpu"),
    ("disk", "double", "double"),
    ("double", "double", "cpu"),
    ("double", "cpu", "cpu"),
    ("cpu", "cpu", "cpu"),
]
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight + self.calls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(WIDTH))
        self.first = nn.Linear(WIDTH, WIDTH)
        self.scale = Scale()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale(self.first(x))) * self.gate  # type: ignore[no-any-return]


class Outer(nn.Module):
    """The managed blocks; a managed model's own root is never a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Net(), Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


def config(path: tuple[str, str, str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"computation_dtype": F32, "computation_device": "cpu"}
    for role, name in zip(("offload", "onload", "preparing"), path, strict=True):
        settings[f"{role}_dtype"], settings[f"{role}_device"] = PLACEMENTS[name]
    return settings


class ManagedBesidePlain(RuleBasedStateMachine):
    @initialize(path=st.sampled_from(PATHS), limit=st.sampled_from([None, 0, 500]))
    def build(self, path: tuple[str, str, str], limit: int | None) -> None:
        torch.manual_seed(0)
        self.plain = Outer().requires_grad_(False)
        self.source = CountingSource(self.plain.state_dict())
        self.module_map = {
            Net: AutoWrappedNonRecurseModule,
            nn.Linear: AutoWrappedLinear,
            Scale: AutoWrappedModule,
        }
        self.model: Any = copy.deepcopy(self.plain)
        self.arguments = (self.module_map, config(path))
        self.on_disk = path[0] == "disk"
        self.manage()
        self.set_limit(limit)

    def manage(self) -> None:
        # what is on disk must be what the model holds; the source is never changed by the model
        tensors = {name: tensor.clone() for name, tensor in self.plain.state_dict().items()}
        self.source = CountingSource(tensors)
        enable_vram_management(self.model, *self.arguments, disk_map=self.source if self.on_disk else None)

    def layers(self) -> list[Any]:
        return [module for module in self.model.modules() if hasattr(module, "offload")]

    @rule()
    def forward(self) -> None:
        assert torch.equal(self.model(X), self.plain(X))

    @rule(number=st.integers(0, 7), action=st.sampled_from(["offload", "onload", "preparing"]))
    def move_one(self, number: int, action: str) -> None:
        getattr(self.layers()[number], action)()

    @rule(action=st.sampled_from(["offload", "onload", "preparing"]))
    def move_all(self, action: str) -> None:
        for layer in self.layers():
            getattr(layer, action)()

    @rule(limit=st.sampled_from([None, 0, 100, 500, 10_000]))
    def set_limit(self, limit: int | None) -> None:
        lent = residencies(self.model)[0].budget.statistics().lent_nbytes
        for residency in residencies(self.model):
            residency.limit = None if limit is None else limit + lent

    @rule(name=st.sampled_from(["a.first", "b.last"]))
    def read_from_outside(self, name: str) -> None:
        ours, theirs = self.model.get_submodule(name), self.plain.get_submodule(name)
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)

    @rule()
    def state_dict(self) -> None:
        ours, theirs = self.model.state_dict(), self.plain.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name].to(F32), theirs[name]) for name in ours)

    @rule(
        names=st.sets(st.sampled_from(["a.gate", "a.first.weight", "b.scale.weight", "b.last.bias"])),
        assign=st.booleans(),
    )
    def load_some(self, names: set[str], assign: bool) -> None:
        new = {name: torch.randn_like(self.plain.get_parameter(name)) for name in sorted(names)}
        for model in (self.model, self.plain):
            model.load_state_dict({n: t.clone() for n, t in new.items()}, strict=False, assign=assign)

    @rule(name=st.sampled_from(["a.first", "b.scale"]))
    def assign_a_parameter(self, name: str) -> None:
        values = torch.randn_like(self.plain.get_submodule(name).weight)
        for model in (self.model, self.plain):
            model.get_submodule(name).weight = nn.Parameter(values.clone(), requires_grad=False)

    @rule(name=st.sampled_from(["a.first", "b.last"]))
    def change_a_resident_weight_in_place(self, name: str) -> None:
        layer = self.model.get_submodule(name)
        if layer._owner().resident:
            layer.weight.mul_(0.5)
            self.plain.get_submodule(name).weight.mul_(0.5)

    @precondition(lambda self: self.on_disk)
    @rule(names=st.sets(st.sampled_from(["a.first.bias", "b.gate", "b.last.weight"]), min_size=1))
    def the_disk_fails_for_a_while(self, names: set[str]) -> None:
        before = copy.deepcopy(self.plain)
        self.source.failing = names
        try:
            ours = self.model(X)
        except OSError:
            # buffers that a part of the forward has written are written on the plain model too
            self.plain = before
            for part in ("a.scale.calls", "b.scale.calls"):
                self.plain.get_buffer(part).copy_(self.model.get_buffer(part))
        else:
            assert torch.equal(ours, self.plain(X))
        finally:
            self.source.failing = set()

    @rule()
    def continue_with_a_copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @rule()
    def give_back_and_manage_again(self) -> None:
        disable_vram_management(self.model, "cpu", F32)
        assert torch.equal(copy.deepcopy(self.model)(X), copy.deepcopy(self.plain)(X))
        self.manage()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "model"):
            assert_invariants(self.model)


TestManagedBesidePlain = ManagedBesidePlain.TestCase
TestManagedBesidePlain.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
