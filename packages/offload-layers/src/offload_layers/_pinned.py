"""Page-locked memory, from which host tensors cross to a device.

A device's copy engine reads page-locked memory only. Copying from any other memory makes the driver copy to
such memory first, piece by piece, while the host waits. So weights that stay in host memory lie in slabs that
are page-locked, as far as there is memory for it. All others cross by way of a ring of two buffers: the host
fills one while the engine empties the other. It holds ``2 * CHUNK`` bytes, whatever the size of a tensor.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError
from offload_layers._machine import available_ram

_log = logging.getLogger("offload_layers.transfer")

#: bytes of one buffer: long enough to keep the bus busy, short enough that the first piece leaves soon
CHUNK = 32 << 20
#: bytes of the largest tensor that is read from disk into one buffer, which then has about as many
LARGEST = 256 << 20

#: bytes of a slab, at least and at most. Torch gives page-locked memory in powers of two, so a tensor alone
#: would waste up to half, as would one in a slab that has just no room for two. So slabs become larger
SLAB, LARGEST_SLAB = 256 << 20, 1 << 30
_ALIGNMENT = 512  # Source: what CUDA's own allocations are aligned to


class PinnedSlabs:
    """Page-locked memory for tensors that wait in host memory.

    A slab is given back when the last tensor in it is gone. When memory runs short there are no more slabs.
    """

    def __init__(self, allocate: Callable[[int], Tensor] | None = None) -> None:
        """Take slabs from *allocate*, which returns so many bytes and raises what torch would."""
        self._allocate = allocate or _page_locked
        self._lock = threading.Lock()
        self._slab: Tensor | None = None
        self._used = 0
        self._total = 0  # bytes of all slabs that there ever were
        self._has_warned = False

    def lock(self, tensor: Tensor) -> Tensor:
        """Return a copy of a host tensor in page-locked memory, or the tensor itself if there is none."""
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        place = self._take(tensor.numel() * tensor.element_size())
        if place is None:
            return tensor
        with torch.no_grad():
            locked = torch.empty(0, dtype=tensor.dtype, device="cpu")
            return locked.set_(place, 0, tensor.shape, _strides(tensor)).copy_(tensor)

    def _take(self, nbytes: int) -> torch.UntypedStorage | None:
        """Return a piece of a slab, as memory of its own: what is saved of it is saved without the others."""
        if not 0 < nbytes <= LARGEST_SLAB:
            return None
        with self._lock:
            start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
            if self._slab is None or start + nbytes > len(self._slab):
                self._slab = self._new_slab(nbytes)
                start = 0
            if self._slab is None:
                return None
            self._used = start + nbytes
            piece: torch.UntypedStorage = self._slab.untyped_storage()[start : start + nbytes]
            return piece

    def _new_slab(self, nbytes: int) -> Tensor | None:
        """Return a slab with room for *nbytes*: at most half of what there is already, if that is enough."""
        least = max(SLAB, 1 << (nbytes - 1).bit_length())
        size = max(least, min(LARGEST_SLAB, 1 << max(0, (self._total // 2).bit_length() - 1)))
        try:
            available = available_ram()  # what is page-locked is lost to everybody else
            if available < 2 * size:  # torch keeps what was given back to it, for whoever wants as much
                release_kept()
                available = available_ram()
            size = size if available >= 2 * size else least
            if available < 2 * size:
                return None
            slab = self._allocate(size)
        except ConfigError:  # the system does not tell how much there is
            return None
        except RuntimeError as error:
            if not self._has_warned:
                self._has_warned = True
                _log.warning("%s; weights in host memory cross to the device more slowly", _reason(error))
            return None
        self._total += size
        return slab


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that torch gives a copy of *tensor*: its own if that has no gaps, nor overlaps."""
    dense = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != dense:
            return torch.empty(tensor.shape, device="meta").stride()
        dense *= size
    return tensor.stride()


def ring_nbytes(largest: int) -> int:
    """Return what the ring holds once tensors of *largest* bytes were read from disk."""
    return 2 * _buffer_nbytes(min(largest, LARGEST))


def _buffer_nbytes(nbytes: int) -> int:
    return max(CHUNK, 1 << (nbytes - 1).bit_length())  # what torch would make of it anyway


