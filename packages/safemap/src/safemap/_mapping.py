"""Views of mapped files, for ``mmap=True``.

A private mapping: writing to a view copies the page and never reaches the file, but other views of the same
bytes see it.  A mapping lives as long as a view of it.
"""

import mmap
import sys

import torch
from torch import Tensor

from safemap._file import File
from safemap._layout import Layout
from safemap._locks import ForkSafeLock

# without it the kernel may refuse to map a file larger than memory, as if all of it were to be written
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class Mappings:
    """One mapping for each file, renewed after *renewal_elements* so that its pages can be given back."""

    def __init__(self, renewal_elements: int) -> None:
        self._renewal_elements = renewal_elements
        self._elements = 0
        self._maps: dict[File, mmap.mmap] = {}
        self._lock = ForkSafeLock()

    def view(self, file: File, layout: Layout, dtype: torch.dtype, offset: int) -> Tensor | None:
        """Return a view of stored elements, flat, or None where their position is not aligned."""
        if offset % dtype.itemsize or not layout.nbytes:
            return None
        descriptor = file.open()
        file.check_unchanged(descriptor)  # reading a page behind the end of the file would kill the process
        with self._lock:
            memory = self._maps.get(file)
            if memory is None:
                memory = self._maps[file] = _map(descriptor.fd)
            self._elements += layout.nbytes // dtype.itemsize
            if self._elements > self._renewal_elements:
                self._elements = 0
                self._maps = {}
        return torch.frombuffer(memory, dtype=dtype, count=layout.nbytes // dtype.itemsize, offset=offset)

    def drop(self) -> None:
        """Forget the mappings; views keep theirs."""
        with self._lock:
            self._maps = {}


def _map(fd: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    options = (
        {"trackfd": False} if sys.version_info >= (3, 13) else {}
    )  # else it keeps a descriptor of its own
    return mmap.mmap(
        fd, 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE, **options
    )
