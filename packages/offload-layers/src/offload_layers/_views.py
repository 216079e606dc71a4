"""Weights that are views of memory which their source has in any case: a mapped file, on a CPU.

Keeping such views takes nothing, and making them anew for each computation takes longer than all else around
a small layer. So they outlive the computation. They are still fetched, as far as anyone else can see: the
source is asked ahead for them, bytes are borrowed for them, and before they are used it renews them, as their
pages may have been taken back since, and the file may have changed.

Note [What lasts is made at once]
    What lasts is not to be made between activations: a small block in the middle of the heap keeps what was
    freed around it from being used as a whole, and from being given back. (A float32 model of 2 GB, 1,088
    tokens: mapped 170 to 420 MB more than its activations take.) So all layers of a model
    make their views, and the copies that they keep, at the beginning of the first forward.
"""

from collections.abc import Callable

from torch import Tensor

from offload_layers._prefetch import MadeFrom
from offload_layers._weight import Weight


class Views:
    """Those of one layer.

    Attributes:
        tensors: A view for each weight.
        made_from: What they are views of.
        version: Of what the model held at rest when they were made.
    """

    def __init__(
        self,
        weights: list[Weight],
        tensors: list[Tensor],
        made_from: MadeFrom,
        version: int,
        renew: Callable[[list[str]], bool],
    ) -> None:
        self.tensors = tensors
        self.made_from = made_from
        self.version = version
        self._weights = list(weights)
        self._names = [weight.name for weight in weights]
        self._renew = renew

    def renew(self) -> bool:
        """Make them fit to compute with now; say no if they have to be made again."""
        if not self._renew(self._names):
            return False
        for weight, view in zip(self._weights, self.tensors, strict=True):
            trains = weight.registered.requires_grad  # requires_grad_() reaches what is registered only
            if view.requires_grad != trains:
                view.requires_grad_(trains)
        return True
