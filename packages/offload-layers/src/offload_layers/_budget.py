"""A ceiling on the bytes that layers hold on one device.

Bytes are borrowed before they are allocated. A layer that wants to *stay* on the device is refused when
it does not fit; a layer that must *compute* is never refused, but others are asked to leave first. So
room is kept free of residents for the largest layer and for the one that is fetched ahead, unless everything
fits, and for what computations take beside weights (see ``_beside``). So the limit holds; layers larger than
it run alone.

Changing the books happens under one lock; moving tensors happens outside of it.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from offload_layers._books import Books, Borrower, Listener
from offload_layers._device import InUse, OutOfMemory, device_of
from offload_layers._errors import BudgetError, BudgetExceededError

_log = logging.getLogger("offload_layers.budget")
Result = TypeVar("Result")

#: layers that pass through the device at once: one computes while the next is fetched
IN_FLIGHT = 2


class Memory(Protocol):
    """What a budget wants to know of its device, apart from its own books."""

    def in_use(self) -> InUse | None:
        """Return what is taken of the device, by anyone; None where the device cannot tell."""

    def release_cached(self) -> None:
        """Give memory that is only cached back to the device."""


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
    """What this process' tensors take of a device, as in ``InUse``, and what is lent of it, in bytes."""

    nbytes: int
    peak_nbytes: int
    ever_nbytes: int
    lent_nbytes: int


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
            self._budget._books.abandoned.append(self._key)


