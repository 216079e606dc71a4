"""The order in which a model calls its layers, learned while it runs.

Models call their layers in the same order forward after forward, and most call each layer once. Some call
one twice, or take another path now and then. So what follows is predicted from the last *two* layers, or
from the last one where that pair is new. A wrong prediction costs time, never correctness.
"""

import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Layer = TypeVar("Layer")


class ExecutionOrder(Generic[Layer]):
    """Which layer follows which. Layers are held weakly; each thread has a place of its own in the order."""

    def __init__(self) -> None:
        self._after_pair: dict[tuple[weakref.ref[Layer] | None, weakref.ref[Layer]], weakref.ref[Layer]] = {}
        self._after_one: dict[weakref.ref[Layer], weakref.ref[Layer]] = {}
        self._place = threading.local()

    def saw(self, layer: Layer) -> None:
        """Learn that this thread calls *layer* now."""
        before, last = self._pair()
        now = weakref.ref(layer)
        if last is not None:
            self._after_pair[before, last] = now
            self._after_one[last] = now
        self._place.pair = (last, now)

    def upcoming(self) -> Iterator[Layer]:
        """Yield the layers that this thread will call next, as far as they were seen, each step once."""
        before, last = self._pair()
        if last is None:
            return
        steps = set()
        while True:
            following = self._after_pair.get((before, last)) or self._after_one.get(last)
            layer = None if following is None else following()
            if following is None or layer is None or (last, following) in steps:
                return
            steps.add((last, following))
            yield layer
            before, last = last, following

    def _pair(self) -> tuple["weakref.ref[Layer] | None", "weakref.ref[Layer] | None"]:
        pair: tuple[weakref.ref[Layer] | None, weakref.ref[Layer] | None]
        pair = getattr(self._place, "pair", (None, None))
        return pair
