"""Bringing what will be read soon into the page cache."""

import contextlib
import os
from collections.abc import Sequence

from safemap._errors import SafemapError
from safemap._layout import Entry
from safemap._parallel import in_background

# Source: mm/readahead.c of Linux reads no more of one request than the read-ahead window of the device,
# 128 KiB unless configured, and silently drops the rest
_WINDOW = 128 << 10


def prefetch(entries: Sequence[Entry]) -> None:
    """Ask the kernel for the bytes of *entries*, in the background; without a kernel that can, do nothing."""
    if hasattr(os, "posix_fadvise"):
        in_background(lambda: _advise(entries))


def _advise(entries: Sequence[Entry]) -> None:
    with contextlib.suppress(SafemapError, OSError):  # a hint; reading will tell what is wrong
        for file, layout, offset in entries:
            descriptor = file.open()
            for start in range(offset, offset + layout.nbytes, _WINDOW):
                length = min(_WINDOW, offset + layout.nbytes - start)
                os.posix_fadvise(descriptor.fd, start, length, os.POSIX_FADV_WILLNEED)
