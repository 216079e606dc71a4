"""Page-locked memory, from which host tensors cross to a device.

A device's copy engine reads page-locked memory only. Copying from any other memory makes the driver copy to
such memory first, piece by piece, while the host waits. So weights that stay in host memory lie in slabs that
are page-locked, as far as there is memory for it. All others cross by way of a ring of two buffers: the host
fills one while the engine empties the other. It holds ``2 * CHUNK`` bytes, whatever the size of a tensor.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError
from offload_layers._machine import available_ram

_log = logging.getLogger("offload_layers.transfer")

#: bytes of one buffer: long enough to keep the bus busy, short enough that the first piece leaves soon
CHUNK = 32 << 20


#: bytes of one slab: torch gives page-locked memory in powers of two, a tensor alone would waste up to half
SLAB = 256 << 20
_ALIGNMENT = 512  # Source: what CUDA's own allocations are aligned to


class PinnedSlabs:
    """Page-locked memory for tensors that wait in host memory.

    A slab is given back when the last tensor in it is gone. When memory runs short there are no more slabs.
    """

    def __init__(self, allocate: Callable[[int], Tensor] | None = None) -> None:
        """Take slabs from *allocate*, which returns so many bytes and raises what torch would."""
        self._allocate = allocate or (lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
        self._lock = threading.Lock()
        self._slab: Tensor | None = None
        self._used = 0

    def lock(self, tensor: Tensor) -> Tensor:
        """Return a copy of a host tensor in page-locked memory, or the tensor itself if there is none."""
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        place = self._take(tensor.numel() * tensor.element_size())
        if place is None:
            return tensor
        with torch.no_grad():
            return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _take(self, nbytes: int) -> Tensor | None:
        if not 0 < nbytes <= SLAB:
            return None
        with self._lock:
            start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
            if self._slab is None or start + nbytes > SLAB:
                self._slab = self._new_slab()
                start = 0
            if self._slab is None:
                return None
            self._used = start + nbytes
            return self._slab[start : start + nbytes]

    def _new_slab(self) -> Tensor | None:
        try:
            if available_ram() < 2 * SLAB:  # what is page-locked is lost to everybody else
                return None
            return self._allocate(SLAB)
        except ConfigError:  # the system does not tell how much there is
            return None
        except RuntimeError as error:
            _log.warning("%s; weights in host memory cross to the device more slowly", _reason(error))
            return None


def _reason(error: Exception) -> str:
    return f"the driver gives no page-locked memory ({str(error).splitlines()[0]})"


class PinnedRing:
    """Two page-locked buffers of one device; threads take turns."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module  # torch.cuda, torch.xpu ...
        self._device = device
        self._lock = threading.Lock()
        self._buffers: list[Tensor] | None = None
        self._emptied: list[Any] = [None, None]  # events: the engine has read the buffer
        self._turn = 0
        self._is_refused = False

    def upload(self, tensor: Tensor) -> Tensor:
        """Return a copy of *tensor* on the device, which the current stream has when it gets there."""
        buffers = self._get_buffers()
        if buffers is None or not tensor.numel():
            return tensor.to(self._device)
        source = tensor.detach().contiguous().view(-1).view(torch.uint8)
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        flat = target.view(-1).view(torch.uint8)
        for start in range(0, len(source), CHUNK):
            piece = source[start : start + CHUNK]
            with self._lock:
                turn, self._turn = self._turn, 1 - self._turn
                if self._emptied[turn] is not None:
                    self._emptied[turn].synchronize()
                buffer = buffers[turn][: len(piece)]
                buffer.copy_(piece)
                flat[start : start + CHUNK].copy_(buffer, non_blocking=True)
                event = self._emptied[turn] = self._module.Event()
                event.record(self._module.current_stream(self._device))
        return target

    def _get_buffers(self) -> list[Tensor] | None:
        with self._lock:
            if self._buffers is None and not self._is_refused:
                try:
                    self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
                except RuntimeError as error:  # the system limits how much may be page-locked
                    self._is_refused = True
                    _log.warning(
                        "%s; copies to %s are slower and make the host wait. Raise the limit of locked "
                        "memory (ulimit -l).",
                        _reason(error),
                        self._device,
                    )
            return self._buffers
