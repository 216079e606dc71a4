"""A ceiling on the bytes that layers hold on one device.

Bytes are borrowed before they are allocated. A layer that wants to *stay* on the device is refused when
it does not fit; a layer that must *compute* is never refused, but others are asked to leave first. So
room for the largest layer and for the one that is fetched ahead is kept free of residents, unless everything
fits, and for what computations take beside weights (see ``_beside``). So the limit holds;
layers larger than it run alone.

Changing the books happens under one lock; moving tensors happens outside of it.
"""

import dataclasses
import itertools
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from offload_layers._device import InUse, OutOfMemory, device_of
from offload_layers._errors import BudgetError, BudgetExceededError

_log = logging.getLogger("offload_layers.budget")
Result = TypeVar("Result")
Listener = Callable[[int, int], None]  # is told the bytes that are lent, and of them those of residents

#: layers that pass through the device at once: one computes while the next is fetched
IN_FLIGHT = 2


class Memory(Protocol):
    """What a budget wants to know of its device, apart from its own books."""

    def in_use(self) -> InUse | None:
        """Return what is taken of the device, by anyone; None where the device cannot tell."""

    def release_cached(self) -> None:
        """Give memory that is only cached back to the device."""


class Borrower(Protocol):
    """A layer, as its budget sees it."""

    name: str
    computation_nbytes: int  # what the layer needs on the device while it computes
    staying_nbytes: int  # what it takes when it stays, without what an earlier layer of its model has, too
    always_passes: bool  # it needs copies to compute with even if it stays, since it stays in another dtype

    @property
    def last_called(self) -> int:
        """When a layer of its model was called last, by a clock that counts such calls in this process."""

    @property
    def beside_nbytes(self) -> int:
        """What computations of its model were seen to take of the device beside what was lent."""

    def try_demote(self) -> bool:
        """Leave the device now if that is possible without waiting; say whether it was done."""

    def yield_ahead_to(self, other: "Borrower", *, waits: bool = True) -> None:
        """Drop what was fetched ahead for this layer's model, unless that is the model of *other*.

        With *waits* also what is being fetched now, once it is there.
        """

    def finish_dropped(self) -> None:
        """Wait until nothing is left of a fetch for its model that goes on although it was dropped."""

    def drop_ahead(self) -> None:
        """Drop what was fetched ahead for its own model, and wait until nothing is left of it."""


@dataclass(frozen=True)
class BudgetStatistics:
    """A snapshot of a budget, in bytes."""

    device: torch.device
    lent_nbytes: int
    peak_nbytes: int
    residents: int
    refusals: int


@dataclass(frozen=True)
class Usage:
    """What a device says of its memory, and what its budget has lent of it, in bytes."""

    nbytes: int
    peak_nbytes: int
    lent_nbytes: int


@dataclass(frozen=True)
class _Entry:
    """One loan in the books; the borrower may die with its model, the entry then goes with its lease.

    What is *shared* stays for others, too, when its borrower leaves.
    """

    borrower: "weakref.ref[Borrower]"
    nbytes: int
    is_resident: bool
    is_shared: bool = False


class Lease:
    """Bytes that one borrower holds until it gives them back, or until it is garbage."""

    __slots__ = ("_budget", "_key", "nbytes")

    def __init__(self, budget: "Budget", key: int, nbytes: int) -> None:
        self._budget: Budget | None = budget
        self._key = key
        self.nbytes = nbytes

    def give_back(self) -> None:
        """Return the bytes; a second time is an error."""
        budget, self._budget = self._budget, None
        if budget is None:
            raise BudgetError(f"a lease of {self.nbytes:,} bytes is given back twice")
        budget._take_back(self._key)

    def __del__(self) -> None:
        if self._budget is not None:
            # garbage collection may strike while this thread holds the budget's lock: only leave a note
            self._budget._abandoned.append(self._key)


