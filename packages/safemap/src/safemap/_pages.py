"""Which pages of a mapping are in memory: bringing some in before they are used, letting some go afterwards.

Note [Pages that were written]
    A view is writable, and a page that was written is a private copy: dropping it would bring back, silently,
    what is in the file.  ``/proc/self/pagemap`` tells copies (anonymous pages) from pages of the file, and
    only the latter are dropped; they come back from the page cache when they are read again.  Where the
    kernel does not tell, nothing is dropped.

    A page may be written between the look and the drop.  Whoever lets a tensor go knows that nobody writes to
    it, but knows nothing of its neighbours: so pages that they share, at both edges, are not dropped.

Note [Read before mapped]
    Mapping pages that are not in memory reads them by the way, in single small pages.  So they are read
    first, in blocks (see ``_blocks``); or, where that is not possible, in sequence: by sending them to
    ``/dev/null``, which copies nothing.  Large pages are mapped in a tenth of the processor's time, too.
"""

import contextlib
import ctypes
import errno
import itertools
import mmap
import os

import torch
from torch import Tensor

from safemap._blocks import STEP, blocks
from safemap._madvise import POPULATE_READ, address_of, find_madvise

# Source: Documentation/admin-guide/mm/pagemap.rst
_SWAPPED, _OF_FILE = 62, 61
_PAGEMAP_ENTRY_BYTES = 8


_madvise = find_madvise()


def bring_in(memory: mmap.mmap, fd: int, start: int, stop: int) -> bool:
    """Map the pages of ``memory[start:stop]``, of the file *fd*, reading from disk what is not in memory.

    Nothing is copied, and a file that was truncated cannot kill the process here.

    Returns:
        False if this kernel cannot do that, or the pages are not there.
    """
    if _madvise is None:
        return False
    start, address = start - start % mmap.PAGESIZE, address_of(memory)
    for position in range(start, stop, STEP):
        length = min(STEP, stop - position)
        if not blocks.are_read(memory):
            _read_in_sequence(fd, position, length)
        with blocks.watched():
            while _madvise(address + position, length, POPULATE_READ):
                if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
                    return False
    return True


def _read_in_sequence(fd: int, start: int, nbytes: int) -> None:
    """Have the kernel read bytes into its page cache in sequence; see Note [Read before mapped]."""
    with contextlib.suppress(OSError), open(os.devnull, "wb", buffering=0) as nowhere:
        stop = start + nbytes
        while start < stop:
            sent = os.sendfile(nowhere.fileno(), fd, start, stop - start)
            if not sent:  # the file has become shorter
                return
            start += sent


def let_go(memory: mmap.mmap, start: int, stop: int) -> None:
    """Drop pages within ``memory[start:stop]`` that were not written.  See Note [Pages that were written]."""
    start += -start % mmap.PAGESIZE
    pages = (stop - start) // mmap.PAGESIZE
    if _madvise is None or pages < 1:
        return
    address = address_of(memory) + start
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
