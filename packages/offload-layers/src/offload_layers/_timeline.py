"""What happens on the device while a model runs: the bytes that layers hold there, and who computes when."""

import dataclasses
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn

from offload_layers._around import Forward, around_forward
from offload_layers._layers import AutoTorchModule
from offload_layers._pictures import plot_timeline
from offload_layers._report import budget_of_layers, managed_layers
from offload_layers._residency import Residency


@dataclass(frozen=True, slots=True)
class Sample:
    """What holds weights after one change.

    Attributes:
        time_s: Seconds since the recording began.
        lent_nbytes: Bytes of the device that layers hold, those of other models in this process included.
        resident_nbytes: Of these, the bytes of those that stay between calls.
        host_nbytes: Bytes of host memory in which weights of this model wait, as last seen: at each call of a
            layer, and at the end.
    """

    time_s: float
    lent_nbytes: int
    resident_nbytes: int
    host_nbytes: int


@dataclass(frozen=True, slots=True)
class Interval:
    """One call of a layer, in seconds on the host since the recording began.

    A device with a queue of its own computes later than the host calls.

    Attributes:
        name: Dotted name of the layer.
        begin_s: When it was called.
        end_s: When the call returned.
        waited_s: Seconds at its beginning that it has spent with waiting for weights or fetching them.
        depth: How many layers' calls it is inside of.
    """

    name: str
    begin_s: float
    end_s: float
    waited_s: float
    depth: int


@dataclass
class Timeline:
    """A recording; see `recording`.

    Attributes:
        device: Where the layers compute.
        limit_nbytes: Bytes that may be in use there; None: no limit.
        samples: The bytes held there and in host memory, after each change.
        intervals: The calls of the layers of this model, in the order in which they ended.
    """

    device: torch.device
    limit_nbytes: int | None
    samples: list[Sample] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)

    @property
    def peak_nbytes(self) -> int:
        """The most that layers held at once."""
        return max((sample.lent_nbytes for sample in self.samples), default=0)

    @property
    def host_peak_nbytes(self) -> int:
        """The most that waited in host memory at once."""
        return max((sample.host_nbytes for sample in self.samples), default=0)

    @property
    def duration_s(self) -> float:
        """Seconds from the first sample to the last."""
        return self.samples[-1].time_s if self.samples else 0.0

    @property
    def waited_s(self) -> float:
        """Seconds of all calls together that were spent with waiting for weights or fetching them."""
        return sum(interval.waited_s for interval in self.intervals)

    def to_dict(self) -> dict[str, Any]:
        """Return the recording in types that JSON has."""
        return {
            "device": str(self.device),
            "limit_nbytes": self.limit_nbytes,
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
            "intervals": [dataclasses.asdict(interval) for interval in self.intervals],
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the memory of the device and of the host, and the calls, over time into a file.

        Raises:
            ConfigError: matplotlib is missing; the extra ``offload-layers[plot]`` has it.
        """
        plot_timeline(self, path)


@contextmanager
def recording(model: nn.Module) -> Iterator[Timeline]:
    """Record, in the block, what the layers of *model* hold of their device, and when they compute.

    Outside of the block nothing is recorded, and that costs nothing.

    Raises:
        ConfigError: the model has no managed layers, or they compute on several devices.
    """
    layers = managed_layers(model)
    budget = budget_of_layers(model, layers)
    limits = [layer.limit for layer in layers if layer.limit is not None]
    timeline = Timeline(budget.device, max(limits, default=None))
    memory = _Memory(timeline, layers)
    calls = _Calls(timeline, memory)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, AutoTorchModule) and module._owner().weights:
                watched = functools.partial(calls.watch, module._owner())
                stack.enter_context(around_forward(module, watched))
        calls.start = memory.start = perf_counter()
        with budget.telling(memory.changed):
            yield timeline
            for layer in layers:
                memory.look(layer)


class _Memory:
    """Writes down what the budget tells of the device, and what layers hold in host memory."""

    def __init__(self, timeline: Timeline, layers: list[Residency]) -> None:
        self.start = 0.0
        self._samples = timeline.samples
        self._host = {layer: layer.host_nbytes for layer in layers}
        self._host_nbytes = sum(self._host.values())
        self._device = (0, 0)
        self._lock = threading.Lock()

    def changed(self, lent_nbytes: int, resident_nbytes: int) -> None:
        with self._lock:
            self._device = lent_nbytes, resident_nbytes
            self._write()

    def look(self, layer: Residency) -> None:
        nbytes = layer.host_nbytes
        if nbytes != self._host[layer]:
            with self._lock:
                self._host_nbytes += nbytes - self._host[layer]
                self._host[layer] = nbytes
                self._write()

    def _write(self) -> None:
        self._samples.append(Sample(perf_counter() - self.start, *self._device, self._host_nbytes))


class _Calls:
    """Writes down the calls of layers."""

    def __init__(self, timeline: Timeline, memory: _Memory) -> None:
        self.start = 0.0
        self._timeline = timeline
        self._memory = memory
        self._local = threading.local()

    def watch(self, layer: Residency, forward: Forward, args: Any, kwargs: Any) -> Any:
        depth = getattr(self._local, "depth", 0)
        waited_s, begin = layer.counters.waited_s, perf_counter()
        self._local.depth = depth + 1
        try:
            return forward(*args, **kwargs)
        finally:
            end = perf_counter()
            self._local.depth = depth
            self._memory.look(layer)
            interval = Interval(
                name=layer.name,
                begin_s=begin - self.start,
                end_s=end - self.start,
                waited_s=layer.counters.waited_s - waited_s,
                depth=depth,
            )
            self._timeline.intervals.append(interval)
