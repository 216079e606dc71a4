"""The system call ``madvise``, which unlike ``mmap.madvise`` lets other Python threads run."""

import ctypes
import mmap
import sys
from collections.abc import Callable

# Source: asm-generic/mman-common.h, since Linux 5.14; Python does not have them
POPULATE_READ, POPULATE_WRITE = 22, 23
HUGE_PAGES, SMALL_PAGES = getattr(mmap, "MADV_HUGEPAGE", 14), getattr(mmap, "MADV_NOHUGEPAGE", 15)
# without it the kernel may refuse to map a file larger than memory, as if all of it were to be written
NORESERVE = 0x4000 if sys.platform == "linux" else 0


def find_madvise() -> Callable[[int, int, int], int] | None:
    """Return the function, which takes address, length and advice; None where there is none."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def address_of(memory: mmap.mmap) -> int:
    """Return where a writable mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
