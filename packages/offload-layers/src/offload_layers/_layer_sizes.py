"""What each layer takes, of a model, of a mapping, or of the headers of files."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError
from offload_layers._find import Found
from offload_layers._headers import read_headers
from offload_layers._plan import LayerSize
from offload_layers._source import Source, check_in_source, stored_dtype


def size_of(
    layer: Found, source: Source | None, dtype: torch.dtype | None, storage_dtype: torch.dtype | None
) -> LayerSize:
    """Return what one layer of a model takes."""
    numel = nbytes = stored_nbytes = 0
    names = {id(p): n for n, p in layer.module.named_parameters(layer.name)}
    is_on_disk = source is not None
    for parameter in layer.parameters():
        name, stored = names[id(parameter)], parameter.dtype
        if nn.parameter.is_lazy(parameter):
            raise ConfigError(f'parameter "{name}" has no shape yet; run the model once')
        if source is not None and (parameter.is_meta or name in source):
            check_in_source(source, name, parameter.shape)
            stored = stored_dtype(source, name, stored)
        else:
            is_on_disk = False
        numel += parameter.numel()
        nbytes += parameter.numel() * _dtype(stored, dtype).itemsize
        stored_nbytes += parameter.numel() * _dtype(stored, storage_dtype).itemsize
    return LayerSize(layer.name, numel, nbytes, stored_nbytes, is_on_disk)


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
