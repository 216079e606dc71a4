"""What each layer takes, of a model, of a mapping, or of the headers of files."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError
from offload_layers._find import Found
from offload_layers._headers import read_headers
from offload_layers._source import Source, check_in_source, stored_dtype, stored_name

#: layers that compute for the time step alone, not for every token. Source: the names of the transformers
#: in diffusers and DiffSynth-Studio, where they hold up to a third of the weights
_COMPUTED_ONCE = re.compile(
    r"(^|[._])(mod|modulation|ada_?ln\w*|time\w*|temb|guidance\w*)([._]|$)|(^|\.)norm\w*\.linear$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Repeated:
    """Weights of a layer that an earlier one has, too: an embedding that is the head as well.

    Attributes:
        layer: Name of the earlier one.
        nbytes, stored_nbytes: As of the layer.
    """

    layer: str
    nbytes: int
    stored_nbytes: int


@dataclass(frozen=True)
class LayerSize:
    """One layer as a plan sees it.

    Attributes:
        name: Dotted name.
        numel: Elements of its weights.
        nbytes: Bytes that they take where they compute.
        stored_nbytes: Bytes that they take where they rest, which are those that cross the bus.
        is_on_disk: Whether a source can give them.
        repeated: Of its weights, those that earlier layers have, too.
    """

    name: str
    numel: int
    nbytes: int
    stored_nbytes: int
    is_on_disk: bool = True
    repeated: tuple[Repeated, ...] = ()

    @property
    def is_computed_once(self) -> bool:
        """Whether the layer is computed for one row of input only, as its name tells: a modulation."""
        return _COMPUTED_ONCE.search(self.name) is not None

    def work(self, rows: int) -> float:
        """Return the multiplications that a forward with *rows* rows takes."""
        return float(self.numel * (1 if self.is_computed_once else rows))

    def nbytes_beside(self, names: Collection[str]) -> int:
        """Return what the layer takes where it computes beside earlier ones, of these *names*."""
        return self.nbytes - sum(part.nbytes for part in self.repeated if part.layer in names)


def together(sizes: Collection[LayerSize], nbytes: Callable[[LayerSize | Repeated], int]) -> int:
    """Return what layers take that are in one place, where what they share is once."""
    names = {size.name for size in sizes}
    repeated = (nbytes(part) for size in sizes for part in size.repeated if part.layer in names)
    return sum(map(nbytes, sizes)) - sum(repeated)


def around(sizes: Collection[LayerSize]) -> dict[str, int]:
    """Return for each layer what those around it take: they hold their weights while it computes."""
    nbytes = {size.name: size.nbytes for size in sizes}
    found = {}
    for name in nbytes:
        parts = name.split(".") if name else []
        found[name] = sum(nbytes.get(".".join(parts[:depth]), 0) for depth in range(len(parts)))
    return found


def sizes_of(
    layers: Collection[Found],
    source: Source | None,
    dtype: torch.dtype | None,
    storage_dtype: torch.dtype | None,
) -> list[LayerSize]:
    """Return what the layers of a model take."""
    first: dict[tuple[int, str], str] = {}  # parameter, and where its values come from -> layer
    return [_size_of(layer, source, dtype, storage_dtype, first) for layer in layers]


def _size_of(
    layer: Found,
    source: Source | None,
    dtype: torch.dtype | None,
    storage_dtype: torch.dtype | None,
    first: dict[tuple[int, str], str],
) -> LayerSize:
    numel = nbytes = stored_nbytes = 0
    repeated = []
    names = {id(p): n for n, p in layer.module.named_parameters(layer.name)}
    is_on_disk = source is not None
    for parameter in layer.parameters():
        name, stored, comes_from = names[id(parameter)], parameter.dtype, ""
        if nn.parameter.is_lazy(parameter):
            raise ConfigError(f'parameter "{name}" has no shape yet; run the model once')
        if source is not None and (parameter.is_meta or name in source):
            check_in_source(source, name, parameter.shape)
            stored, comes_from = stored_dtype(source, name, stored), stored_name(source, name)
        else:
            is_on_disk = False
        part = Repeated(
            first.setdefault((id(parameter), comes_from), layer.name),
            parameter.numel() * _dtype(stored, dtype).itemsize,
            parameter.numel() * _dtype(stored, storage_dtype).itemsize,
        )
        numel += parameter.numel()
        nbytes += part.nbytes
        stored_nbytes += part.stored_nbytes
        if part.layer != layer.name:
            repeated.append(part)
    return LayerSize(layer.name, numel, nbytes, stored_nbytes, is_on_disk, tuple(repeated))


def sizes_of_files(
    files: list[Any], dtype: torch.dtype | None, storage_dtype: torch.dtype | None
) -> list[LayerSize]:
    """Return the layers whose weights are in safetensors files."""
    tensors = [(t.name, t.numel, t.nbytes, t.is_floating_point) for t in read_headers(files)]
    return _grouped(tensors, dtype, storage_dtype)


def sizes_of_mapping(
    source: Mapping[str, Tensor], dtype: torch.dtype | None, storage_dtype: torch.dtype | None
) -> list[LayerSize]:
    """Return the layers whose weights a mapping has."""
    info = getattr(source, "info", source.__getitem__)
    tensors = []
    for name in source:
        found = info(name)
        numel = math.prod(found.shape)
        tensors.append((name, numel, numel * found.dtype.itemsize, found.dtype.is_floating_point))
    return _grouped(tensors, dtype, storage_dtype)


def _grouped(
    tensors: list[tuple[str, int, int, bool]], dtype: torch.dtype | None, storage_dtype: torch.dtype | None
) -> list[LayerSize]:
    """Take the tensors whose names differ in the last part for those of one layer."""
    layers: dict[str, LayerSize] = {}
    for name, numel, in_file, is_floating_point in tensors:
        layer = name.rpartition(".")[0]
        nbytes = numel * dtype.itemsize if dtype is not None and is_floating_point else in_file
        stored = (
            numel * storage_dtype.itemsize if storage_dtype is not None and is_floating_point else in_file
        )
        before = layers.get(layer, LayerSize(layer, 0, 0, 0))
        layers[layer] = LayerSize(
            layer, before.numel + numel, before.nbytes + nbytes, before.stored_nbytes + stored
        )
    return list(layers.values())


def _dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored
