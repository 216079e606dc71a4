"""Views of mapped files, for ``mmap=True``.

A private mapping: writing to a view copies the page and never reaches the file, but other views of the same
bytes see it.  A mapping lives as long as a view of it.

Note [Brought in once]
    Pages that were brought in stay mapped until the system needs their memory, and asking for them again
    walks through all of them: for a model of 2 GB that was a third of its forward.  So a tensor is brought in
    again only if the process has met pages since that were not in memory (major faults), or has let it go.
"""

import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from safemap._blocks import blocks
from safemap._file import Descriptor, File, explained
from safemap._layout import Entry, Layout
from safemap._locks import ForkSafe
from safemap._madvise import NORESERVE
from safemap._pages import bring_in, let_go

_Place = tuple[File, int]  # the offset
_LEAST_BLOCKS = 4 << 20  # bytes: of a tensor that is shorter, most blocks would hold neighbours


def renewal_elements(explicit: int | None) -> int:
    """Return after how many elements a mapping is renewed: as given, as the environment says, or never."""
    text = os.environ.get("DIFFSYNTH_DISK_MAP_BUFFER_SIZE") if explicit is None else explicit
    if text is None:
        return sys.maxsize
    try:
        value = int(text)
    except ValueError:
        raise ValueError(
            f"DIFFSYNTH_DISK_MAP_BUFFER_SIZE must be a number of elements; it is {text!r}"
        ) from None
    if value < 0:
        raise ValueError(f"buffer_size must not be negative; got {value}")
    return value


class Mappings(ForkSafe):
    """One mapping for each file, renewed after *renewal_elements* so that its pages can be given back."""

    def __init__(self, renewal_elements: int) -> None:
        super().__init__()
        self._renewal_elements = renewal_elements
        self._elements = 0
        self._maps: dict[File, mmap.mmap] = {}
        # with those that were renewed or dropped, while views keep them
        self._alive: dict[File, weakref.WeakSet[mmap.mmap]] = {}
        self._brought_in: set[_Place] = set()  # see Note [Brought in once]
        self._expected: set[_Place] = set()  # will be brought in, by another thread
        self._major_faults = 0

    def view(self, file: File, layout: Layout, dtype: torch.dtype, offset: int) -> Tensor | None:
        """Return a view of stored elements, flat, or None where their position is not aligned."""
        if not _can_view(layout, dtype, offset):
            return None
        if (file, offset) in self._expected:  # rather than page by page, as it is used
            self.bring_in((file, layout, offset))
        memory = self._map_of(file, layout.nbytes // dtype.itemsize)
        return torch.frombuffer(memory, dtype=dtype, count=layout.nbytes // dtype.itemsize, offset=offset)

    def expect(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return what has to be brought in, and take note that it will be. See Note [Brought in once]."""
        faults = blocks.major_faults()
        if faults != self._major_faults:
            self._major_faults = faults
            self._brought_in = set()
        brought_in = self._brought_in
        lacking = [entry for entry in entries if entry[::2] not in brought_in]
        self._expected.update(entry[::2] for entry in lacking)
        return lacking

    def expects(self, entry: Entry) -> bool:
        """Whether a tensor is still to be brought in."""
        return entry[::2] in self._expected

    def bring_in(self, entry: Entry) -> bool:
        """Map the pages of a tensor before a view of it is read; that may take as long as reading the disk.

        Returns:
            False if the system cannot do that, or the tensor will not be a view.
        """
        file, layout, offset = entry
        self._expected.discard((file, offset))
        if layout.dtype is None or not _can_view(layout, layout.dtype, offset):
            return False
        brought_in = self._brought_in  # a new set may take its place meanwhile: then this was in vain
        memory, descriptor = self._map_of(file, 0), file.open()
        if not bring_in(memory, descriptor.fd, offset, offset + layout.nbytes):
            return False
        brought_in.add((file, offset))
        return True

    def renew(self, entries: Iterable[Entry | None], dtype: torch.dtype | None) -> bool:
        """Make views as good as those that `view` would give now.

        Args:
            entries: What the views are of; None for what cannot be one.
            dtype: In which they were wanted; None: as stored.

        Returns:
            False if one of them is no view, or there will be a new mapping.
        """
        if self._renewal_elements != sys.maxsize:
            return False
        checked = None
        for entry in entries:
            if entry is None:
                return False
            file, layout, offset = entry
            stored = layout.dtype
            if stored is None or dtype not in (None, stored) or not _can_view(layout, stored, offset):
                return False
            if file is not checked:
                file.check_unchanged(file.open())
                checked = file
            if (file, offset) in self._expected:
                self.bring_in(entry)
        return True

    def let_go(self, entry: Entry) -> None:
        """Drop the pages of a tensor, except those that were written through a view."""
        file, layout, offset = entry
        self._brought_in.discard((file, offset))
        self._expected.discard((file, offset))  # it would come back otherwise
        with self._lock:
            alive = list(self._alive.get(file, ())) if layout.nbytes else []
        for memory in alive:
            let_go(memory, offset, offset + layout.nbytes)

    def drop(self) -> None:
        """Forget the mappings; views keep theirs."""
        with self._lock:
            self._maps = {}
            self._brought_in = set()
            self._expected = set()  # what another thread still has before it would open files again

    def _map_of(self, file: File, elements: int) -> mmap.mmap:
        """Return the mapping, of which *elements* will be read."""
        descriptor = file.open()
        file.check_unchanged(descriptor)  # reading a page behind the end of the file would kill the process
        with self._lock:
            memory = self._maps.get(file)
            if memory is None:
                memory = self._maps[file] = _map(file, descriptor)
                self._alive.setdefault(file, weakref.WeakSet()).add(memory)
            self._elements += elements
            if self._elements > self._renewal_elements:
                self._elements = 0
                self._maps = {}
                self._brought_in = set()
        return memory


def bring_into_cache(entry: Entry) -> bool:
    """Read a tensor into the page cache in blocks; see Note [Blocks] in ``_blocks``.

    Returns:
        False if the system cannot do that, or the tensor is too small for it.
    """
    file, layout, offset = entry
    if layout.nbytes < _LEAST_BLOCKS:
        return False
    descriptor = file.open()
    file.check_unchanged(descriptor)
    try:
        memory = _map(file, descriptor)
    except OSError:  # this file system has no mappings
        return False
    return blocks.are_read(memory) and bring_in(memory, descriptor.fd, offset, offset + layout.nbytes)


def _can_view(layout: Layout, dtype: torch.dtype, offset: int) -> bool:
    return layout.nbytes > 0 and offset % dtype.itemsize == 0 and layout.stride is None


def _map(file: File, descriptor: Descriptor) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor.fd, file.nbytes, access=mmap.ACCESS_COPY)
    options = (
        {"trackfd": False} if sys.version_info >= (3, 13) else {}
    )  # else it keeps a descriptor of its own
    flags, protection = mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    try:
        return mmap.mmap(descriptor.fd, file.nbytes, flags=flags, prot=protection, **options)
    except ValueError:  # the file has become shorter since it was looked at
        file.check_unchanged(descriptor)
        raise
    except OSError as error:
        raise explained(error, file.path) from None
