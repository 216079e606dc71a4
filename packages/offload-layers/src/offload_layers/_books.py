"""What is lent of one device: to whom, how much of it stays, and what more would if everything did.

Whoever uses the books holds a lock meanwhile. Only ``abandoned`` may be written at any time.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

Listener = Callable[[int, int], None]  # is told the bytes that are lent, and of them those of residents


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

    def is_idle(self, since: int) -> bool:
        """Say whether its model was really not called *since*, although all of it may be resident."""

    def yield_ahead_to(self, other: "Borrower", *, waits: bool = True) -> None:
        """Drop what was fetched ahead for this layer's model, unless that is the model of *other*.

        With *waits* also what is being fetched now, once it is there.
        """

    def finish_dropped(self) -> None:
        """Wait until nothing is left of a fetch for its model that goes on although it was dropped."""

    def drop_ahead(self) -> None:
        """Drop what was fetched ahead for its own model, and wait until nothing is left of it."""


class Entry(NamedTuple):
    """One loan in the books; the borrower may die with its model, the entry then goes with its lease.

    What is *shared* stays for others, too, when its borrower leaves.
    """

    borrower: "weakref.ref[Borrower]"
    nbytes: int
    is_resident: bool
    is_shared: bool = False


class Books:
    """The loans of one device.

    Attributes:
        entries: By their keys, the oldest first.
        lent: Bytes of all of them.
        staying: Bytes of residents.
        peak: Most bytes that were lent at once.
        abandoned: Keys of loans that garbage collection has ended, to be struck out by ``collect``.
        listeners: Are told of each change.
    """

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.lent = self.staying = self.peak = 0
        self.abandoned: deque[int] = deque()
        self.listeners: tuple[Listener, ...] = ()
        self._keys = itertools.count()
        self._borrowers: weakref.WeakSet[Borrower] = weakref.WeakSet()
        self._largest: tuple[int, int] = (0, 0)  # for this many borrowers, the largest computation_nbytes
        self._passing: int | None = None  # what more would be there if everything stayed; None: to be counted

    def register(self, borrower: Borrower) -> None:
        """Count *borrower* among those who may come, as what it says of itself now."""
        self._borrowers.add(borrower)
        self._largest, self._passing = (0, 0), None

    def lend(self, borrower: Borrower, nbytes: int, *, is_resident: bool) -> int:
        """Enter a loan, and return its key."""
        key = next(self._keys)
        self.entries[key] = Entry(weakref.ref(borrower), nbytes, is_resident)
        self.lent += nbytes
        if is_resident:
            self.staying += nbytes
            self._passing = None if self._passing is None else self._passing - _ceasing(borrower)
        self.peak = max(self.peak, self.lent)
        self.tell()
        return key

    def split(self, key: int, nbytes: int) -> int:
        """Enter *nbytes* of a loan as one of its own, which is shared, and return its key."""
        entry, new = self.entries[key], next(self._keys)
        self.entries[key] = entry._replace(nbytes=entry.nbytes - nbytes)
        self.entries[new] = entry._replace(nbytes=nbytes, is_shared=True)
        return new

    def keep(self, key: int) -> None:
        """Let a loan be that of a resident from now on."""
        entry = self.entries[key]
        self.entries[key] = entry._replace(is_resident=True)
        self.staying += entry.nbytes
        self._passing = None
        self.tell()

    def strike_out(self, key: int) -> None:
        """End a loan."""
        entry = self.entries.pop(key)
        self.lent -= entry.nbytes
        if entry.is_resident:
            self.staying -= entry.nbytes
            self._passing = None
        self.tell()

    def collect(self) -> None:
        """Strike out the loans of borrowers that are garbage."""
        while self.abandoned:
            self.strike_out(self.abandoned.popleft())

    def tell(self) -> None:
        """Tell the listeners how things are."""
        for listener in self.listeners:
            listener(self.lent, self.staying)

    def residents(self) -> list[Borrower]:
        """Return those that could leave, the longest resident first."""
        alive = [entry.borrower() for entry in self.entries.values() if entry.is_resident]
        return [borrower for borrower in alive if borrower is not None]

    def passing_by(self) -> list[Borrower]:
        """Return those who have borrowed without being resident."""
        alive = [entry.borrower() for entry in self.entries.values() if not entry.is_resident]
        return [borrower for borrower in alive if borrower is not None]

    def headroom(self, layers: int, staying: Borrower | None = None) -> int:
        """Return what so many *layers* need at most that pass, once *staying* is resident.

        That is no more than what would be there beside the residents if everything was.
        """
        if self._largest[0] != len(self._borrowers):
            self._largest = (len(self._borrowers), max(b.computation_nbytes for b in self._borrowers))
            self._passing = None
        if self._passing is None:
            loans = [e.borrower() for e in self.entries.values() if e.is_resident and not e.is_shared]
            residents = set(map(id, loans))
            always = sum(b.computation_nbytes for b in self._borrowers if b.always_passes)
            others = (b for b in self._borrowers if not b.always_passes and id(b) not in residents)
            self._passing = always + sum(b.staying_nbytes for b in others)
        return min(layers * self._largest[1], self._passing - (0 if staying is None else _ceasing(staying)))


def _ceasing(borrower: Borrower) -> int:
    """Return what does not have to pass any more once *borrower* stays."""
    return 0 if borrower.always_passes else borrower.staying_nbytes
