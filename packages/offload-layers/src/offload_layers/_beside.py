"""What computations take of a device beside the weights: activations and workspaces.

It is learned while layers compute, if nobody has told beforehand. The device counts the most bytes that this
process' tensors ever took; where that count has grown while a layer computed, the layer has reached it.
Where it has not, something else did earlier, a text encoder, say; then the layer has taken at most what there
was at its beginning and all that was given out since. What was learned stays known: a later computation that
takes less changes nothing, one that takes more is learned in turn. What other programs have is not learned,
since they may give it back: the budget adds what the driver says.
"""

import threading
from collections import Counter

from offload_layers._books import Borrower
from offload_layers._budget import Budget, Usage


class Beside:
    """Learns for one model; threads may share it.

    Attributes:
        nbytes: The most that was seen, in bytes.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self.nbytes = nbytes
        self._computing: Counter[int] = Counter()  # by id: how often each layer is at it
        self._begun = Usage(0, 0, 0, 0)
        self._lock = threading.Lock()

    def begin(self, layer: Borrower, budget: Budget) -> None:
        """Take note that *layer* begins to compute."""
        with self._lock:
            if not self._computing:
                self._begun = budget.usage()
            self._computing[id(layer)] += 1

    def end(self, layer: Borrower, budget: Budget) -> bool:
        """Learn from what *layer* has taken before it gives anything back; say whether it was more."""
        if not self._computing[id(layer)]:  # it began while there was no limit
            return False
        usage = budget.usage()
        with self._lock:
            self._computing[id(layer)] -= 1
            if not self._computing[id(layer)]:
                del self._computing[id(layer)]
            begun, self._begun = self._begun, usage
            given = usage.ever_nbytes - begun.ever_nbytes
            has_reached = usage.peak_nbytes > begun.peak_nbytes
            seen = usage.peak_nbytes if has_reached else min(usage.peak_nbytes, begun.nbytes + given)
            before, self.nbytes = self.nbytes, max(self.nbytes, max(seen, usage.nbytes) - usage.lent_nbytes)
            return self.nbytes > before
