"""How much memory there is to have: of the host, within what its container allows, and of a device."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from offload_layers import _cgroup
from offload_layers._errors import ConfigError
from offload_layers._sizes import parse_size

_KIB = 1024
Size = str | int
#: of the memory that is free: what ``"auto"`` takes, and leaves the rest to activations and to others
AUTO_SHARE = 0.8


def available_ram(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that this process may still take without swapping or being killed.

    That is the smaller of what the machine has available and what the limits of the container leave. In both,
    page cache counts as available.

    Args:
        root: Where ``proc`` and ``sys`` lie.

    Raises:
        ConfigError: the system does not tell.
    """
    machine = _meminfo(root).get("MemAvailable")
    if machine is None:
        machine = _windows_available() if sys.platform == "win32" else _sysconf_available()
    if machine is None:
        raise ConfigError(
            f'cannot find out how much host memory is free on {sys.platform}; pass it, as in ram="16GB"'
        )
    left = _cgroup.memory_left(root)
    return machine if left is None else min(machine, left)


def total_ram(root: Path = Path("/")) -> int | None:
    """Return the bytes of host memory of the machine, whoever may use them; None: it is not known."""
    total = _meminfo(root).get("MemTotal")
    return _sysconf_pages("SC_PHYS_PAGES") if total is None else total


class UnknownMemoryError(ConfigError):
    """A driver does not tell how much memory its device has."""


def foreign_nbytes(device: torch.device, *, held: int) -> int:
    """Return what is taken of *device* apart from *held* bytes; 0 where its driver does not tell."""
    if device.type == "cpu":
        return 0
    try:
        return total_vram(device) - free_vram(device) - held
    except UnknownMemoryError:
        return 0


def total_vram(device: torch.device) -> int:
    """Return the bytes of memory of *device*.

    Raises:
        ConfigError: the device is not there, or its driver does not tell.
    """
    return _mem_get_info(device)[1]


def free_vram(device: torch.device) -> int:
    """Return the bytes of *device* that this process may still take, with those that torch keeps for reuse.

    Raises:
        ConfigError: the device is not there, or its driver does not tell.
    """
    free, _ = _mem_get_info(device)
    module = torch.get_device_module(device)
    return free + int(module.memory_reserved(device) - module.memory_allocated(device))


def check_is_there(device: torch.device) -> None:
    """Raise ``ConfigError`` unless torch can use *device*."""
    try:
        module: Any = torch.get_device_module(device)
    except RuntimeError as error:  # meta, or a vendor whose module is not loaded
        raise ConfigError(f"torch cannot compute on {device}; choose cpu or cuda, for example") from error
    if not module.is_available():
        raise ConfigError(f"torch {torch.__version__} sees no {device.type} device here; cpu is always there")
    if device.index is not None and device.index >= module.device_count():
        count = module.device_count()
        raise ConfigError(
            f"there is no {device}: torch sees {count} {device.type} device{'s' * (count != 1)}"
        )


def vram_limit(vram: Size, device: torch.device, ram: int, *, held: int) -> int:
    """Return the bytes of *device* that *vram* stands for; on a CPU at most *ram*, the host's.

    Args:
        vram: As the user gives it.
        device: That computes.
        ram: Bytes.
        held: Bytes that the model itself has on the device now, which are no others'.
    """
    if device.type == "cpu":
        return ram if vram == "auto" else min(ram, parse_size(vram, what="vram"))
    if vram == "auto":
        free = free_vram(device) + held
        return total_vram(device) - free + int(AUTO_SHARE * free)
    return parse_size(vram, what="vram")


def _mem_get_info(device: torch.device) -> tuple[int, int]:
    check_is_there(device)
    module: Any = torch.get_device_module(device)
    error = None
    try:
        if hasattr(module, "mem_get_info"):
            free, total = module.mem_get_info(device)
            return int(free), int(total)
    except RuntimeError as raised:  # some drivers, such as those of processors with graphics, do not tell
        error = raised
    raise UnknownMemoryError(
        f'{device} has no memory of its own that its driver tells of; pass its size, as in vram="8GB"'
    ) from error


def _meminfo(root: Path) -> dict[str, int]:
    """Return ``/proc/meminfo`` in bytes; empty where there is none. Source: proc_meminfo(5)."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {name.rstrip(":"): int(number) * _KIB for name, number, *unit in fields if unit == ["kB"]}


def _sysconf_available() -> int | None:
    return _sysconf_pages("SC_AVPHYS_PAGES")


def _sysconf_pages(name: str) -> int | None:
    """Return so many pages in bytes, or None where the system has no such number."""
    if name not in getattr(os, "sysconf_names", {}):
        return None
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _windows_available() -> int | None:
    """Return ``ullAvailPhys``. Source: the Windows API's ``GlobalMemoryStatusEx`` and ``MEMORYSTATUSEX``."""
    import ctypes

    status = (ctypes.c_uint64 * 8)()  # two 32-bit fields, length and load, and seven of 64 bits
    status[0] = ctypes.sizeof(status)
    kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009  # there on Windows only
    return status[2] if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
