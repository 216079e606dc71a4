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
Place = tuple["weakref.ref[Layer] | None", "weakref.ref[Layer] | None"]


class ExecutionOrder(Generic[Layer]):
    """Which layer follows which. Layers are held weakly; each thread has a place of its own in the order.

    A place is the last two layers that were called.
    """

    def __init__(self) -> None:
        self._after_pair: dict[Place[Layer], weakref.ref[Layer]] = {}
        self._after_one: dict[weakref.ref[Layer], weakref.ref[Layer]] = {}
        self._local = threading.local()

    @property
    def place(self) -> "Place[Layer]":
        """Where this thread is."""
        place: Place[Layer] = getattr(self._local, "place", (None, None))
        return place

    @property
    def count(self) -> int:
        """How many steps from layer to layer are known."""
        return len(self._after_pair)

    def saw(self, layer: Layer) -> None:
        """Learn that this thread calls *layer* now."""
        before, last = self.place
        now = weakref.ref(layer)
        if last is not None:
            self._after_pair[before, last] = now
            self._after_one[last] = now
        self._local.place = last, now

    def following(self, place: "Place[Layer]") -> "tuple[Layer, Place[Layer]] | None":
        """Return the layer that is called after *place*, and the place that it leads to; None if unknown."""
        last = place[1]
        if last is None:
            return None
        reference = self._after_pair.get(place) or self._after_one.get(last)
        layer = None if reference is None else reference()
        return None if layer is None else (layer, (last, reference))

    def upcoming(self) -> Iterator[Layer]:
        """Yield the layers that this thread will call next, as far as they were seen, each step once."""
        place, steps = self.place, set()
        while (found := self.following(place)) is not None:
            layer, place = found
            if place in steps:
                return
            steps.add(place)
            yield layer
