"""Noticing that somebody has changed a copy of a weight, so that the change is not dropped with the copy.

torch counts the in-place changes of a tensor, and its address tells whether ``.data`` was replaced. A change
through ``.data`` (``weight.data += delta``, as adapters are merged by some libraries) leaves no trace. So
parameters that outsiders can reach are watched for being asked for their ``.data``: what rests elsewhere than
where it is computed with, and copies of it that are staged. A copy that stays is not: a watched parameter
makes each call of its layer a microsecond slower. The sum of its words is kept instead, which takes as long
as reading it once, and is compared when the copy goes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

Fingerprint = tuple[int, int]
Noted = tuple[int, int, int]

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Return what an in-place change of *tensor* alters: the count of changes, and the address."""
    # a tensor made under inference mode does not count its changes
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def checksum(tensor: Tensor) -> Tensor | None:
    """Return, on its device, what any change of *tensor* alters; None if that is not plain memory."""
    if tensor.is_meta or not tensor.is_contiguous() or not is_plain(tensor) or not tensor.numel():
        return None
    nbytes, start = tensor.numel() * tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    word = next(word for word in _WORDS if nbytes % word.itemsize == 0 and start % word.itemsize == 0)
    with torch.no_grad():
        return tensor.detach().view(-1).view(torch.uint8).view(word).sum(dtype=torch.int64)


def in_backward() -> bool:
    """Say whether this thread runs a backward pass, in which layers may be run once more."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


class WatchedParameter(nn.Parameter):
    """A parameter that counts how often its ``.data`` was asked for. Its copies are plain parameters."""

    @property
    def data(self) -> Any:
        """The values, outside of autograd and of the count of changes."""
        self.__dict__[_ASKED] = self.__dict__.get(_ASKED, 0) + 1
        return _values(self)

    @data.setter
    def data(self, values: Tensor) -> None:
        torch._C.TensorBase.data.__set__(self, values)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return a plain parameter."""
        if id(self) not in memo:
            memo[id(self)] = copy.deepcopy(self._plain(), memo)
        twin: nn.Parameter = memo[id(self)]
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be read back as a plain parameter."""
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _plain(self) -> nn.Parameter:
        plain = nn.Parameter(_values(self), self.requires_grad)
        plain.__dict__.update(attributes(self))
        return plain


_ASKED = "_times_asked_for_data"


def _values(tensor: Tensor) -> Any:
    return torch._C.TensorBase.data.__get__(tensor)  # type: ignore[attr-defined]


def is_plain(tensor: Tensor) -> bool:
    """Say whether *tensor* is of no class but torch's own, or ours."""
    return type(tensor) in (Tensor, nn.Parameter, WatchedParameter)


def attributes(tensor: Tensor) -> dict[str, Any]:
    """Return what others have set on *tensor*."""
    return {name: value for name, value in tensor.__dict__.items() if name != _ASKED}


def watch(tensor: Tensor) -> None:
    """Count from now on how often ``tensor.data`` is asked for; only plain parameters can be watched."""
    if type(tensor) is nn.Parameter:
        tensor.__class__ = WatchedParameter


def unwatch(tensor: Tensor) -> None:
    """End what `watch` began."""
    if type(tensor) is WatchedParameter:
        tensor.__dict__.pop(_ASKED, None)
        tensor.__class__ = nn.Parameter  # type: ignore[assignment]


def times_asked(tensor: Tensor) -> int:
    """Return how often ``tensor.data`` was asked for: so often it may have been changed without a trace."""
    return tensor.__dict__.get(_ASKED, 0) if type(tensor) is WatchedParameter else 0


def noted(tensor: Tensor) -> Noted:
    """Return what any change of *tensor* from now on alters, through ``.data`` as well.

    This is asked for each weight of each layer that is called, so it calls nothing of ours.
    """
    kind, asked = type(tensor), 0
    if kind is WatchedParameter:
        asked = tensor.__dict__.get(_ASKED, 0)
    elif kind is nn.Parameter and not tensor.is_meta:
        tensor.__class__ = WatchedParameter
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr(), asked
