"""A layer's values in other hands: to be read or overwritten, or copied with the model."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._changes import Fingerprint, checksum, fingerprint
from offload_layers._residency import Residency
from offload_layers._resting import HEIGHT
from offload_layers._schedule import Schedule
from offload_layers._state import State
from offload_layers._transfer import parameter_like
from offload_layers._weight import Slot, Weight


@contextmanager
def opened(residency: Residency, weights: Iterable[Weight], *, read: bool = False) -> Iterator[None]:
    """Let the model hold host tensors at rest for *weights*, to be read or overwritten in the block.

    What was overwritten or assigned is taken over; the others are as before, on disk if they were. What was
    overwritten is taken over by all layers that have the parameter.

    Args:
        residency: The layer.
        weights: Some of its weights.
        read: Fill in the values of weights on disk; otherwise those are uninitialised.
    """
    weights = list(weights)
    tied = {} if read else {weight: residency.tied(weight) for weight in weights}
    layers = {residency, *(layer for others in tied.values() for layer, _ in others)}
    with ExitStack() as stack:
        for layer in sorted(layers, key=id):  # in one order, so that threads do not wait for each other
            stack.enter_context(layer.at_home())
        lent: list[tuple[Weight, nn.Parameter, nn.Parameter, Fingerprint, Tensor | None]] = []
        for weight in weights:
            home = weight.registered
            if home.is_meta:
                values = weight.read(residency.source) if read else _unlikely(home)
                weight.register(parameter_like(home, values))
            values_sum = checksum(weight.registered) if home.is_meta else None
            lent.append((weight, home, weight.registered, fingerprint(weight.registered), values_sum))
        residency.is_open = True
        try:
            yield
        finally:
            residency.is_open = False
            for weight, home, parameter, version, values_sum in lent:
                is_same = weight.held is parameter
                untouched = is_same and fingerprint(parameter) == version
                if untouched and values_sum is not None:  # some overwrite them through ``.data``
                    now = checksum(parameter)
                    untouched = now is not None and torch.equal(values_sum, now)
                residency.settle(weight, home if untouched else weight.held)
                if is_same and not untouched:
                    for layer, other in tied.get(weight, ()):
                        layer.settle(other, weight.registered)


def _unlikely(home: nn.Parameter) -> Tensor:
    """Return host memory for the values of *home*, with values that nobody would load."""
    nbytes = home.numel() * home.element_size()
    filled = torch.full((nbytes,), 0xA5, dtype=torch.uint8, device="cpu")
    return filled.view(home.dtype).view(home.shape)


def copied(residency: Residency, memo: dict[int, Any]) -> Residency:
    """Return the residency of a copied model: own values at rest, the same source and budget."""
    state = residency.state
    with residency.at_home() as home:
        new = memo[id(residency)] = Residency.__new__(Residency)
        new.weights = []
        for weight in residency.weights:
            twin = copy.copy(weight)
            twin.slots, twin.was_moved = [], False
            new.weights.append(twin)
            memo[id(weight)] = twin
        parameters = copy.deepcopy(home, memo)
        for weight, twin, parameter in zip(residency.weights, new.weights, parameters, strict=True):
            twin.slots = [Slot(copy.deepcopy(slot.module, memo), slot.name) for slot in weight.slots]
            twin.register(parameter)
        buffers = [Slot(copy.deepcopy(slot.module, memo), slot.name) for slot in residency.buffers]
        Residency.__init__(
            new,
            residency.name,
            new.weights,
            buffers,
            residency.policy,
            source=residency.source,
            limit=residency.limit,
            budget=residency.own_budget,
            schedule=residency.schedule and memo.setdefault(id(residency.schedule), Schedule()),
        )
        new.keeps_staged = residency.keeps_staged
        new.climb_to(min(state, State.ONLOAD, key=HEIGHT.__getitem__))
        return new
