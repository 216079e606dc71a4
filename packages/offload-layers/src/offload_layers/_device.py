"""The seam to the device: everything that depends on the vendor is asked for here.

A device computes in one queue and can copy in another one beside it. What is enqueued inside ``aside()``
belongs to the second; a ``Mark`` is a place in a queue, and ``wait`` makes the current queue go on only after
it. A CPU has no queues: what it is told is done when the call returns, and the marks mean nothing.

Note [Memory that two queues use]
    Weights that were fetched aside lie in memory of the copying queue, which may be used for the next copy
    as soon as Python drops them, while the computation that reads them is still enqueued. So before they are
    dropped, the copying queue is made to wait for a mark that the computing queue passes after its last use
    (``finished``). No ``record_stream``: that would delay each reuse until the host asks again. Only what may
    outlive the forward gets it (``record_use``): weights that autograd saves for the backward pass, those
    that somebody reads from outside of their layer, and those that a layer returns or keeps elsewhere. And
    copies through which gradients flow, which lie in memory of the queue that computes: several may share
    them.

Note [Any stream may compute]
    Callers may compute in several streams, each in a thread of its own or not, and tell them to wait for each
    other or not: on a plain model they need not. So everyone who computes with a staged copy lets his stream
    wait for the copy (``wait``), and the copying queue for his stream (``finished``). A resident layer is
    called without a question. So the host waits for the device (``synchronize``) when a layer has become
    resident and before it ceases to be, which is rare; and likewise around each change of values at rest.
    A thread that has read a weight then, and is yet to use it, uses it later than that: so the memory is kept
    for every stream that was seen to compute, and for that of whoever lets go of the weight last
    (``record_use`` of ``by_anyone``): somebody who called nothing but resident layers was never seen.
    Who reads weights from outside of their layer has to ask for each: what is staged for readers is not an
    attribute of its module.

Note [Whoever has weights may change them]
    From page-locked memory a copy engine reads when it gets there, and the host goes on. Whoever then changes
    a weight in place in host memory would change what is computed, or half of it. So the host waits for the
    copies of a layer when that layer ends (``let_pass``): for a copy which the computation that was just told
    needs as well. The copies of the next layers go on meanwhile, and what is changed before these are called
    is fetched anew.

Note [Weights that rest on the device]
    Copies of weights that rest on the device in another dtype are made aside, too, from what the stream of a
    caller may just have written: an optimizer's step, say. So the copying queue first waits for his stream.
    They are made when the layer is called, never ahead of that, and not kept: a change through ``.data``
    leaves no trace there, short of the host waiting for the device. All that is lost is that a conversion,
    which crosses no bus, could have gone on beside a computation.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from offload_layers._fp8 import is_fast, upcast
from offload_layers._pinned import PinnedRing, PinnedSlabs

#: what torch raises when a device has no memory left; torch before 2.5 has it under CUDA's name only
OutOfMemory: type[Exception] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)

Mark = Any

#: for so long the driver is not asked again what others have taken: a question costs as much as a small layer
_DRIVER_S = 0.05
#: of so many streams it is known that they compute; torch itself makes 32 of a kind, given out in turn
_CALLERS = 64


class InUse(NamedTuple):
    """What is taken of a device's memory, in bytes.

    Attributes:
        nbytes: By this process' tensors now.
        peak_nbytes: By them at most, in all the time that the process has run.
        ever_nbytes: All that they were ever given, what was given back included; 0 where that is unknown.
        others_nbytes: By anyone else, as the driver said lately.
    """

    nbytes: int
    peak_nbytes: int
    ever_nbytes: int = 0
    others_nbytes: int = 0


class _ByTorch(NamedTuple):
    """Bytes of torch's caching allocator: of tensors now, at most and ever, and with what is only cached."""

    allocated: int
    peak: int
    ever: int
    reserved: int


