"""What computations take of a device beside the weights: activations, workspaces, other programs.

It is learned while layers compute, if nobody has told beforehand. The device counts the most bytes that were
ever in use; where that count has grown while a layer computed, the layer has reached it. What was learned
stays known: a later computation that takes less changes nothing, one that takes more is learned in turn.
"""

import threading
from collections import Counter

from offload_layers._books import Borrower
from offload_layers._budget import Budget


class Beside:
    """Learns for one model; threads may share it.

    Attributes:
        nbytes: The most that was seen, in bytes.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self.nbytes = nbytes
        self._computing: Counter[int] = Counter()  # by id: how often each layer is at it
        self._peak = 0
        self._lock = threading.Lock()

    def begin(self, layer: Borrower, budget: Budget) -> None:
        """Take note that *layer* begins to compute."""
        with self._lock:
            if not self._computing:
                self._peak = budget.usage().peak_nbytes
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
            seen = usage.peak_nbytes if usage.peak_nbytes > self._peak else usage.nbytes
            self._peak = usage.peak_nbytes
            before, self.nbytes = self.nbytes, max(self.nbytes, seen - usage.lent_nbytes)
            return self.nbytes > before
