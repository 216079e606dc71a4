"""What a layer's weights cost: how often they were there in time, what was waited for, what was moved."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """The counts of one layer, for the calls in which its weights did not rest where it computes.

    All are changed under the layer's lock, except ``ahead_nbytes``, which only the reader thread changes. To
    begin anew, a layer is given new ones.

    Attributes:
        hits: Calls whose weights were ready: fetched ahead, or kept since the last call.
        waits: Calls whose weights were on their way.
        misses: Calls that had to fetch their weights.
        waited_s: Seconds which these calls, on the host, have waited for weights or fetched them.
        own_nbytes: Bytes that the layer has moved to its compute device, as they are stored.
        ahead_nbytes: Bytes that were moved ahead of its calls.
    """

    hits: int = 0
    waits: int = 0
    misses: int = 0
    waited_s: float = 0.0
    own_nbytes: int = 0
    ahead_nbytes: int = 0

    @property
    def calls(self) -> int:
        """Calls whose weights did not rest where the layer computes."""
        return self.hits + self.waits + self.misses

    @property
    def moved_nbytes(self) -> int:
        """Bytes moved to the compute device, by whom ever; also those that were then not used."""
        return self.own_nbytes + self.ahead_nbytes
