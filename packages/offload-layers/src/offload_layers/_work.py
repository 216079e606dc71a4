"""What a forward on given inputs takes besides the weights: time, and memory for activations."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offload_layers._machine import check_is_there
from offload_layers._probe import release_trials
from offload_layers._source import Source
from offload_layers._timed import seconds_of
from offload_layers._trace import Inputs, trace


@dataclass(frozen=True)
class Work:
    """What a forward takes besides the weights.

    Attributes:
        layer_s: Seconds of computation from the call of each layer to the call of the next one, by name.
        before_s: Seconds before a layer is called at all.
        activations_nbytes: Most bytes that the inputs, and what is computed from them, take at once.
    """

    layer_s: Mapping[str, float]
    before_s: float
    activations_nbytes: int

    @property
    def total_s(self) -> float:
        """Seconds of all computation."""
        return self.before_s + sum(self.layer_s.values())


def measure_work(
    model: nn.Module,
    inputs: Inputs,
    *,
    layers: Sequence[str],
    device: torch.device,
    dtype: torch.dtype | None,
    source: Source | None,
) -> Work:
    """Find out what a forward consists of, and try each kind of operation on *device*; see `trace`.

    It takes several times as long as one block of each kind, since equal operations are tried once.
    """
    check_is_there(device)
    found = trace(model, inputs, layers=layers, device=device, dtype=dtype, source=source)
    try:
        seconds = seconds_of({operation for _, operation in found.calls}, device)
    finally:
        release_trials(device)
    spent: dict[str, float] = defaultdict(float)
    for (layer, operation), count in found.calls.items():
        spent[layer] += count * seconds[operation]
    before = spent.pop("", 0.0)
    return Work(dict(spent), before, found.activations_nbytes)
