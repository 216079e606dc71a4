"""Whether two tensors are equal to the last bit, and by how much they are not."""

import math
from typing import Any

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal; so NaN can be equal to NaN, and -0.0 is not 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    if a.layout is not torch.strided or b.layout is not torch.strided or not _is_plain(a) or not _is_plain(b):
        return bool(torch.equal(a, b))
    return bool(torch.equal(_bytes(a), _bytes(b)))


def difference_of(a: Tensor, b: Any) -> float:
    """Return the largest difference of two elements; infinite where there is no such number."""
    if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return math.inf
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    if not a.numel():
        return 0.0
    differences = (a.double() - b.double()).abs()
    return float(differences.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
