"""Adding low-rank adapters to a weight itself, and taking them out again to the last bit.

Taking out by subtraction would leave rounding errors, so the weight as it was must come from somewhere:

* A weight on disk stays there. Its source gives it with the adapters added, each time that it is read; taking
  them out means to read the plain source again.
* A weight in memory is replaced by the sum, in its own dtype. If the source can give the weight again to the
  last bit, that is where it is taken from; if not, it is kept in host memory.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError
from offload_layers._placement import Placement
from offload_layers._residency import Residency
from offload_layers._source import Source, offered, owning
from offload_layers._transfer import convert, parameter_like
from offload_layers._weight import Weight

Adapters = tuple[tuple[Tensor, Tensor], ...]  # (A (rank, in), B (out, rank)), each the smaller for its weight
_PIECE = 1 << 22  # elements that are in float32 at a time


def added(base: Tensor, adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """Return *base* ``(out, in)`` with the products of *adapters*, summed in float32, in *dtype*."""
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    pairs = [
        (a.detach().to(base.device, torch.float32), b.detach().to(base.device, torch.float32))
        for a, b in adapters
    ]
    step = max(1, _PIECE // max(1, base.shape[1]))
    with torch.no_grad():
        for start in range(0, base.shape[0], step):
            rows = slice(start, start + step)
            total = convert(base[rows], Placement(base.device, torch.float32))
            for a, b in pairs:
                total = total.addmm(b[rows], a)
            out[rows] = total
    return out


class MergedSource(Mapping[str, Tensor]):
    """A source in which adapters are added to one tensor."""

    is_of_one_layer = True

    def __init__(self, plain: Source, name: str, adapters: Adapters, dtype: torch.dtype | None) -> None:
        self.plain = plain
        self._name = name
        self._adapters = adapters
        self._dtype = dtype  # for weights stored in eight bits, which are not rounded to them again
        if offered(plain, "prefetch") is not None:
            self.prefetch = plain.prefetch  # type: ignore[attr-defined]

    def with_threads(self, threads: int) -> "MergedSource":
        """Return the same source, reading with *threads* threads if it can be told so."""
        with_threads = offered(self.plain, "with_threads")
        plain = self.plain if with_threads is None else with_threads(threads)
        return MergedSource(plain, self._name, self._adapters, self._dtype)

    def owned(self) -> "MergedSource":
        """Return the same source such that it gives tensors in memory of their own."""
        return MergedSource(owning(self.plain), self._name, self._adapters, self._dtype)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.plain[name]
        if name != self._name:
            return tensor
        is_eight_bit = tensor.dtype.itemsize == 1
        return added(tensor, self._adapters, (is_eight_bit and self._dtype) or tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.plain


@dataclass
class Merge:
    """Adapters in one weight, and where the weight without them is."""

    adapters: Adapters
    merged: nn.Parameter  # what the model holds at rest
    version: int
    base: Tensor | None  # in host memory; None if the source gives it

    def is_intact(self, registered: nn.Parameter) -> bool:
        """Whether nobody has changed the weight since."""
        return registered is self.merged and registered._version == self.version

    def __deepcopy__(self, memo: dict[int, Any]) -> "Merge":
        merged = copy.deepcopy(self.merged, memo)
        version = merged._version if self.is_intact(self.merged) else -1
        return Merge(self.adapters, merged, version, self.base)  # nobody changes those two


def merge(residency: Residency, weight: Weight, adapters: Adapters) -> Merge:
    """Add *adapters* to *weight*, wherever it is."""
    made: list[Merge] = []

    def rebase(base: nn.Parameter) -> nn.Parameter:
        source = residency.source
        kept: Tensor | None = None
        if base.is_meta:
            assert source is not None, weight
            residency.source = MergedSource(source, weight.name, adapters, residency.policy.computation.dtype)
            new = parameter_like(base, torch.empty_like(base))  # a new one, so that nothing old is used
        else:
            new = parameter_like(base, added(base.detach(), adapters, base.dtype))
            kept = None if _can_be_read_again(base, weight, source) else base.detach().to("cpu")
        made.append(Merge(adapters, new, new._version, kept))
        return new

    with torch.inference_mode(False):
        residency.rebase(weight, rebase)
    return made[0]


def unmerge(residency: Residency, weight: Weight, merge: Merge) -> None:
    """Give *weight* the bits back that it had.

    Raises:
        ConfigError: the weight was changed after the adapters were added.
    """

    def rebase(merged: nn.Parameter) -> nn.Parameter:
        if not merge.is_intact(merged):
            raise ConfigError(
                f'"{weight.name}" was changed after adapters were merged into it, so they cannot be taken '
                "out again. Load the weight anew."
            )
        if merged.is_meta:
            assert isinstance(residency.source, MergedSource), weight
            residency.source = residency.source.plain
            return parameter_like(merged, torch.empty_like(merged))  # a new one, so that nothing old is used
        base = merge.base if merge.base is not None else weight.read(residency.source)
        return parameter_like(merged, convert(base, Placement(merged.device, merged.dtype)))

    with torch.inference_mode(False):
        residency.rebase(weight, rebase)


def _can_be_read_again(base: nn.Parameter, weight: Weight, source: Source | None) -> bool:
    if source is None or weight.name not in source:
        return False
    again = convert(weight.read(source), Placement(base.device, base.dtype))
    return _same_bits(again, base.detach())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integers: dict[int, Any] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    code = integers[a.element_size()]
    return torch.equal(a.contiguous().view(code), b.contiguous().view(code))
