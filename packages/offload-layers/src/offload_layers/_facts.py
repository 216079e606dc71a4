"""What matters for speed on this machine, gathered in one value. Judging it is another file's work."""

import dataclasses
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from offload_layers import _cgroup, _fp8_matmul, _machine
from offload_layers._device import default_device
from offload_layers._errors import ConfigError
from offload_layers._pinned import CHUNK
from offload_layers._probe import probe
from offload_layers._probe_disk import probe_disk

_DRIVER = "proc/driver/nvidia/version"
_DRIVER_IN_WSL = "usr/lib/wsl/lib/libcuda.so.1"  # Linux inside Windows uses the driver of Windows


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """The bus between host and device, as it is and as the device could have it."""

    lanes: int
    most_lanes: int
    gigatransfers_per_s: float
    most_gigatransfers_per_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """One machine and one compute device; None is for what is not known, or does not apply.

    Attributes:
        driver: Version of the device's driver.
        torch_cuda: Version of CUDA or ROCm that torch was built for.
        has_unused_gpu: An NVIDIA driver is loaded, but torch sees no device of it.
        container_bytes: Smallest memory limit of the process's control groups.
        cores: Cores the process may run on. *core_quota*: how many cores' worth of time it may take of them.
        locked_limit_bytes: How much the process may page-lock; None: no limit, or no such limit here.
        why_not_pinned: What the driver says when asked for page-locked memory; empty: it gives it.
        huge_pages: When the kernel backs memory by huge pages: always, madvise or never.
        why_no_fp8: Why the device does not multiply eight-bit floats; empty: it does.
        is_disk_cached: The rate of the disk is that of the page cache, which was not to be emptied.
    """

    device: str
    device_name: str
    driver: str | None
    torch: str
    torch_cuda: str | None
    has_unused_gpu: bool
    device_total_bytes: int | None
    device_free_bytes: int | None
    host_total_bytes: int | None
    host_free_bytes: int
    container_bytes: int | None
    cores: int
    core_quota: float | None
    threads: int
    locked_limit_bytes: int | None
    why_not_pinned: str | None
    huge_pages: str | None
    why_no_fp8: str
    link: Link | None
    disk_bytes_per_s: float | None
    is_disk_cached: bool
    bus_bytes_per_s: float
    memory_bytes_per_s: float
    flops: float


def gather(
    device: torch.device, *, file: str | None = None, seconds: float = 1.0, root: Path = Path("/")
) -> Facts:
    """Ask the system and torch, and measure for about *seconds*.

    Args:
        device: Where models are to compute.
        file: What to read from disk; None: the disk is not measured.
        seconds: About how long measuring may take.
        root: Where ``proc`` and ``sys`` lie.

    Raises:
        ConfigError: the device is not there, or *file* cannot be read.
    """
    _machine.check_is_there(device)
    has_own_memory = device.type not in ("cpu", "mps")
    total, free = _device_memory(device)
    disk = None if file is None else probe_disk(file, seconds=seconds / 4)
    rates = probe(device, seconds=seconds * 3 / 4)
    return Facts(
        device=str(device),
        device_name=_device_name(device, root),
        driver=_driver(device, root),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or torch.version.hip,
        has_unused_gpu=default_device().type == "cpu"
        and any((root / path).exists() for path in (_DRIVER, _DRIVER_IN_WSL)),
        device_total_bytes=total,
        device_free_bytes=free,
        host_total_bytes=_machine.total_ram(root),
        host_free_bytes=_machine.available_ram(root),
        container_bytes=_cgroup.memory_limit(root),
        cores=_cores(),
        core_quota=_cgroup.cpu_quota(root),
        threads=torch.get_num_threads(),
        locked_limit_bytes=_locked_limit(),
        why_not_pinned=_why_not_pinned() if has_own_memory else None,
        huge_pages=_huge_pages(root),
        why_no_fp8=_fp8_matmul._why_not(device, torch.float8_e4m3fn) or "",
        link=_link(device, root),  # after the probe: an idle device slows its bus down
        disk_bytes_per_s=None if disk is None else disk.bytes_per_s,
        is_disk_cached=disk is not None and disk.is_cached,
        bus_bytes_per_s=rates.bus_bytes_per_s,
        memory_bytes_per_s=rates.memory_bytes_per_s,
        flops=rates.flops,
    )


def _device_memory(device: torch.device) -> tuple[int, int] | tuple[None, None]:
    try:
        return _machine.total_vram(device), _machine.free_vram(device)
    except ConfigError:  # it has none, or its driver does not tell
        return None, None


def _device_name(device: torch.device, root: Path) -> str:
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)
    for line in _lines(root / "proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _driver(device: torch.device, root: Path) -> str | None:
    if device.type == "cuda" and torch.version.cuda:
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024"
        for line in _lines(root / _DRIVER):
            if line.startswith("NVRM") and (version := re.search(r"\s(\d{3,}(\.\d+)+)\s", line)):
                return version[1]
        return None
    return getattr(_properties(device), "driver_version", None)  # Intel's is among the properties


def _properties(device: torch.device) -> object:
    module: Any = torch.get_device_module(device)
    return module.get_device_properties(device) if hasattr(module, "get_device_properties") else None


def _link(device: torch.device, root: Path) -> Link | None:
    """Return the state of PCI Express. Source: Linux, Documentation/ABI/testing/sysfs-bus-pci."""
    properties: Any = _properties(device)
    if not hasattr(properties, "pci_bus_id"):
        return None
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    folder = root / "sys/bus/pci/devices" / address
    values = []
    for name in ("current_link_width", "max_link_width", "current_link_speed", "max_link_speed"):
        value = re.match(r"[\d.]+", next(iter(_lines(folder / name)), ""))  # "16.0 GT/s PCIe"
        if value is None or float(value[0]) in (0, 63, 255):  # what a virtual bus says: unknown
            return None
        values.append(float(value[0]))
    return Link(int(values[0]), int(values[1]), values[2], values[3])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _locked_limit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def _why_not_pinned() -> str:
    try:
        torch.empty(2 * CHUNK, dtype=torch.uint8, pin_memory=True)  # what a transfer takes
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def _huge_pages(root: Path) -> str | None:
    """Return the chosen one of "always [madvise] never"."""
    for line in _lines(root / "sys/kernel/mm/transparent_hugepage/enabled"):
        if chosen := re.search(r"\[(\w+)\]", line):
            return chosen[1]
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
