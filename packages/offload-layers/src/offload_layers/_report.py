"""What is where, and what it has cost: per layer and in sum."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._budget import Budget
from offload_layers._counters import Counters
from offload_layers._errors import ConfigError
from offload_layers._layers import AutoTorchModule
from offload_layers._managed import ManagedModule
from offload_layers._packed import nbytes
from offload_layers._pictures import plot_report
from offload_layers._residency import Residency
from offload_layers._state import State
from offload_layers._table import table
from offload_layers._tier import Tier


@dataclass(frozen=True)
class LayerReport:
    """One layer. Its counts begin with the model, or with the last ``reset_counters``.

    Attributes:
        name: Dotted name.
        state: Where the configuration says that the weights rest.
        tier: Where they are between calls. On a CPU, which is device and host in one, those that are ready
            to compute with are on the device.
        dtype: In which they are there; of several, all, with a plus between.
        nbytes: Bytes that they take there.
        hits: Calls whose weights were not on the device but ready in time: fetched ahead, or kept.
        waits: Calls whose weights were on their way.
        misses: Calls that had to fetch their weights, as each has on a CPU whose source brings what it reads
            closer by itself.
        waited_s: Seconds that these calls have spent, on the host, with waiting for weights or fetching them.
        moved_nbytes: Bytes moved to the device, as they are stored; also those that were then not used.
    """

    name: str
    state: State
    tier: Tier
    dtype: str
    nbytes: int
    hits: int
    waits: int
    misses: int
    waited_s: float
    moved_nbytes: int


@dataclass(frozen=True)
class Sum:
    """What several layers have in sum; see `LayerReport`."""

    layers: int
    nbytes: int
    hits: int
    waits: int
    misses: int
    waited_s: float
    moved_nbytes: int

    @classmethod
    def of(cls, layers: Sequence[LayerReport]) -> "Sum":
        """Add up."""
        return cls(
            layers=len(layers),
            nbytes=sum(layer.nbytes for layer in layers),
            hits=sum(layer.hits for layer in layers),
            waits=sum(layer.waits for layer in layers),
            misses=sum(layer.misses for layer in layers),
            waited_s=sum(layer.waited_s for layer in layers),
            moved_nbytes=sum(layer.moved_nbytes for layer in layers),
        )


@dataclass(frozen=True)
class Report:
    """All managed layers of a model, in the order in which they are called as far as that is known.

    Attributes:
        layers: One for each.
        device: Where they compute.
        lent_nbytes: Bytes of the device that layers hold now, those of other models in this process included.
        peak_nbytes: The most that it was at once since the process began, or since ``reset_counters``.
        limit_nbytes: Bytes that may be in use; None: no limit.
        unmanaged_nbytes: Bytes of the model's parameters that no layer manages.
    """

    layers: tuple[LayerReport, ...]
    device: torch.device
    lent_nbytes: int
    peak_nbytes: int
    limit_nbytes: int | None
    unmanaged_nbytes: int

    @property
    def total(self) -> Sum:
        """The sums over all layers."""
        return Sum.of(self.layers)

    @property
    def tiers(self) -> dict[Tier, Sum]:
        """The sums over the layers of each tier."""
        return {tier: Sum.of([x for x in self.layers if x.tier is tier]) for tier in Tier}

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON has, with the sums."""
        return {
            "device": str(self.device),
            "limit_nbytes": self.limit_nbytes,
            "lent_nbytes": self.lent_nbytes,
            "peak_nbytes": self.peak_nbytes,
            "unmanaged_nbytes": self.unmanaged_nbytes,
            "total": dataclasses.asdict(self.total),
            "tiers": {tier.value: dataclasses.asdict(its_sum) for tier, its_sum in self.tiers.items()},
            "layers": [
                dataclasses.asdict(layer) | {"state": layer.state.value, "tier": layer.tier.value}
                for layer in self.layers
            ],
        }

    def table(self, top: int = 10) -> str:
        """Return the sums by tier, and the *top* layers that were waited for longest, as text."""
        return table(self, top)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw where the weights are, and which layers waited for them, into a file.

        Raises:
            ConfigError: matplotlib is missing; the extra ``offload-layers[plot]`` has it.
        """
        plot_report(self, path)

    def __str__(self) -> str:
        return self.table()


def report(model: nn.Module) -> Report:
    """Say of each managed layer of *model* where its weights are, and what they have cost.

    Raises:
        ConfigError: the model has no managed layers, or they compute on several devices.
    """
    layers = in_order(managed_layers(model))
    budget = budget_of_layers(model, layers)
    statistics = budget.statistics()
    limits = [layer.limit for layer in layers]
    return Report(
        layers=tuple(_report(layer) for layer in layers if layer.weights),
        device=budget.device,
        lent_nbytes=statistics.lent_nbytes,
        peak_nbytes=statistics.peak_nbytes,
        limit_nbytes=max((limit for limit in limits if limit is not None), default=None),
        unmanaged_nbytes=sum(
            parameter.numel() * parameter.element_size()
            for module in model.modules()
            if not isinstance(module, ManagedModule)
            for parameter in module._parameters.values()
            if parameter is not None
        ),
    )


def reset_counters(model: nn.Module) -> None:
    """Let the counts of all layers of *model* begin at zero, and the device's peak at what is lent now."""
    layers = managed_layers(model)
    for layer in layers:
        layer.counters = Counters()
    budget_of_layers(model, layers).reset_peak()


