"""Telling the kernel what will be read soon."""

import os
from collections.abc import Sequence

from safemap._layout import Entry


def prefetch(entries: Sequence[Entry]) -> None:
    """Ask for the bytes of *entries* to be brought into the page cache; neighbours are asked for together."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file, layout, offset in entries:
        if layout.nbytes:
            os.posix_fadvise(file.open().fd, offset, layout.nbytes, os.POSIX_FADV_WILLNEED)
