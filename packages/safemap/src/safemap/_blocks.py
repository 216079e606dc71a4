"""Having faults in a mapped file read it in large pages, and not a byte beyond what is asked for.

Note [Blocks]
    There are three ways to have the kernel read a range of a file before it is used.  Asking for it
    (``posix_fadvise``) gets it in small pages, which take the processor longer than the disk.  Reading it in
    sequence gets large ones, but in windows whose size is a setting of the device: 128 KiB, which is too
    little for a fast disk, or 8 MiB, of which much lies behind the end of the range.  A fault in a mapping
    that wants huge pages reads the 2 MiB around it as one page, whatever that setting; and nothing else, if
    accesses are said to be random.  Measured for 2 GB, GB/s and seconds of the processor: asking 2.1 and
    0.55, a sequence in windows of 128 KiB 1.8 and 0.37, blocks 3.7 and 0.02.

    Source: do_sync_mmap_readahead in mm/filemap.c of Linux, since 5.18.  A kernel that does otherwise reads
    page by page.  The number of faults shows it; then mappings are as they were, and stay so.
"""

import contextlib
import itertools
import mmap
import weakref
from collections.abc import Iterator

from safemap._locks import ForkSafe
from safemap._madvise import HUGE_PAGES, SMALL_PAGES, address_of, find_madvise

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STEP = 4 << 20  # bytes of one call: others that change the address space wait no longer than that
_MOST_FAULTS = 64  # of one step: one for each block, and for each page that the system has taken back since
_RANDOM, _NORMAL = getattr(mmap, "MADV_RANDOM", 1), getattr(mmap, "MADV_NORMAL", 0)
_calls = itertools.count(1)


class Blocks(ForkSafe):
    """Knows which mappings are read in blocks, and finds out whether this kernel does that."""

    def __init__(self) -> None:
        super().__init__()
        self._madvise = find_madvise()
        self._is_possible = self._madvise is not None and hasattr(resource, "RUSAGE_THREAD")
        self._advised: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._faults = 0

    def are_read(self, memory: mmap.mmap) -> bool:
        """Have *memory*, a mapped file, read in blocks from now on; tell whether that is possible."""
        with self._lock:
            if self._is_possible and memory not in self._advised:
                self._is_possible = self._advise(memory, HUGE_PAGES)
                if self._is_possible:
                    self._advise(memory, _RANDOM)
                    self._advised.add(memory)
            return self._is_possible

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, this thread brings in one step."""
        if not self._is_possible:
            yield
            return
        before = _faults_of_thread()
        yield
        faults = _faults_of_thread() - before
        if faults:
            with self._lock:
                self._faults += faults
                if faults > _MOST_FAULTS:
                    self._give_up()

    def major_faults(self) -> int:
        """Return how often this process has waited for a page that was not being brought in.

        A new number each time where nobody counts.
        """
        if resource is None:
            return next(_calls)
        return resource.getrusage(resource.RUSAGE_SELF).ru_majflt - self._faults

    def _give_up(self) -> None:
        self._is_possible = False
        for memory in self._advised:
            self._advise(memory, SMALL_PAGES)
            self._advise(memory, _NORMAL)
        self._advised.clear()

    def _advise(self, memory: mmap.mmap, advice: int) -> bool:
        return self._madvise is not None and not self._madvise(address_of(memory), len(memory), advice)


def _faults_of_thread() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


blocks = Blocks()
