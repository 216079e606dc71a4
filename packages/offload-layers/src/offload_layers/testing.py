"""Helpers for testing this package and sources of one's own.

Nothing here is needed to use the layers.
"""

import dataclasses
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offload_layers._budget import Budget
from offload_layers._device import InUse, OutOfMemory, replaced
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
    """A device's driver for ``Budget``: *taken* bytes are in use, *peak* at most up to now."""

    def __init__(self, taken: int | None = None, peak: int | None = None) -> None:
        self.taken = taken
        self.peak = peak
        self.released = 0

    def in_use(self) -> InUse | None:
        """Return ``taken`` and ``peak``."""
        return None if self.taken is None else InUse(self.taken, self.peak or self.taken)

    def release_cached(self) -> None:
        """Count the call."""
        self.released += 1


class _Block(bytearray):
    """Memory of a ``FakeDevice``, which can be seen to go."""

    def holding(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the tensor that lies here."""
        nbytes = math.prod(shape) * dtype.itemsize
        return torch.frombuffer(self, dtype=torch.uint8)[:nbytes].view(dtype).view(shape)


@dataclasses.dataclass
class _FakeMark:
    time_s: float
    copies: int  # how many were told to the second queue before


class FakeDevice:
    """A device beside the host: memory of some size, a bus of some speed, two queues, and a clock of its own.

    It takes the place of the CPU inside ``with device.installed():``. Time is only counted, never spent. A
    tensor that is copied aside holds NaN until the computation waits for it, so that a missing wait is seen.

    Args:
        nbytes: Size of its memory; None: no end.
        bytes_per_s: Speed of its bus.

    Attributes:
        used_nbytes, peak_nbytes, ever_nbytes: Of its memory, now, at most, and all that was ever given out.
        others_nbytes: Of its memory, what other programs have.
        copied_nbytes: Bytes that have crossed the bus.
    """

    overlaps = True
    is_host = False

    def __init__(self, *, nbytes: int | None = None, bytes_per_s: float = 1e9) -> None:
        self.nbytes = nbytes
        self.bytes_per_s = bytes_per_s
        self.used_nbytes = self.peak_nbytes = self.ever_nbytes = self.copied_nbytes = 0
        self.others_nbytes = 0
        self._computing_s = self._copying_s = 0.0
        self._copies: deque[tuple[weakref.ref[_Block], torch.dtype, Tensor]] = deque()
        self._copies_begun = self._copies_done = 0
        self._lock = threading.RLock()
        self._local = threading.local()

    @contextmanager
    def installed(self) -> Iterator["FakeDevice"]:
        """Let this be the device ``cpu`` in the block."""
        with replaced(torch.device("cpu"), self):
            yield self

    def compute(self, seconds: float) -> None:
        """Tell the device to compute for so long; returns at once."""
        with self._lock:
            self._computing_s += seconds

    @property
    def elapsed_s(self) -> float:
        """When the computation will be done with what it was told."""
        return self._computing_s

    def in_use(self) -> InUse:
        """Return what the attributes say."""
        return InUse(self.used_nbytes, self.peak_nbytes, self.ever_nbytes, self.others_nbytes)

    def release_cached(self) -> None:
        """Do nothing: what is dropped is free at once."""

    def upload(self, tensor: Tensor) -> Tensor:
        """Copy in the current queue."""
        with self._lock:
            self.copied_nbytes += tensor.nbytes
            return self._copy(tensor, tensor.dtype, tensor.nbytes / self.bytes_per_s)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert in the current queue, in no time."""
        return tensor if tensor.dtype == dtype else self._copy(tensor, dtype, 0.0)

    def _copy(self, tensor: Tensor, dtype: torch.dtype, takes_s: float) -> Tensor:
        with self._lock:
            nbytes = tensor.numel() * dtype.itemsize
            if self.nbytes is not None and self.used_nbytes + nbytes > self.nbytes:
                raise OutOfMemory(f"{nbytes} bytes asked for, {self.nbytes - self.used_nbytes} free.")
            block = _Block(max(1, nbytes))
            self.used_nbytes += nbytes
            self.ever_nbytes += nbytes
            self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)
            weakref.finalize(block, self._freed, nbytes)
            there = block.holding(tensor.shape, dtype)
            if getattr(self._local, "is_aside", False):
                self._copying_s += takes_s
                if there.is_floating_point():
                    block[:] = b"\xff" * len(block)  # NaN
                self._copies.append((weakref.ref(block), dtype, tensor.detach()))
                self._copies_begun += 1
            else:
                self._computing_s += takes_s
                there.copy_(tensor.detach())
            return there

    def receive(self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Tensor], object]) -> Tensor:
        """Copy what *fill* writes, in the current queue."""
        buffer = torch.empty(tuple(shape), dtype=dtype)
        fill(buffer)
        return self.upload(buffer)

    def lock(self, tensor: Tensor) -> Tensor:
        """Return *tensor*: all memory of the host is alike here."""
        return tensor

    def reads_in_place(self, tensor: Tensor) -> bool:
        """Say no: what a layer needs is there when it computes, and all computation is done at once."""
        return False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let this thread use the second queue in the block."""
        self._local.is_aside = True
        try:
            yield
        finally:
            self._local.is_aside = False

    def mark(self) -> _FakeMark:
        """Return the end of the current queue."""
        with self._lock:
            if not getattr(self._local, "is_aside", False):
                return _FakeMark(self._computing_s, 0)
            return _FakeMark(self._copying_s, self._copies_begun)

    def wait(self, mark: _FakeMark | None) -> None:
        """Let the computation go on after *mark*: then the copies before it are there."""
        if mark is None:
            return
        with self._lock:
            self._computing_s = max(self._computing_s, mark.time_s)
            while self._copies_done < mark.copies:
                block, dtype, values = self._copies.popleft()
                self._copies_done += 1
                there = block()
                if there is not None:
                    there.holding(values.shape, dtype).copy_(values)

    def let_pass(self, mark: _FakeMark | None) -> None:
        """Do nothing: see `reads_in_place`."""

    def finished(self) -> None:
        """Let the second queue go on after what the computation was told."""
        with self._lock:
            self._copying_s = max(self._copying_s, self._computing_s)

    def computes_here(self) -> None:
        """Do nothing: there is one queue that computes."""

    def record_use(self, tensor: Tensor, *, by_anyone: bool = False) -> None:
        """Do nothing: what Python holds is not used again here."""

    def synchronize(self) -> None:
        """Let both queues be done with what they were told."""
        with self._lock:
            self.wait(_FakeMark(self._copying_s, self._copies_begun))
            self._copying_s = self._computing_s

    def _freed(self, nbytes: int) -> None:
        with self._lock:
            self.used_nbytes -= nbytes


def residencies(model: nn.Module) -> list[Residency]:
    """Return the residency of each managed layer of *model*, in the order of its modules."""
    layers = [m for m in model.modules() if isinstance(m, AutoTorchModule)]
    return [layer._owner() for layer in layers]


def with_own_budget(*models: nn.Module) -> Budget:
    """Give *models* one budget that no other model of this process shares, and return it."""
    layers = [residency for model in models for residency in residencies(model)]
    budget = Budget(layers[0].policy.computation.device)
    for residency in layers:
        residency.own_budget = budget
        budget.register(residency)
    return budget


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
        held += sum(shared.leased_nbytes for shared in {layer._shared for layer in residencies(model)})
        assert budget.statistics().lent_nbytes == held, (budget, held)
