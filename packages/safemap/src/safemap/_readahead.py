"""Asking the disk for much at once, where bytes are not in the page cache.

Note [Probing]
    A disk reaches its rate only if it has many requests at a time; a plain read asks for one read-ahead
    window after the other. So a large read first asks, by a read that must not wait, whether its last
    page is in the page cache, and one in its middle: pages at the edges may have come with its neighbours,
    in blocks of 2 MiB (see ``_blocks``). If they are not, the kernel is asked for all of it before it is
    read, and, if reads follow each other in the file, for what comes next. Warm reads pay two system calls,
    and no memory of this process is used for what is not asked for.
"""

import contextlib
import os

from safemap._file import File
from safemap._locks import ForkSafe

# Source: mm/readahead.c of Linux reads no more of one request than the read-ahead window of the device,
# 128 KiB unless configured, and silently drops the rest
_WINDOW = 128 << 10
_AHEAD = 64 << 20  # bytes: what a fast disk reads while a large tensor is used
_PROBE_BYTES = 64
_PROBE = (bytearray(_PROBE_BYTES),)  # what is in there is of no interest: threads may share it
_LARGE = 4 << 20  # bytes: so much has a block of 2 MiB around its middle for itself
_NOWAIT = getattr(os, "RWF_NOWAIT", None)
CAN_ASK = hasattr(os, "posix_fadvise")


def ask_for(file: File, start: int, stop: int) -> None:
    """Ask the kernel to bring bytes into the page cache; it does so on its own time."""
    descriptor = file.open()
    for position in range(start, stop, _WINDOW):
        length = min(_WINDOW, stop - position)
        os.posix_fadvise(descriptor.fd, position, length, os.POSIX_FADV_WILLNEED)


def is_cached(file: File, start: int, stop: int) -> bool | None:
    """Tell whether bytes are in the page cache, looking at a few; None if the system does not tell."""
    if _NOWAIT is None:
        return None
    descriptor = file.open()
    try:
        if not os.preadv(descriptor.fd, _PROBE, max(0, stop - _PROBE_BYTES), _NOWAIT):
            return False
        return stop - start < _LARGE or os.preadv(descriptor.fd, _PROBE, (start + stop) // 2, _NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # not for this file system
        return None


class ReadAhead(ForkSafe):
    """Remembers where reads of each file ended and up to where the kernel was asked; threads may share it."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[File, int] = {}
        self._asked: dict[File, int] = {}
        self._can_probe = CAN_ASK

    def before(self, file: File, offset: int, nbytes: int) -> None:
        """Ask for what a read of *nbytes* from *offset* needs, and for what follows, if it is on disk."""
        if not self._can_probe:
            return
        stop = offset + nbytes
        with self._lock:
            follows = offset == self._ends.get(file)
            self._ends[file] = stop
            asked = self._asked.get(file, 0) if follows else 0
        if asked >= stop + _AHEAD // 2:
            return
        if asked < stop and (cached := is_cached(file, offset, stop)) is not False:
            self._can_probe = cached is not None
            return
        until = min(stop + _AHEAD, file.nbytes) if follows else stop
        with self._lock:
            self._asked[file] = until
        with contextlib.suppress(OSError):  # a hint; reading will tell what is wrong
            ask_for(file, max(offset, asked), until)
