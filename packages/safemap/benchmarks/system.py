"""The machine: what is in the page cache, how fast bytes can come at all, how much memory is used."""

import ctypes
import mmap
import os
import platform
import threading
import time
from typing import Any

import torch

MIB = 1 << 20


def evict(paths: list[str]) -> None:
    """Drop the pages of these files, and only these, from the page cache; fail if some stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        share = cached_share(path)
        if share > 0.01:
            raise RuntimeError(
                f"{path}: {share:.0%} stay in the page cache; is it mapped by another process?"
            )


def warm(paths: list[str]) -> None:
    """Read the files once."""
    buffer = memoryview(bytearray(8 * MIB))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_share(path: str) -> float:
    """The share of a file's pages that are in the page cache, by ``mincore``."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = os.path.getsize(path)
    pages = -(-size // mmap.PAGESIZE)
    fd = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        vector = (ctypes.c_ubyte * pages)()
        if libc.mincore(address, size, vector) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        libc.munmap(address, size)
    finally:
        os.close(fd)
    return sum(bytes(vector).translate(bytes(i & 1 for i in range(256)))) / pages


def direct_seconds(spans: list[tuple[str, int, int]], piece: int = 4 * MIB) -> float:
    """How long the disk takes for these byte ranges, in this order, past the page cache (``O_DIRECT``).

    Several pieces are under way at a time, because a disk reaches its rate only so.
    """
    from concurrent.futures import ThreadPoolExecutor

    fds = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in {path for path, _, _ in spans}}
    pieces = []
    for path, offset, nbytes in spans:
        start, stop = offset & ~4095, -(-(offset + nbytes) // 4096) * 4096
        pieces += [(fds[path], at, min(piece, stop - at)) for at in range(start, stop, piece)]
    local = threading.local()

    def read(fd: int, offset: int, nbytes: int) -> None:
        if not hasattr(local, "memory"):
            local.memory = mmap.mmap(-1, piece)  # aligned as O_DIRECT wants it
        os.preadv(fd, [memoryview(local.memory)[:nbytes]], offset)

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, *zip(*pieces, strict=True)))
    seconds = time.perf_counter() - began
    for fd in fds.values():
        os.close(fd)
    return seconds


def memory() -> tuple[int, int]:
    """Anonymous and file-mapped resident bytes of this process."""
    values = {}
    with open("/proc/self/status") as file:
        for line in file:
            key, _, rest = line.partition(":")
            if key in ("RssAnon", "RssFile"):
                values[key] = int(rest.split()[0]) * 1024
    return values["RssAnon"], values["RssFile"]


def description() -> dict[str, Any]:
    """What the numbers depend on."""
    with open("/proc/cpuinfo") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
