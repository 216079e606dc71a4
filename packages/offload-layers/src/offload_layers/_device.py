"""The seam to the device: everything that depends on the vendor is asked for here."""

from typing import Protocol

import torch

#: what torch raises when a device has no memory left; torch before 2.5 has it under CUDA's name only
OutOfMemory: type[Exception] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


class Memory(Protocol):
    """What a budget wants to know of a device, apart from its own books."""

    def in_use(self) -> int | None:
        """Bytes of the device that are taken, by anyone; None where the device cannot tell."""

    def release_cached(self) -> None:
        """Give memory that is only cached back to the device."""


class HostMemory:
    """The CPU as compute device: other programs' memory is no part of its budget."""

    def in_use(self) -> int | None:
        """Return None: only what the budget has lent counts."""
        return None

    def release_cached(self) -> None:
        """Do nothing: freed host memory needs no second step."""


class AcceleratorMemory:
    """A device with a driver that counts: CUDA, ROCm, XPU, NPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)

    def in_use(self) -> int | None:
        """Return the driver's count, less what torch holds in reserve and would use first."""
        if not self._module.is_available() or not hasattr(self._module, "mem_get_info"):
            return None
        free, total = self._module.mem_get_info(self._device)
        reserve = self._module.memory_reserved(self._device) - self._module.memory_allocated(self._device)
        return int(total - free - reserve)

    def release_cached(self) -> None:
        """Empty torch's caching allocator."""
        if self._module.is_available():
            self._module.empty_cache()


def memory_of(device: torch.device) -> Memory:
    """Return the accountant for *device*."""
    return HostMemory() if device.type in ("cpu", "mps") else AcceleratorMemory(device)
