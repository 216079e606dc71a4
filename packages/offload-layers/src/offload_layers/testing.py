"""Helpers for testing this package and sources of one's own.

Nothing here is needed to use the layers.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from offload_layers._budget import Budget
from offload_layers._device import OutOfMemory
from offload_layers._layers import AutoTorchModule
from offload_layers._residency import Residency


class CountingSource(Mapping[str, Tensor]):
    """A source over a dict: copies what it gives, as a file does, and counts; can be told to fail.

    Attributes:
        reads: Names that were asked for, in order.
        failing: Names whose reading raises ``OSError``.
        out_of_memory: How many readings from now on raise what torch raises when a device is full.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.reads: list[str] = []
        self.failing: set[str] = set()
        self.out_of_memory = 0

    def __getitem__(self, name: str) -> Tensor:
        if name in self.failing:
            raise OSError(f"{name}: the disk is gone")
        if self.out_of_memory:
            self.out_of_memory -= 1
            raise OutOfMemory("the device is full.")
        tensor = self._tensors[name]
        self.reads.append(name)
        return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:  # Mapping would read the tensor to find out
        return name in self._tensors


class FakeMemory:
    """A device's driver for ``Budget``: *taken* bytes belong to other programs."""

    def __init__(self, taken: int | None = None) -> None:
        self.taken = taken
        self.released = 0

    def in_use(self) -> int | None:
        """Return ``taken``."""
        return self.taken

    def release_cached(self) -> None:
        """Count the call."""
        self.released += 1


def residencies(model: nn.Module) -> list[Residency]:
    """Return the residency of each managed layer of *model*, in the order of its modules."""
    layers = [m for m in model.modules() if isinstance(m, AutoTorchModule)]
    return [layer._owner() for layer in layers]


def assert_invariants(model: nn.Module, budget: Budget | None = None) -> None:
    """Raise ``AssertionError`` unless every resting layer of *model* is what its state says.

    Registered weights are in the placement of the state (or still hold host values that the source lacks);
    weights that can be read without a transfer are in the computation placement; nothing is staged; and
    *budget*, if given, has lent exactly what the layers hold.
    """
    held = 0
    for residency in residencies(model):
        if residency.schedule is not None:
            residency.schedule.let_go()
        placement = residency.policy[residency.state]
        for weight in residency.weights:
            parameter = weight.registered
            for slot in weight.slots:
                assert slot.tensor is parameter, weight
                exposed = slot.module.__dict__.get(slot.name)
                assert (exposed is not None) == residency.resident, (weight, residency)
                if exposed is not None:
                    assert residency.policy.computation.holds(exposed), (weight, residency)
            if placement.is_disk:
                assert parameter.is_meta or parameter.device == torch.device("cpu"), (weight, residency)
            else:
                assert placement.holds(parameter), (weight, residency)
        assert residency._users == 0, residency
        assert residency._staged is None, residency
        held += residency.leased_nbytes
    if budget is not None:
        assert budget.statistics().lent_nbytes == held, (budget, held)
