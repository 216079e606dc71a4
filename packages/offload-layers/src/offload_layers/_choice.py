"""Which layers should stay on the device when not all can: a pure decision.

What does not stay crosses the bus again in each forward, while other layers compute. A layer whose bytes
hide behind computation gains nothing by staying. So the residents are chosen such that what remains asks for
the least bandwidth at its busiest moment: then the bus is as slow as it may be before computation must wait.

Source: with equal layers this spreads the residents evenly over the forward, which was measured to be worth
more than fetching deeper ahead (sglang issue 31538: 36.7 s against 56.1 s).
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

_ENDLESS = 1e30
_STEPS = 30  # of the binary search; 2**-30 of the range is exact enough


@dataclass(frozen=True)
class Demand:
    """What one layer asks for in a forward.

    Attributes:
        nbytes: Bytes that cross the bus if the layer does not stay.
        work: Computation that can hide them, in any unit that is the same for all layers.
        is_from_disk: Whether they are then read from disk first.
    """

    nbytes: int
    work: float
    is_from_disk: bool = False


def choose_residents(demands: Sequence[Demand], *, room: int, window: int) -> frozenset[int]:
    """Return the indices of the layers that should stay.

    Args:
        demands: The layers in the order in which they are called.
        room: Bytes that residents may take.
        window: Bytes that can be fetched ahead, so that a short rush evens out.
    """
    if sum(demand.nbytes for demand in demands) <= room:
        return frozenset(range(len(demands)))
    on_disk = {index for index, demand in enumerate(demands) if demand.is_from_disk}
    if 0 < len(on_disk) < len(demands):  # the disk is slower than the bus: those come first
        first = _choose_among(on_disk, demands, room, window)
        if first < on_disk:
            return _fill(demands, set(first), room)
        others = set(range(len(demands))) - on_disk
        return first | _choose_among(others, demands, room - _bytes_of(demands, on_disk), window)
    window = max(window, *(demand.nbytes for demand in demands))  # any layer must pass
    work = sum(demand.work for demand in demands)
    if work <= 0:
        demands = [Demand(demand.nbytes, float(demand.nbytes)) for demand in demands]
        work = float(sum(demand.nbytes for demand in demands)) or 1.0
    low, high = 0.0, 2.0 * sum(demand.nbytes for demand in demands) / work
    while _bytes_of(demands, _needed(demands, high, window)) > room:
        if high > _ENDLESS:  # layers without any work in a row, more than fit
            return _fill(demands, set(), room)
        high *= 2
    for _ in range(_STEPS):
        pace = (low + high) / 2
        if _bytes_of(demands, _needed(demands, pace, window)) > room:
            low = pace
        else:
            high = pace
    return _fill(demands, _needed(demands, high, window), room)


def adapt_residents(
    residents: AbstractSet[int], demands: Sequence[Demand], *, room: int, window: int
) -> frozenset[int]:
    """Return *residents* with as few changes as *room* asks for: each one is a layer to be moved."""
    if _bytes_of(demands, residents) > room:
        residents = _choose_among(residents, demands, room, window)
    return _fill(demands, set(residents), room)


def _choose_among(
    indices: AbstractSet[int], demands: Sequence[Demand], room: int, window: int
) -> frozenset[int]:
    """Choose from those at *indices* only."""
    theirs = [Demand(d.nbytes if index in indices else 0, d.work) for index, d in enumerate(demands)]
    return choose_residents(theirs, room=room, window=window) & indices


def _needed(demands: Sequence[Demand], pace: float, window: int) -> set[int]:
    """Return who must stay so that a bus that moves *pace* bytes per unit of work is never late."""
    residents: set[int] = set()
    ahead = float(window)
    for _ in range(2):  # the second time with what the end of a forward leaves to the next one
        for index, demand in enumerate(demands):
            if index not in residents:
                ahead -= demand.nbytes
                if ahead < 0:
                    residents.add(index)
                    ahead += demand.nbytes
            ahead = min(float(window), ahead + pace * demand.work)
    return residents


def _fill(demands: Sequence[Demand], residents: set[int], room: int) -> frozenset[int]:
    """Add layers while there is room: those that are farthest from a resident first."""
    count = len(demands)
    left = room - _bytes_of(demands, residents)
    distances = [count] * count

    def add(resident: int) -> None:
        for index, distance in enumerate(distances):
            steps = abs(index - resident)
            distances[index] = min(distance, steps, count - steps)

    for resident in residents:
        add(resident)
    chosen = set(residents)
    while True:
        fitting = [i for i in range(count) if distances[i] and 0 < demands[i].nbytes <= left]
        if not fitting:
            return frozenset(chosen)
        farthest = max(fitting, key=distances.__getitem__)
        chosen.add(farthest)
        add(farthest)
        left -= demands[farthest].nbytes


def _bytes_of(demands: Sequence[Demand], indices: AbstractSet[int]) -> int:
    return sum(demands[index].nbytes for index in indices)
