"""Parts of one tensor of a map: stored, computed by a converter, or in memory."""

from dataclasses import dataclass

from torch import Tensor

from safemap._buffers import assign
from safemap._layout import Entry
from safemap._lazy_value import Computed
from safemap._read import Reader
from safemap._slice import Cuts, Part


def part_of(name: str, entry: Entry | Tensor | Computed, reader: Reader) -> Part:
    """Return how parts of a tensor are read."""
    if isinstance(entry, Tensor):
        return _PartInMemory(name, entry, reader)
    if isinstance(entry, Computed):
        return _PartComputed(name, entry, reader)
    return _PartStored(name, entry, reader)


@dataclass(frozen=True, slots=True)
class _PartStored:
    name: str
    entry: Entry
    reader: Reader

    def read(self, cuts: Cuts) -> Tensor:
        return self.reader.read_ranges(self.name, self.entry, cuts)

    def read_into(self, cuts: Cuts, out: Tensor) -> None:
        self.reader.read_ranges_into(self.name, self.entry, cuts, out)

    def nbytes(self, cuts: Cuts) -> int:
        return self.reader.ranges_nbytes(self.name, self.entry, cuts)


@dataclass(frozen=True, slots=True)
class _PartComputed:
    name: str
    value: Computed
    reader: Reader

    def read(self, cuts: Cuts) -> Tensor:
        return self.value.read_ranges(self.name, self.reader, cuts)

    def read_into(self, cuts: Cuts, out: Tensor) -> None:
        self.value.read_ranges_into(self.reader, cuts, out)

    def nbytes(self, cuts: Cuts) -> int:
        return self.value.ranges_nbytes(cuts)


@dataclass(frozen=True, slots=True)
class _PartInMemory:
    """Of a file that had to be read as a whole, when it was opened."""

    name: str
    tensor: Tensor
    reader: Reader

    def read(self, cuts: Cuts) -> Tensor:
        return self.reader.finish(self.name, self._cut(cuts).clone())

    def read_into(self, cuts: Cuts, out: Tensor) -> None:
        assign(out, self._cut(cuts))

    def nbytes(self, cuts: Cuts) -> int:
        return 0

    def _cut(self, cuts: Cuts) -> Tensor:
        return self.tensor[tuple(slice(start, stop) for start, stop, _ in cuts)]