class Budget:
    """The books of one device. Limits come with each request, since models may have different ones."""

    def __init__(self, device: torch.device, memory: Memory | None = None) -> None:
        self.device = device
        self._own_memory = memory
        self._lock = threading.Lock()
        self._books = Books()
        self._refusals = 0
        self._others_nbytes = 0  # what other programs have of the device, when it was last asked

    @property
    def _memory(self) -> Memory:
        return device_of(self.device) if self._own_memory is None else self._own_memory

    def register(self, borrower: Borrower) -> None:
        """Make room for *borrower* whenever others want to stay; it need not be taken off again."""
        with self._lock:
            self._books.register(borrower)

    def try_borrow(self, borrower: Borrower, nbytes: int, *, limit: int | None) -> Lease | None:
        """Lend *nbytes* to a layer that wants to stay, or return None when it does not fit under *limit*."""
        with self._lock:
            self._books.collect()
            if limit is not None:
                ahead = self._books.lent - self._books.staying
                if not self._fits(nbytes, borrower, limit=limit, ahead=ahead):
                    self._refusals += 1
                    return None
            return self._lend(borrower, nbytes, is_resident=True)

    def try_keep(self, lease: Lease, *, limit: int | None) -> bool:
        """Let what was lent for a computation stay, if it fits under *limit*; say whether it may."""
        with self._lock:
            self._books.collect()
            entry = self._books.entries[lease._key]
            if entry.is_resident:
                return True
            if limit is not None and not self._fits(entry.nbytes, entry.borrower(), limit=limit):
                return False
            self._books.keep(lease._key)
            return True

    def borrow(self, borrower: Borrower, nbytes: int, *, limit: int | None) -> Lease:
        """Lend *nbytes* to a layer that is about to compute; others may be asked to make room.

        What was fetched ahead for other models goes first: unlike a resident it was not used yet. What was
        for the borrower's own goes last: it will be used next, unless layers are called in another order.
        """
        if limit is not None:
            most = limit - nbytes - self._beside(borrower)

            def is_enough() -> bool:
                return self._books.lent <= most

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
            key = self._books.split(lease._key, nbytes)
            lease.nbytes -= nbytes
            return Lease(self, key, nbytes)

    def borrow_ahead(self, borrower: Borrower, nbytes: int, *, limit: int | None) -> Lease | None:
        """Lend *nbytes* for a layer that will compute soon, or return None when they do not fit now."""
        with self._lock:
            self._books.collect()
            beside = self._beside(borrower)
            if limit is not None and self._books.lent + max(self._foreign(), beside) + nbytes > limit:
                return None
            return self._lend(borrower, nbytes, is_resident=False)

    def displace_idle(self, borrower: Borrower, nbytes: int, *, limit: int, since: int) -> bool:
        """Make models that were not called *since* give room to *borrower*'s, which lacks *nbytes*.

        Who was called longest ago goes first. Nobody is waited for.

        Returns:
            Whether anything was given back.
        """
        most = limit - nbytes - self._beside(borrower)
        with self._lock:
            self._books.collect()
            before = self._books.lent
            loans = [(entry.borrower(), entry.is_resident) for entry in self._books.entries.values()]
        idle = [(other, stays) for other, stays in loans if other is not None and other.last_called < since]
        for other, is_resident in sorted(idle, key=lambda loan: loan[0].last_called):
            if self._books.lent <= most:
                break
            if not is_resident:
                other.yield_ahead_to(borrower, waits=False)
            elif other.is_idle(since):
                other.try_demote()
        return self._books.lent < before

    def keep_under(self, limit: int, borrower: Borrower) -> bool:
        """Make others leave until *limit* holds with what was learned of *borrower*'s computations.

        Returns:
            Whether it holds.
        """
        most = limit - self._beside(borrower)

        def is_enough() -> bool:
            return self._books.staying + self._books.headroom(IN_FLIGHT) <= most

        self._ask_to_leave(borrower, is_enough)
        return self._is_so(is_enough)

    def usage(self) -> Usage:
        """Return what the device says now; all zero where it cannot tell."""
        with self._lock:
            self._books.collect()
            in_use = self._in_use()
            return Usage(in_use.nbytes, in_use.peak_nbytes, in_use.ever_nbytes, self._books.lent)

    def room(self, borrowers: Sequence[Borrower], *, limit: int) -> int:
        """Return the bytes in which *borrowers* may stay, all together."""
        with self._lock:
            self._books.collect()
            theirs = {id(borrower) for borrower in borrowers}
            foreign = self._foreign()
            beside = max((self._beside(borrower) for borrower in borrowers), default=0)
            others = sum(
                entry.nbytes
                for entry in self._books.entries.values()
                if entry.is_resident and id(entry.borrower()) not in theirs
            )
            return max(0, limit - self._books.headroom(IN_FLIGHT) - max(foreign, beside) - others)

    def demote_all(self) -> int:
        """Ask every resident to leave, e.g. after an allocation has failed; return how many did."""
        with self._lock:
            self._books.collect()
            residents = self._books.residents()
        left = sum(resident.try_demote() for resident in residents)
        self._memory.release_cached()
        return left

    def make_room(self, borrower: Borrower) -> int:
        """Have all leave who can, and drop all that was fetched ahead; return how many left.

        Not for a thread that fetches: it would wait for itself.
        """
        borrower.drop_ahead()
        self._ask_to_yield(borrower, lambda: False)
        return self.demote_all()

    def release_cached(self) -> None:
        """Have the device give back what is only cached."""
        self._memory.release_cached()

    def retrying(
        self,
        attempt: Callable[[], Result],
        *,
        layer: str,
        doing: str,
        make_room: Callable[[], int],
    ) -> Result:
        """Return ``attempt()``; if the device is full, make room and try once more.

        Args:
            attempt: What needs memory.
            layer: For which layer, in messages.
            doing: What it does for it, in messages.
            make_room: Is called if the device is full; returns how many layers left.

        Raises:
            BudgetExceededError: there was no memory the second time either.
        """
        try:
            return attempt()
        except OutOfMemory:
            left = make_room()
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
        books = self._books
        with self._lock:
            books.collect()
            books.listeners += (listener,)
            listener(books.lent, books.staying)
        try:
            yield
        finally:
            with self._lock:
                books.collect()
                listener(books.lent, books.staying)
                books.listeners = tuple(other for other in books.listeners if other is not listener)

    def reset_peak(self) -> None:
        """Let the peak begin at what is lent now."""
        with self._lock:
            self._books.collect()
            self._books.peak = self._books.lent

    def statistics(self) -> BudgetStatistics:
        """Return a snapshot."""
        with self._lock:
            books = self._books
            books.collect()
            residents = len(books.residents())
            return BudgetStatistics(self.device, books.lent, books.peak, residents, self._refusals)

    def __repr__(self) -> str:
        s = self.statistics()
        return f"<Budget {s.device} {s.lent_nbytes:,} bytes lent, {s.residents} residents>"

    def _is_so(self, question: Callable[[], bool]) -> bool:
        """Answer a *question* to the books."""
        with self._lock:
            self._books.collect()
            return question()

    def _ask_to_yield(self, borrower: Borrower, is_enough: Callable[[], bool]) -> None:
        """Ask models other than that of *borrower* to drop what they fetched ahead, until *is_enough*."""
        with self._lock:
            self._books.collect()
            if is_enough():
                return
            others = self._books.passing_by()
        for other in others:
            other.yield_ahead_to(borrower)
            if self._is_so(is_enough):
                return

    def _ask_to_leave(self, borrower: Borrower, is_enough: Callable[[], bool]) -> None:
        """Ask residents other than *borrower* to leave until *is_enough*, a question to the books."""
        with self._lock:
            self._books.collect()
            if is_enough():
                return
            # the most recent resident first: it is the one that will be needed again last
            residents = self._books.residents()[::-1]
        for resident in residents:
            if resident is not borrower and resident.try_demote() and self._is_so(is_enough):
                return

    def _fits(self, nbytes: int, borrower: Borrower | None, *, limit: int, ahead: int = 0) -> bool:
        """Say whether so many bytes may stay beside the residents, and those who pass have room still."""
        stay = self._books.staying + nbytes + max(self._books.headroom(IN_FLIGHT, borrower), ahead)
        beside = 0 if borrower is None else self._beside(borrower)
        # the driver is asked last: it is slow, and our own books refuse most requests
        return stay + beside <= limit and stay + self._foreign() <= limit

    def _foreign(self) -> int:
        """Return the bytes of the device that are taken, but not by what this budget has lent."""
        in_use = self._in_use()
        return max(0, in_use.nbytes + in_use.others_nbytes - self._books.lent)

    def _beside(self, borrower: Borrower) -> int:
        """Return the bytes that are not for weights while the model of *borrower* computes."""
        return borrower.beside_nbytes + self._others_nbytes

    def _in_use(self) -> InUse:
        in_use = self._memory.in_use() or InUse(0, 0)
        self._others_nbytes = in_use.others_nbytes
        return in_use

    def _lend(self, borrower: Borrower, nbytes: int, *, is_resident: bool) -> Lease:
        return Lease(self, self._books.lend(borrower, nbytes, is_resident=is_resident), nbytes)

    def _take_back(self, key: int) -> None:
        with self._lock:
            self._books.strike_out(key)


_BUDGETS: dict[torch.device, Budget] = {}


def budget_of(device: torch.device) -> Budget:
    """Return the one budget of *device* in this process: models on one device share its memory."""
    if device not in _BUDGETS:
        _BUDGETS.setdefault(device, Budget(device))  # another thread may have been faster
    return _BUDGETS[device]