class Budget:
    """The books of one device. Limits come with each request, since models may have different ones."""

    def __init__(self, device: torch.device, memory: Memory | None = None) -> None:
        self.device = device
        self._own_memory = memory
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._keys = itertools.count()
        self._abandoned: deque[int] = deque()
        self._borrowers: weakref.WeakSet[Borrower] = weakref.WeakSet()
        self._largest: tuple[int, int] = (0, 0)  # for this many borrowers, the largest computation_nbytes
        self._passing: int | None = (
            0  # computation_nbytes of those that are not resident; None: to be counted
        )
        self._lent = self._staying = self._peak = self._refusals = 0
        self._listeners: tuple[Listener, ...] = ()

    @property
    def _memory(self) -> Memory:
        return device_of(self.device) if self._own_memory is None else self._own_memory

    def register(self, borrower: Borrower) -> None:
        """Make room for *borrower* whenever others want to stay; it need not be taken off again."""
        with self._lock:
            self._borrowers.add(borrower)
            self._largest, self._passing = (0, 0), None

    def try_borrow(self, borrower: Borrower, nbytes: int, *, limit: int | None) -> Lease | None:
        """Lend *nbytes* to a layer that wants to stay, or return None when it does not fit under *limit*."""
        with self._lock:
            self._collect()
            if limit is not None:
                ahead = self._lent - self._staying
                if not self._fits(nbytes, borrower, borrower.beside_nbytes, limit=limit, ahead=ahead):
                    self._refusals += 1
                    return None
            return self._lend(borrower, nbytes, is_resident=True)

    def try_keep(self, lease: Lease, *, limit: int | None) -> bool:
        """Let what was lent for a computation stay, if it fits under *limit*; say whether it may."""
        with self._lock:
            self._collect()
            entry = self._entries[lease._key]
            if entry.is_resident:
                return True
            if limit is not None:
                borrower = entry.borrower()
                beside = 0 if borrower is None else borrower.beside_nbytes
                if not self._fits(entry.nbytes, borrower, beside, limit=limit):
                    return False
            self._entries[lease._key] = dataclasses.replace(entry, is_resident=True)
            self._staying += entry.nbytes
            self._passing = None
            if self._listeners:
                self._tell()
            return True

    def borrow(self, borrower: Borrower, nbytes: int, *, limit: int | None) -> Lease:
        """Lend *nbytes* to a layer that is about to compute; others may be asked to make room.

        What was fetched ahead for other models goes first: unlike a resident it was not used yet. What was
        for the borrower's own goes last: it will be used next, unless layers are called in another order.
        """
        if limit is not None:
            most = limit - nbytes - borrower.beside_nbytes

            def is_enough() -> bool:
                return self._lent <= most

            if not self._is_so(is_enough):
                borrower.finish_dropped()
                self._ask_to_yield(borrower, is_enough)
                self._ask_to_leave(borrower, is_enough)
                if not self._is_so(is_enough):
                    borrower.drop_ahead()
        with self._lock:
            return self._lend(borrower, nbytes, is_resident=False)

    def split(self, lease: Lease, nbytes: int) -> Lease:
        """Return a lease of *nbytes* of those of *lease*, which keeps the rest, for what layers share."""
        with self._lock:
            entry, key = self._entries[lease._key], next(self._keys)
            self._entries[lease._key] = dataclasses.replace(entry, nbytes=entry.nbytes - nbytes)
            self._entries[key] = dataclasses.replace(entry, nbytes=nbytes, is_shared=True)
            lease.nbytes -= nbytes
            return Lease(self, key, nbytes)

    def borrow_ahead(self, borrower: Borrower, nbytes: int, *, limit: int | None) -> Lease | None:
        """Lend *nbytes* for a layer that will compute soon, or return None when they do not fit now."""
        with self._lock:
            self._collect()
            beside = borrower.beside_nbytes
            if limit is not None and self._lent + max(self._foreign(), beside) + nbytes > limit:
                return None
            return self._lend(borrower, nbytes, is_resident=False)

    def displace_idle(self, borrower: Borrower, nbytes: int, *, limit: int, since: int) -> bool:
        """Make models that were not called *since* give room to *borrower*'s, which lacks *nbytes*.

        Who was called longest ago goes first. Nobody is waited for.

        Returns:
            Whether anything was given back.
        """
        most = limit - nbytes - borrower.beside_nbytes
        with self._lock:
            self._collect()
            before = self._lent
            loans = [(entry.borrower(), entry.is_resident) for entry in self._entries.values()]
        idle = [(other, stays) for other, stays in loans if other is not None and other.last_called < since]
        for other, is_resident in sorted(idle, key=lambda loan: loan[0].last_called):
            if self._lent <= most:
                break
            if is_resident:
                other.try_demote()
            else:
                other.yield_ahead_to(borrower, waits=False)
        return self._lent < before

    def keep_under(self, limit: int, borrower: Borrower) -> None:
        """Make residents leave until *limit* holds with what was learned of *borrower*'s computations."""
        most = limit - borrower.beside_nbytes
        self._ask_to_leave(borrower, lambda: self._staying + min(self._headroom(), self._rest()) <= most)

    def usage(self) -> Usage:
        """Return what the device says now; all zero where it cannot tell."""
        with self._lock:
            self._collect()
            in_use = self._memory.in_use() or InUse(0, 0)
            return Usage(in_use.nbytes, in_use.peak_nbytes, self._lent)

    def room(self, borrowers: Sequence[Borrower], *, limit: int) -> int:
        """Return the bytes in which *borrowers* may stay, all together."""
        with self._lock:
            self._collect()
            theirs = {id(borrower) for borrower in borrowers}
            beside = max((borrower.beside_nbytes for borrower in borrowers), default=0)
            others = sum(
                entry.nbytes
                for entry in self._entries.values()
                if entry.is_resident and id(entry.borrower()) not in theirs
            )
            return max(0, limit - self._headroom() - max(self._foreign(), beside) - others)

    def demote_all(self) -> int:
        """Ask every resident to leave, e.g. after an allocation has failed; return how many did."""
        with self._lock:
            residents = self._residents()
        left = sum(resident.try_demote() for resident in residents)
        self._memory.release_cached()
        return left

    def retrying(self, attempt: Callable[[], Result], *, layer: str, doing: str) -> Result:
        """Return ``attempt()``; if the device is full, make all residents leave and try once more.

        Raises:
            BudgetExceededError: there was no memory the second time either.
        """
        try:
            return attempt()
        except OutOfMemory:
            left = self.demote_all()
            _log.warning('out of memory on %s while %s "%s"; %d layers left', self.device, doing, layer, left)
        try:
            return attempt()
        except OutOfMemory as error:
            raise BudgetExceededError(
                f'no memory on {self.device} for {doing} layer "{layer}", also after every layer that could '
                f"leave had left: {str(error).splitlines()[0]} Make the input smaller, or manage smaller "
                "parts of the model, so that less is on the device at once."
            ) from error

    @contextmanager
    def telling(self, listener: Listener) -> Iterator[None]:
        """Call *listener* in the block after each change, and at its beginning and end.

        It is called on any thread, one call at a time, and must not use the budget.
        """
        with self._lock:
            self._collect()
            self._listeners += (listener,)
            listener(self._lent, self._staying)
        try:
            yield
        finally:
            with self._lock:
                self._collect()
                listener(self._lent, self._staying)
                self._listeners = tuple(other for other in self._listeners if other is not listener)

    def reset_peak(self) -> None:
        """Let the peak begin at what is lent now."""
        with self._lock:
            self._collect()
            self._peak = self._lent

    def statistics(self) -> BudgetStatistics:
        """Return a snapshot."""
        with self._lock:
            residents = len(self._residents())
            return BudgetStatistics(self.device, self._lent, self._peak, residents, self._refusals)

    def __repr__(self) -> str:
        s = self.statistics()
        return f"<Budget {s.device} {s.lent_nbytes:,} bytes lent, {s.residents} residents>"

    def _is_so(self, question: Callable[[], bool]) -> bool:
        """Answer a *question* to the books."""
        with self._lock:
            self._collect()
            return question()

    def _ask_to_yield(self, borrower: Borrower, is_enough: Callable[[], bool]) -> None:
        """Ask models other than that of *borrower* to drop what they fetched ahead, until *is_enough*."""
        with self._lock:
            self._collect()
            if is_enough():
                return
            others = [entry.borrower() for entry in self._entries.values() if not entry.is_resident]
        for other in others:
            if other is not None:
                other.yield_ahead_to(borrower)
                if self._is_so(is_enough):
                    return

    def _ask_to_leave(self, borrower: Borrower, is_enough: Callable[[], bool]) -> None:
        """Ask residents other than *borrower* to leave until *is_enough*, a question to the books."""
        with self._lock:
            self._collect()
            if is_enough():
                return
            # the most recent resident first: it is the one that will be needed again last
            residents = self._residents()[::-1]
        for resident in residents:
            if resident is not borrower and resident.try_demote() and self._is_so(is_enough):
                return

    def _fits(
        self, nbytes: int, borrower: Borrower | None, beside: int, *, limit: int, ahead: int = 0
    ) -> bool:
        """Say whether so many bytes may stay beside the residents, and those who pass have room still."""
        passing = min(self._headroom(), self._rest(borrower))
        stay = self._staying + nbytes + max(passing, ahead)
        # the driver is asked last: it is slow, and our own books refuse most requests
        return stay + beside <= limit and stay + self._foreign() <= limit

    def _headroom(self) -> int:
        if self._largest[0] != len(self._borrowers):
            self._largest = (len(self._borrowers), max(b.computation_nbytes for b in self._borrowers))
            self._passing = None
        return IN_FLIGHT * self._largest[1]

    def _rest(self, staying: Borrower | None = None) -> int:
        """Return what would be there beside the residents, and *staying*, if everything was."""
        if self._passing is None:
            loans = [e.borrower() for e in self._entries.values() if e.is_resident and not e.is_shared]
            residents = set(map(id, loans))
            always = sum(b.computation_nbytes for b in self._borrowers if b.always_passes)
            others = (b for b in self._borrowers if not b.always_passes and id(b) not in residents)
            self._passing = always + sum(b.staying_nbytes for b in others)
        return self._passing - (0 if staying is None else _ceasing(staying))

    def _foreign(self) -> int:
        """Return the bytes of the device that are taken, but not by what this budget has lent."""
        in_use = self._memory.in_use()
        return 0 if in_use is None else max(0, in_use.nbytes - self._lent)

    def _lend(self, borrower: Borrower, nbytes: int, *, is_resident: bool) -> Lease:
        key = next(self._keys)
        self._entries[key] = _Entry(weakref.ref(borrower), nbytes, is_resident)
        self._lent += nbytes
        if is_resident:
            self._staying += nbytes
            self._passing = None if self._passing is None else self._passing - _ceasing(borrower)
        self._peak = max(self._peak, self._lent)
        if self._listeners:
            self._tell()
        return Lease(self, key, nbytes)

    def _take_back(self, key: int) -> None:
        with self._lock:
            self._strike_out(key)

    def _strike_out(self, key: int) -> None:
        entry = self._entries.pop(key)
        self._lent -= entry.nbytes
        if entry.is_resident:
            self._staying -= entry.nbytes
            self._passing = None
        if self._listeners:
            self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(self._lent, self._staying)

    def _residents(self) -> list[Borrower]:
        """Those that could leave, the longest resident first."""
        self._collect()
        alive = [entry.borrower() for entry in self._entries.values() if entry.is_resident]
        return [borrower for borrower in alive if borrower is not None]

    def _collect(self) -> None:
        """Strike out the loans of borrowers that are garbage."""
        while self._abandoned:
            self._strike_out(self._abandoned.popleft())


def _ceasing(borrower: Borrower) -> int:
    """Return what does not have to pass any more once *borrower* stays."""
    return 0 if borrower.always_passes else borrower.staying_nbytes


_BUDGETS: dict[torch.device, Budget] = {}
_BUDGETS_LOCK = threading.Lock()


def budget_of(device: torch.device) -> Budget:
    """Return the one budget of *device* in this process: models on one device share its memory."""
    with _BUDGETS_LOCK:
        if device not in _BUDGETS:
            _BUDGETS[device] = Budget(device)
        return _BUDGETS[device]