class Device(Protocol):
    """What the engine wants from a compute device.

    Attributes:
        overlaps: Whether copies beside the computation cost it nothing. On a CPU they take its cores and its
            memory's bandwidth (measured: reading beside a computation that reads its weights once made it 2.3
            times slower, reading before it 2.0 times).
        is_host: Whether it computes with tensors of the host as they are; then nothing is uploaded.
    """

    overlaps: bool
    is_host: bool

    def in_use(self) -> InUse | None:
        """Return what is taken of the device, by anyone; None where the device cannot tell."""

    def release_cached(self) -> None:
        """Give memory that is only cached back to the device."""

    def upload(self, tensor: Tensor) -> Tensor:
        """Return a copy of a host tensor on the device, in its own dtype, made in the current queue."""

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor on the device in *dtype*, itself if it has it; no gradients flow through it."""

    def receive(
        self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Tensor], object]
    ) -> Tensor | None:
        """Return a tensor on the device of what *fill* writes into a host tensor that it is given.

        None, and *fill* is not called, if there is nothing better than to read and to ``upload``.
        """

    def lock(self, tensor: Tensor) -> Tensor:
        """Return a host tensor in memory from which it crosses fastest, itself if there is none better."""

    def reads_in_place(self, tensor: Tensor) -> bool:
        """Say whether `upload` lets the device read a host tensor where it lies, after it has returned."""

    def computes_here(self) -> None:
        """Be told that the current queue is one that computes."""

    def aside(self) -> AbstractContextManager[None]:
        """What this thread enqueues in the block runs beside the computation."""

    def mark(self) -> Mark:
        """Return the place in the current queue that is passed once all that was enqueued is done."""

    def wait(self, mark: Mark) -> None:
        """Let the current queue go on after *mark* only."""

    def let_pass(self, mark: Mark) -> None:
        """Make the host wait until its queue has passed *mark*."""

    def finished(self) -> None:
        """Let the copying queue go on only after what the computation was told up to now."""

    def record_use(self, tensor: Tensor, *, by_anyone: bool = False) -> None:
        """Keep the memory of *tensor*, once it is dropped, until the current queue is done with it.

        With *by_anyone* until every queue is that computes, and that of whoever lets go of *tensor* last.
        """

    def synchronize(self) -> None:
        """Make the host wait until the device has done all that it was told, in any queue."""


class HostDevice:
    """The CPU as compute device, and devices that share its memory: one queue, and nothing to count."""

    overlaps = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_host = device.type == "cpu"

    def in_use(self) -> InUse | None:
        """Return None: only what the budget has lent counts."""
        return None

    def release_cached(self) -> None:
        """Do nothing: freed host memory needs no second step."""

    def upload(self, tensor: Tensor) -> Tensor:
        """Return *tensor* itself on a CPU, a copy on a device which has its own name for the same memory."""
        return tensor if self.is_host else tensor.to(self._device)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert; eight-bit floats in the fastest way."""
        return upcast(tensor, dtype) if is_fast(tensor, dtype) else tensor.to(dtype)

    def receive(
        self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Tensor], object]
    ) -> Tensor | None:
        """Return None: sources know best how to read into host memory."""
        return None

    def lock(self, tensor: Tensor) -> Tensor:
        """Return *tensor*: it does not cross anything."""
        return tensor

    def reads_in_place(self, tensor: Tensor) -> bool:
        """Say no: whoever reads it reads it at once."""
        return False

    def computes_here(self) -> None:
        """Do nothing."""

    def aside(self) -> AbstractContextManager[None]:
        """Return a block in which nothing is different."""
        return nullcontext()

    def mark(self) -> Mark:
        """Return None."""
        return None

    def wait(self, mark: Mark) -> None:
        """Do nothing."""

    def let_pass(self, mark: Mark) -> None:
        """Do nothing."""

    def finished(self) -> None:
        """Do nothing."""

    def record_use(self, tensor: Tensor, *, by_anyone: bool = False) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class Accelerator:
    """A device with memory and, where torch has them, streams of its own: CUDA, ROCm, XPU, NPU."""

    overlaps = True
    is_host = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._copies: Any = None  # the stream, made when it is first used
        self._making_copies = threading.Lock()
        self._callers: dict[Any, None] = {}  # streams in which somebody computes, the latest last
        self._has_streams = hasattr(self._module, "Stream") and hasattr(self._module, "Event")
        self._others_nbytes, self._ask_driver_at = 0, 0.0
        self._is_silent = False  # the driver does not tell how much is taken
        self._ring = PinnedRing(self._module, device)
        self._slabs = PinnedSlabs()

    def in_use(self) -> InUse | None:
        """Return what torch uses, and beside it what the driver counts as taken by others."""
        now = time.monotonic()
        if now >= self._ask_driver_at:
            if self._is_silent or not self._module.is_available():
                return None
            try:
                free, total = self._module.mem_get_info(self._device)
            except (AttributeError, RuntimeError):  # as that of processors with graphics, or of older torch
                self._is_silent = True
                return None
            self._others_nbytes = max(0, int(total - free - self._by_torch().reserved))
            self._ask_driver_at = now + _DRIVER_S
        by_torch = self._by_torch()
        return InUse(by_torch.allocated, by_torch.peak, by_torch.ever, self._others_nbytes)

    def _by_torch(self) -> "_ByTorch":
        """Return what torch's caching allocator holds, in the fastest way: this is asked for each layer."""
        module, device = self._module, self._device
        if hasattr(module, "memory_stats_as_nested_dict"):
            stats = module.memory_stats_as_nested_dict(device)
            if not stats:  # the device was not used yet
                return _ByTorch(0, 0, 0, 0)
            allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
            ever = allocated.get("allocated", 0)
            return _ByTorch(allocated["current"], allocated["peak"], ever, reserved["current"])
        now = module.memory_allocated(device)
        peak = module.max_memory_allocated(device) if hasattr(module, "max_memory_allocated") else now
        return _ByTorch(now, peak, 0, module.memory_reserved(device))

    def release_cached(self) -> None:
        """Empty torch's caching allocator."""
        self._ask_driver_at = 0.0  # memory was short: what it said is old
        if self._module.is_available() and hasattr(self._module, "empty_cache"):
            self._module.empty_cache()

    def upload(self, tensor: Tensor) -> Tensor:
        """Copy by way of page-locked memory, without making the host wait for the bus."""
        if not self._has_streams or tensor.layout is not torch.strided:
            return tensor.to(self._device)
        if tensor.is_pinned():
            return tensor.to(self._device, non_blocking=True)
        return self._ring.upload(tensor)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert in the current queue."""
        return tensor.to(dtype)

    def receive(
        self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Tensor], object]
    ) -> Tensor | None:
        """Let *fill* write into page-locked memory, from where the bytes cross."""
        return self._ring.receive(shape, dtype, fill) if self._has_streams else None

    def lock(self, tensor: Tensor) -> Tensor:
        """Return a copy in page-locked memory while there is some."""
        return tensor if tensor.is_pinned() or not self._has_streams else self._slabs.lock(tensor)

    def reads_in_place(self, tensor: Tensor) -> bool:
        """Say whether it is page-locked. Classes with operations of their own may not know: then no."""
        is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        return self._has_streams and is_plain and tensor.device.type == "cpu" and tensor.is_pinned()

    def _copying(self) -> Any:
        if self._copies is None:
            with self._making_copies:
                self._copies = self._copies or self._module.Stream(self._device)
        return self._copies

    def computes_here(self) -> None:
        """Remember the current stream."""
        if self._has_streams:
            stream = self._module.current_stream(self._device)
            if stream not in self._callers:
                latest = list(self._callers)[1 - _CALLERS :]
                self._callers = dict.fromkeys([*latest, stream])  # a new one: others may be reading it

    def aside(self) -> AbstractContextManager[None]:
        """Return a block whose work goes to a stream of its own."""
        return self._module.stream(self._copying()) if self._has_streams else nullcontext()

    def mark(self) -> Mark:
        """Return an event of the current stream."""
        if not self._has_streams:
            return None
        event = self._module.Event()
        event.record(self._module.current_stream(self._device))
        return event

    def wait(self, mark: Mark) -> None:
        """Enqueue a wait; the host goes on."""
        if mark is not None:
            self._module.current_stream(self._device).wait_event(mark)

    def let_pass(self, mark: Mark) -> None:
        """Let the host wait for the event."""
        if mark is not None:
            mark.synchronize()

    def finished(self) -> None:
        """See Note [Memory that two queues use]."""
        if self._has_streams:
            self._copying().wait_event(self.mark())

    def record_use(self, tensor: Tensor, *, by_anyone: bool = False) -> None:
        """See Note [Memory that two queues use] and Note [Any stream may compute]."""
        if self._has_streams and tensor.device == self._device:
            current = self._module.current_stream(self._device)
            for stream in {current, *self._callers} if by_anyone else {current}:
                tensor.record_stream(stream)
            if by_anyone:  # a queue of which nothing is known may be about to use it
                weakref.finalize(tensor, self.record_use, tensor.detach()).atexit = False

    def synchronize(self) -> None:
        """Wait for all streams; a device that was not used yet is not started for it."""
        is_started = getattr(self._module, "is_initialized", lambda: True)()
        if is_started and hasattr(self._module, "synchronize"):
            self._module.synchronize(self._device)


def default_device() -> torch.device:
    """Return the first accelerator of this machine, or the CPU if it has none that torch can use."""
    accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
    if accelerator is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not accelerator.is_available():
        return torch.device("cpu")
    return torch.device(accelerator.current_accelerator().type, 0)


def describe(device: torch.device) -> str:
    """Return what is known of *device*, for messages: its name and what it can do."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if module is None or not module.is_available():
        return str(device)
    parts = [str(device)]
    if hasattr(module, "get_device_name"):
        parts.append(module.get_device_name(device))
    capability = module.get_device_capability(device) if hasattr(module, "get_device_capability") else None
    if isinstance(capability, tuple):  # Intel's is a long dict
        parts.append(f"compute capability {'.'.join(map(str, capability))}")
    return ", ".join(parts)


_DEVICES: dict[torch.device, Device] = {}


def device_of(device: torch.device) -> Device:
    """Return the one ``Device`` for *device* in this process."""
    if device not in _DEVICES:
        kind = HostDevice if device.type in ("cpu", "mps") else Accelerator
        _DEVICES.setdefault(device, kind(device))  # another thread may have been faster
    return _DEVICES[device]


@contextmanager
def replaced(device: torch.device, substitute: Device) -> Iterator[None]:
    """Let *substitute* stand for *device* in the block, as tests want it."""
    before = _DEVICES.get(device)
    _DEVICES[device] = substitute
    try:
        yield
    finally:
        if before is None:
            del _DEVICES[device]
        else:
            _DEVICES[device] = before
