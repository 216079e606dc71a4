"""What layers share stays shared: one copy for all layers of a model that have the same parameter.

Each layer brings its weights to where they rest by itself. A parameter of several layers (an embedding that
is the head as well) would come to rest once for each of them, and a change of one copy would not be seen in
the other. So whoever needs a copy in some placement gets that of a layer which has one already.
"""

import threading
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from offload_layers._changes import Fingerprint, fingerprint
from offload_layers._packed import PackedWeight
from offload_layers._placement import Placement
from offload_layers._source import Source, offered
from offload_layers._weight import Weight

Make = Callable[[Weight], nn.Parameter]
_Key = tuple[int, str, Placement]


@dataclass(frozen=True)
class _Copy:
    made_from: "weakref.ref[nn.Parameter]"
    made_as: Fingerprint
    parameter: "weakref.ref[nn.Parameter]"

    def is_of(self, registered: nn.Parameter) -> bool:
        """Whether it was made from *registered* as that is now."""
        return self.made_from() is registered and self.made_as == fingerprint(registered)


class SharedCopies:
    """The copies that layers of one model hold, which they keep alive, not this; and who rests on what."""

    def __init__(self) -> None:
        self._holders: MutableMapping[nn.Parameter, weakref.WeakSet[Any]] = WeakTensorKeyDictionary()
        self._copies: dict[_Key, _Copy] = {}
        self._lock = threading.RLock()

    def join(self, layer: object, home: nn.Parameter) -> None:
        """Learn that *layer* has *home* for values at rest."""
        with self._lock:
            self._holders.setdefault(home, weakref.WeakSet()).add(layer)

    def holders(self, home: nn.Parameter) -> list[Any]:
        """Return the layers that have had *home* for values at rest."""
        with self._lock:
            return list(self._holders.get(home, ()))

    def of(self, weight: Weight, placement: Placement, source: Source | None, make: Make) -> nn.Parameter:
        """Return the copy of *weight* in *placement* that another layer has, or what *make* gives."""
        registered = weight.registered
        if isinstance(weight, PackedWeight) or placement.holds(registered):
            return make(weight)
        key = (id(registered), _name_in(source, weight), placement)
        with self._lock:
            known = self._copies.get(key)
            if known is not None and known.is_of(registered):
                copy = known.parameter()
                if copy is not None:
                    return copy
            copy = make(weight)
            if copy is not registered:
                reference = weakref.ref(copy, lambda gone: self._forget(key, gone))
                self._copies[key] = _Copy(weakref.ref(registered), fingerprint(registered), reference)
            return copy

    def _forget(self, key: _Key, gone: "weakref.ref[nn.Parameter]") -> None:
        known = self._copies.get(key)
        if known is not None and known.parameter is gone:
            del self._copies[key]


def _name_in(source: Source | None, weight: Weight) -> str:
    """Return where the values come from: a source may have some of its own under each name of a tie."""
    if not weight.registered.is_meta:
        return ""
    stored_name = offered(source, "stored_name")
    return weight.name if stored_name is None else str(stored_name(weight.name))
