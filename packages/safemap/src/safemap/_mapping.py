"""Views of mapped files, for ``mmap=True``.

A private mapping: writing to a view copies the page and never reaches the file, but other views of the same
bytes see it.  A mapping lives as long as a view of it.
"""

import mmap
import sys
import weakref

import torch
from torch import Tensor

from safemap._file import File
from safemap._layout import Entry, Layout
from safemap._locks import ForkSafeLock
from safemap._pages import bring_in, let_go

# without it the kernel may refuse to map a file larger than memory, as if all of it were to be written
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class Mappings:
    """One mapping for each file, renewed after *renewal_elements* so that its pages can be given back."""

    def __init__(self, renewal_elements: int) -> None:
        self._renewal_elements = renewal_elements
        self._elements = 0
        self._maps: dict[File, mmap.mmap] = {}
        # with those that were renewed or dropped, while views keep them
        self._alive: dict[File, weakref.WeakSet[mmap.mmap]] = {}
        self._lock = ForkSafeLock()

    def view(self, file: File, layout: Layout, dtype: torch.dtype, offset: int) -> Tensor | None:
        """Return a view of stored elements, flat, or None where their position is not aligned."""
        if not _can_view(layout, dtype, offset):
            return None
        memory = self._map_of(file, layout.nbytes // dtype.itemsize)
        return torch.frombuffer(memory, dtype=dtype, count=layout.nbytes // dtype.itemsize, offset=offset)

    def bring_in(self, entry: Entry) -> bool:
        """Map the pages of a tensor before a view of it is read; that may take as long as reading the disk.

        Returns:
            False if the system cannot do that, or the tensor will not be a view.
        """
        file, layout, offset = entry
        if layout.dtype is None or not _can_view(layout, layout.dtype, offset):
            return False
        return bring_in(self._map_of(file, 0), offset, offset + layout.nbytes)

    def let_go(self, entry: Entry) -> None:
        """Drop the pages of a tensor, except those that were written through a view."""
        file, layout, offset = entry
        with self._lock:
            alive = list(self._alive.get(file, ())) if layout.nbytes else []
        for memory in alive:
            let_go(memory, offset, offset + layout.nbytes)

    def drop(self) -> None:
        """Forget the mappings; views keep theirs."""
        with self._lock:
            self._maps = {}

    def _map_of(self, file: File, elements: int) -> mmap.mmap:
        """Return the mapping, of which *elements* will be read."""
        descriptor = file.open()
        file.check_unchanged(descriptor)  # reading a page behind the end of the file would kill the process
        with self._lock:
            memory = self._maps.get(file)
            if memory is None:
                memory = self._maps[file] = _map(descriptor.fd)
                self._alive.setdefault(file, weakref.WeakSet()).add(memory)
            self._elements += elements
            if self._elements > self._renewal_elements:
                self._elements = 0
                self._maps = {}
        return memory


def _can_view(layout: Layout, dtype: torch.dtype, offset: int) -> bool:
    return layout.nbytes > 0 and offset % dtype.itemsize == 0 and layout.stride is None


def _map(fd: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    options = (
        {"trackfd": False} if sys.version_info >= (3, 13) else {}
    )  # else it keeps a descriptor of its own
    return mmap.mmap(
        fd, 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE, **options
    )