def managed_layers(model: nn.Module) -> list[Residency]:
    """Return what owns the weights of each managed layer, in the order of the modules."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch.nn.Module; got {type(model).__name__}")
    layers = [module._owner() for module in model.modules() if isinstance(module, AutoTorchModule)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no managed layers; call enable_vram_management on it")
    return layers


def budget_of_layers(model: nn.Module, layers: Iterable[Residency]) -> Budget:
    """Return the one budget of *layers*."""
    budgets = list(dict.fromkeys(layer.budget for layer in layers))
    if len(budgets) > 1:
        devices = ", ".join(str(budget.device) for budget in budgets)
        raise ConfigError(
            f"the layers of {type(model).__name__} compute on {devices}; ask for parts of it on one device"
        )
    return budgets[0]


def in_order(layers: list[Residency]) -> list[Residency]:
    """Return *layers* as they are called; one that was never seen follows its neighbour in the model."""
    theirs = set(layers)
    schedules = dict.fromkeys(layer.schedule for layer in layers if layer.schedule is not None)
    ordered = [layer for schedule in schedules for layer in schedule.called() if layer in theirs]
    seen, before = set(ordered), None
    for layer in layers:
        if layer not in seen:
            ordered.insert(0 if before is None else ordered.index(before) + 1, layer)
        before = layer
    return ordered


def _report(layer: Residency) -> LayerReport:
    counters = layer.counters
    held = layer.between_calls
    tier = _tier(layer, [tensor for _, tensor in held])
    sizes = [w.on_disk(layer.source) if t.is_meta else (t.dtype, nbytes(t)) for w, t in held]
    return LayerReport(
        name=layer.name,
        state=layer.state,
        tier=tier,
        dtype="+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype, _ in sizes)),
        nbytes=sum(its_nbytes for _, its_nbytes in sizes),
        hits=counters.hits,
        waits=counters.waits,
        misses=counters.misses,
        waited_s=counters.waited_s,
        moved_nbytes=counters.moved_nbytes,
    )


def _tier(layer: Residency, held: list[Tensor]) -> Tier:
    computation = layer.policy.computation
    if any(tensor.is_meta for tensor in held):
        return Tier.DISK
    if all(computation.holds(tensor) for tensor in held):
        return Tier.DEVICE
    has_own_memory = computation.device.type != "cpu"
    is_there = has_own_memory and all(tensor.device == computation.device for tensor in held)
    return Tier.DEVICE if is_there else Tier.HOST
