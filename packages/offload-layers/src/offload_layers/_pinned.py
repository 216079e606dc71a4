"""Page-locked memory through which host tensors cross to a device.

A device's copy engine reads page-locked memory only. Copying from any other memory makes the driver copy to
such memory first, piece by piece, while the host waits. Here two buffers take turns: the host fills one
while the engine empties the other. They hold ``2 * CHUNK`` bytes, whatever the size of a tensor.
"""

import logging
import threading
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("offload_layers.transfer")

#: bytes of one buffer: long enough to keep the bus busy, short enough that the first piece leaves soon
CHUNK = 32 << 20


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
                    reason = str(error).splitlines()[0]
                    _log.warning(
                        "the driver gives no page-locked memory (%s); copies to %s are slower and make the "
                        "host wait. Raise the limit of locked memory (ulimit -l).",
                        reason,
                        self._device,
                    )
            return self._buffers
