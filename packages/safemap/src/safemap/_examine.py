"""What the command line reports about values: checksums, NaN and Inf counts, a summary."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from safemap._buffers import bytes_of
from safemap._dtypes import TORCH_DTYPES

_PIECE = 1 << 20  # elements examined at a time, so that temporaries stay small


@dataclass(frozen=True, slots=True)
class Examined:
    """Facts about one tensor; ``low`` to ``mean`` are of its finite values, None if there are none."""

    nans: int
    infs: int
    low: float | None
    high: float | None
    mean: float | None


def checksum(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order, in hexadecimal."""
    digest = hashlib.sha256()
    if tensor.numel():
        held = (tensor if tensor.layout == torch.strided else tensor.to_dense()).contiguous()
        digest.update(bytes_of(held))
    return digest.hexdigest()


def count_not_finite(tensor: Tensor) -> tuple[int, int]:
    """Return how many values are NaN and how many are infinite."""
    examined = examine(tensor) if tensor.is_floating_point() or tensor.is_complex() else None
    return (examined.nans, examined.infs) if examined else (0, 0)


def computable(tensor: Tensor) -> Tensor | None:
    """Return *tensor* as one that torch can compute with; None for F4, which has neither NaN nor infinity."""
    if tensor.dtype == TORCH_DTYPES.get("F4"):
        return None
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def examine(tensor: Tensor) -> Examined:
    """Look at every value once."""
    found = computable(tensor)
    if found is None:
        return Examined(0, 0, None, None, None)
    nans = infs = count = 0
    total = 0.0
    low, high = float("inf"), float("-inf")
    flat = (torch.view_as_real(found) if found.is_complex() else found).reshape(-1)
    for start in range(0, len(flat), _PIECE):
        values = flat[start : start + _PIECE].to(torch.float64)
        finite = values[values.isfinite()]
        missing = int(values.isnan().sum())
        nans += missing
        infs += len(values) - len(finite) - missing
        if len(finite):
            count += len(finite)
            total += float(finite.sum())
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if not count:
        return Examined(nans, infs, None, None, None)
    return Examined(nans, infs, low, high, total / count)