def _page_locked(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def release_kept() -> None:
    """Have torch give the system the page-locked memory that nobody uses."""
    release = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    if release is not None and torch.accelerator.is_available():
        release()


def _reason(error: Exception) -> str:
    return f"the driver gives no page-locked memory ({str(error).splitlines()[0]})"


class _Buffer:
    """Page-locked memory for what is on its way to the device."""

    __slots__ = ("emptied", "memory")

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.emptied: Any = None  # event: the engine has read what was in it


class PinnedRing:
    """Two page-locked buffers of one device, which threads borrow in turn.

    While the engine empties one, the next bytes are put into the other: copied from a host tensor, or read
    from disk right away.
    """

    def __init__(
        self, module: Any, device: torch.device, allocate: Callable[[int], Tensor] | None = None
    ) -> None:
        """Serve *device*, of which *module* (``torch.cuda``, ``torch.xpu``) has the streams and events."""
        self._module = module
        self._device = device
        self._allocate = allocate or _page_locked
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(2):
            self._free.put(_Buffer())
        self._is_refused = False

    def upload(self, tensor: Tensor) -> Tensor:
        """Return a copy of *tensor* on the device, which the current stream has when it gets there."""
        if self._is_refused or not tensor.numel():
            return tensor.to(self._device)
        plain = tensor.detach().resolve_conj().resolve_neg()
        strides = None if plain.is_contiguous() else _strides(plain)
        if strides is not None and plain.stride() != strides:
            plain = torch.empty_strided(plain.shape, strides, dtype=plain.dtype).copy_(plain)
        source = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
        target, flat = self._target(tensor.shape, tensor.dtype, strides)
        for start in range(0, len(source), CHUNK):
            piece = source[start : start + CHUNK]
            with self._lent(CHUNK) as buffer:
                if buffer is None:
                    return tensor.to(self._device)
                self._send(buffer, buffer.memory[: len(piece)].copy_(piece), flat[start : start + CHUNK])
        return target

    def receive(
        self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Tensor], object]
    ) -> Tensor | None:
        """Return a device tensor of what *fill* writes into the host tensor that it is given.

        None, and *fill* is not called, if there is no page-locked memory of that size.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if self._is_refused or not 0 < nbytes <= LARGEST:
            return None
        with self._lent(nbytes) as buffer:
            if buffer is None:
                return None
            filled = buffer.memory[:nbytes]
            fill(filled.view(dtype).view(shape))
            target, flat = self._target(shape, dtype)
            self._send(buffer, filled, flat)
        return target

    def _target(
        self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return memory on the device, without gaps, and its bytes."""
        if strides is None:
            target = torch.empty(shape, dtype=dtype, device=self._device)
        else:
            target = torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
        return target, target.as_strided((target.numel(),), (1,)).view(torch.uint8)

    def _send(self, buffer: _Buffer, filled: Tensor, target: Tensor) -> None:
        target.copy_(filled, non_blocking=True)
        event = buffer.emptied = self._module.Event()
        event.record(self._module.current_stream(self._device))

    @contextmanager
    def _lent(self, nbytes: int) -> Iterator[_Buffer | None]:
        """Lend a buffer of at least *nbytes* which the engine has emptied, or None if there is none."""
        buffer = self._free.get()
        try:
            if buffer.emptied is not None:
                buffer.emptied.synchronize()
            has_room = len(buffer.memory) >= nbytes or self._grow(buffer, nbytes)
            yield buffer if has_room else None
        finally:
            self._free.put(buffer)

    def _grow(self, buffer: _Buffer, nbytes: int) -> bool:
        """Give *buffer* memory for *nbytes*, and say whether that was possible."""
        size = _buffer_nbytes(nbytes)
        try:
            if size > CHUNK and available_ram() < 2 * size:
                return False
            with torch.inference_mode(False):  # the next one to fill it may not be in that mode
                buffer.memory = self._allocate(size)
        except ConfigError:  # the system does not tell how much there is
            return False
        except RuntimeError as error:  # the system limits how much may be page-locked
            if size == CHUNK and not self._is_refused:
                self._is_refused = True
                _log.warning(
                    "%s; copies to %s are slower and make the host wait. Raise the limit of locked memory "
                    "(ulimit -l).",
                    _reason(error),
                    self._device,
                )
            return False
        return True
