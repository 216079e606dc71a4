"""Which pages of a mapping are in memory: bringing some in before they are used, letting some go afterwards.

Note [Pages that were written]
    A view is writable, and a page that was written is a private copy: dropping it would bring back, silently,
    what is in the file.  ``/proc/self/pagemap`` tells copies (anonymous pages) from pages of the file, and
    only the latter are dropped; they come back from the page cache when they are read again.  Where the
    kernel does not tell, nothing is dropped.

Note [Read before mapped]
    Mapping pages that are not in memory reads them by the way, in single small pages.  A read in sequence
    gets them in large folios, which take a tenth of the processor's time to bring in and to map (measured
    for 2 GB: 0.05 s against 0.4 to 0.7), and the disk is 1.4 to 1.9 times as fast.  So pages are read first:
    by sending them to ``/dev/null``, which copies nothing.
"""

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_POPULATE_READ = 22  # Source: asm-generic/mman-common.h, since Linux 5.14; Python does not have it
_STEP = 4 << 20  # bytes of one call: others that change the address space wait no longer than that
# Source: Documentation/admin-guide/mm/pagemap.rst
_SWAPPED, _OF_FILE = 62, 61
_PAGEMAP_ENTRY_BYTES = 8


def find_madvise() -> Callable[[int, int, int], int] | None:
    """Return the system call; unlike ``mmap.madvise`` it lets other Python threads run."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_madvise = find_madvise()


def bring_in(memory: mmap.mmap, fd: int, start: int, stop: int) -> bool:
    """Map the pages of ``memory[start:stop]``, of the file *fd*, reading from disk what is not in memory.

    Nothing is copied, and a file that was truncated cannot kill the process here.

    Returns:
        False if this kernel cannot do that, or the pages are not there.
    """
    if _madvise is None:
        return False
    start, address = start - start % mmap.PAGESIZE, _address(memory)
    for position in range(start, stop, _STEP):
        length = min(_STEP, stop - position)
        _read(fd, position, length)
        while _madvise(address + position, length, _POPULATE_READ):
            if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
                return False
    return True


def _read(fd: int, start: int, nbytes: int) -> None:
    """Have the kernel read bytes into its page cache in sequence; see Note [Read before mapped]."""
    with contextlib.suppress(OSError), open(os.devnull, "wb", buffering=0) as nowhere:
        stop = start + nbytes
        while start < stop:
            sent = os.sendfile(nowhere.fileno(), fd, start, stop - start)
            if not sent:  # the file has become shorter
                return
            start += sent


def let_go(memory: mmap.mmap, start: int, stop: int) -> None:
    """Drop the pages of ``memory[start:stop]`` that were not written; see Note [Pages that were written]."""
    if _madvise is None:
        return
    start -= start % mmap.PAGESIZE
    address = _address(memory) + start
    pages = -(-(stop - start) // mmap.PAGESIZE)
    with contextlib.suppress(OSError):  # no /proc
        written = _written(address, pages)
        edges = [0, *(torch.nonzero(written[1:] != written[:-1]).view(-1) + 1).tolist(), pages]
        for first, last in itertools.pairwise(edges):
            if not written[first]:
                _madvise(address + first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, mmap.MADV_DONTNEED)


def _written(address: int, pages: int) -> Tensor:
    """Tell for each page whether it is a private copy."""
    nbytes = pages * _PAGEMAP_ENTRY_BYTES
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // mmap.PAGESIZE * _PAGEMAP_ENTRY_BYTES)
        raw = bytearray(pagemap.read(nbytes))
    if len(raw) != nbytes:
        raise OSError("pagemap ends early")
    entries = torch.frombuffer(raw, dtype=torch.int64)
    is_there = (entries < 0) | ((entries >> _SWAPPED) & 1).bool()  # bit 63, present, is the sign
    return is_there & ~((entries >> _OF_FILE) & 1).bool()


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
