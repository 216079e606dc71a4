"""Getting pages for memory that is about to be written, by the faster of two ways.

Note [Huge or small]
    The kernel clears a page when it is first used. One call for many pages takes half as long as a fault for
    each, and huge pages are cleared several times as fast as small ones: on a machine that has its memory to
    itself. A virtual machine may have given its free memory back to its host, in huge pages, and getting one
    again then takes longer than getting small ones that were never given back (measured, GB/s: huge 7.2 or
    0.8, small 1.9). Nothing tells which it will be, and it changes from one moment to the next. So the way
    that was faster when it was last used is taken, and the other one tried again: soon, and later each time
    that it is still slower.
"""

import ctypes
import errno
import itertools
import mmap
from time import perf_counter

from safemap._madvise import HUGE_PAGES, POPULATE_WRITE, SMALL_PAGES, address_of, find_madvise
from safemap._parallel import for_each

_STEP = 8 << 20  # bytes of one call: enough to be timed, little enough to be wrong with
_HUGE_PAGE = 2 << 20
_SOON, _LATE = 8, 64  # steps after which the way that was slower is tried again, at first and at last


class FirstTouch:
    """Populates memory, and learns how that goes fastest; threads may share it."""

    def __init__(self) -> None:
        self._madvise = find_madvise()
        self._can_populate = True
        self._costs: dict[int, float] = {}  # kind of page -> seconds a byte, when last used
        self._patience = _SOON
        self._steps = 0  # since the way that was slower was tried

    def __call__(self, memory: mmap.mmap, start: int, stop: int, threads: int = 1) -> None:
        """Get pages for ``memory[start:stop]``, which is private and anonymous, if that can be done here."""
        if self._madvise is None:
            return
        base = address_of(memory)
        begin, end = base + start - start % mmap.PAGESIZE, base + stop
        inner = range(begin // _STEP * _STEP + _STEP, end, _STEP)  # steps end where huge pages do
        for_each(self._populate, list(itertools.pairwise((begin, *inner, end))), threads)

    def _populate(self, step: tuple[int, int]) -> None:
        if self._madvise is None:
            return
        begin, end = step
        kind, start = self._kind(), perf_counter()
        self._madvise(begin, end - begin, kind)
        if not self._can_populate:
            return
        if self._madvise(begin, end - begin, POPULATE_WRITE):
            if ctypes.get_errno() == errno.EINVAL:  # an older kernel, where huge pages are worth asking for
                self._can_populate = False
            return  # the pages come, or the lack of them is felt, when they are written
        if end - begin >= _HUGE_PAGE:
            self._learn(kind, (perf_counter() - start) / (end - begin))

    def _kind(self) -> int:
        for untried in (HUGE_PAGES, SMALL_PAGES):
            if untried not in self._costs:
                return untried
        self._steps += 1
        faster, slower = self._ranking()
        return faster if self._steps < self._patience else slower

    def _learn(self, kind: int, cost: float) -> None:
        before = self._ranking()
        self._costs[kind] = cost
        if self._ranking() != before:
            self._steps, self._patience = 0, _SOON
        elif kind != before[0]:  # it was tried in vain
            self._steps, self._patience = 0, min(2 * self._patience, _LATE)

    def _ranking(self) -> list[int]:
        return sorted(self._costs, key=self._costs.__getitem__)


#: of this process: what is learned holds for all of its memory
first_touch = FirstTouch()
