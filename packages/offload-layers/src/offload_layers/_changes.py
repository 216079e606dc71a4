"""Noticing that somebody has changed a copy of a weight, so that the change is not dropped with the copy.

torch counts the in-place changes of a tensor, and its address tells whether ``.data`` was replaced. A change
through ``.data`` (``weight.data += delta``, as adapters are merged by some libraries) leaves no trace. So a
copy that is staged and that outsiders can reach is watched for being asked for its ``.data``, and then
compared. A copy that stays is not: a watched parameter makes each call of its layer a microsecond slower. The
sum of its words is kept instead, which takes as long as reading it once, and is compared when the copy goes.
Nor are weights watched where they rest, since everybody can reach those. With a copy that is kept, or fetched
ahead, goes a checksum of pieces from all over the weight in host memory that it was made of, or of a small
one as a whole.
"""

from ctypes import string_at
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

Fingerprint = tuple[int, int]
Noted = tuple[int, int, int | None]

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_PLAIN = (nn.Parameter, Tensor)
_RUNS, _RUN = 16, 512  # how many pieces of a weight are looked at, and their bytes: as long as a few calls


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Return what an in-place change of *tensor* alters: the count of changes, and the address."""
    # a tensor made under inference mode does not count its changes
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def checksum(tensor: Tensor) -> Tensor | None:
    """Return, on its device, what any change of *tensor* alters; None if that is not plain memory."""
    if tensor.is_meta or not tensor.is_contiguous() or type(tensor) not in _PLAIN or not tensor.numel():
        return None
    nbytes, start = tensor.numel() * tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    word = next(word for word in _WORDS if nbytes % word.itemsize == 0 and start % word.itemsize == 0)
    with torch.no_grad():
        return tensor.detach().view(-1).view(torch.uint8).view(word).sum(dtype=torch.int64)


def noted(tensor: Tensor) -> Noted:
    """Return what a change of *tensor*, be it through ``.data``, alters: all but one of a few elements.

    No operation of torch's is used, which could be traced. Of tensors on a device, and of those whose memory
    has gaps, only what `fingerprint` tells: the host would have to wait for more.
    """
    version, address = fingerprint(tensor)
    is_plain = type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not is_plain or not address or not tensor.is_contiguous():
        return version, address, None
    nbytes, whole = tensor.numel() * tensor.element_size(), _RUNS * _RUN
    if nbytes <= whole:
        return version, address, crc32(string_at(address, nbytes))
    found, step = 0, (nbytes - _RUN) // (_RUNS - 1)
    for start in range(address, address + _RUNS * step, step):
        found = crc32(string_at(start, _RUN), found)
    return version, address, found


def in_backward() -> bool:
    """Say whether this thread runs a backward pass, in which layers may be run once more."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


class WatchedParameter(nn.Parameter):
    """A parameter that remembers whether its ``.data`` was asked for."""

    @property
    def data(self) -> Any:
        """The values, outside of autograd and of the count of changes."""
        self.__dict__["_data_was_taken"] = True
        return torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, values: Tensor) -> None:
        torch._C.TensorBase.data.__set__(self, values)  # type: ignore[attr-defined]


def watch(tensor: Tensor) -> None:
    """Remember from now on whether ``tensor.data`` is asked for; only plain parameters can be watched."""
    if type(tensor) is nn.Parameter:
        tensor.__class__ = WatchedParameter


def data_was_taken(tensor: Tensor) -> bool:
    """Say whether values may have been changed through ``.data``."""
    return type(tensor) is WatchedParameter and "_data_was_taken" in tensor.__dict__
