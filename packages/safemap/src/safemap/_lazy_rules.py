"""Operators that only move bytes: they rearrange pieces instead of being recorded (Note [Ropes]).

A rule returns NotImplemented where the operator has to be recorded after all.  The rules also spare the
first arithmetic on a meta tensor, for which torch imports 800 modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from safemap._lazy_content import Content, Fill, Held, Piece, Result
from safemap._lazy_graph import Operation, OutputInfo, View, is_dense
from safemap._lazy_tensor import LazyTensor

if TYPE_CHECKING:
    from safemap._lazy_record import Recorder

Rule = Callable[["Recorder", tuple[Any, ...], dict[str, Any]], Any]

_aten = torch.ops.aten
_MANY_PIECES = 1 << 16
_FEW_PIECES = 64
_LONG_PIECE = 16 << 10  # bytes; shorter ones are cheaper to copy than to read one by one


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(1, extent)
    return tuple(reversed(strides))


def view_of_any(tensor: Tensor) -> View | None:
    """Return a lazy or real tensor as a view, or None for one that is not plain memory on the CPU."""
    if isinstance(tensor, LazyTensor):
        return tensor.view_now() if tensor.storage_.device.type == "cpu" else None
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    if tensor.is_conj() or tensor.is_neg() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    shape = tuple(tensor.shape)
    return View(Content.of(Held(flat), flat.numel()), tensor.dtype, shape, row_major(shape))


def pieces_in_order(view: View) -> list[Piece]:
    """Return the elements of *view* in row-major order; if need be, those of a contiguous copy."""
    pieces = view.gathered()
    if pieces is not None:
        return pieces
    info = OutputInfo(view.dtype, view.shape, row_major(view.shape), view.device)
    copy = Operation(_aten.clone.default, (view,), {"memory_format": torch.contiguous_format}, [info])
    return [Piece(Result(copy, 0), 0, view.nbytes)]


def _in_dtype(view: View, dtype: torch.dtype) -> View:
    if view.dtype == dtype:
        return view
    shape = view.shape
    info = OutputInfo(dtype, shape, row_major(shape), view.device)
    keywords = {"dtype": dtype, "memory_format": torch.contiguous_format}
    cast = Operation(_aten._to_copy.default, (view,), keywords, [info])
    return View(Content.of(Result(cast, 0), info.nbytes), dtype, shape, info.stride)


# ---------------------------------------------------------------------- concatenation


def _cat(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = list(args[0])
    if any(tensor.dim() == 0 for tensor in tensors):
        return NotImplemented  # torch has an error for it
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        return NotImplemented
    tensors = [tensor for tensor in tensors if tuple(tensor.shape) != (0,)] or tensors[:1]  # as torch does
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return _joined(recorder, tensors, dim, stacked=False)


def _stack(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return _joined(recorder, list(args[0]), dim, stacked=True)


def _joined(recorder: Recorder, tensors: list[Tensor], dim: Any, *, stacked: bool) -> Any:
    views = [view_of_any(tensor) for tensor in tensors]
    parts = [view for view in views if view is not None]
    rank = tensors[0].dim() + stacked
    if len(parts) != len(tensors) or not isinstance(dim, int) or not -rank <= dim < rank:
        return NotImplemented
    dim %= rank
    if any(part.dtype != parts[0].dtype or _is_channels_last(part) for part in parts):
        return NotImplemented
    shapes = [[*p.shape[:dim], 1, *p.shape[dim:]] if stacked else list(p.shape) for p in parts]
    total = sum(shape[dim] for shape in shapes if len(shape) == rank)
    whole = [*shapes[0][:dim], total, *shapes[0][dim + 1 :]]
    if any([*shape[:dim], total, *shape[dim + 1 :]] != whole for shape in shapes):
        return NotImplemented  # torch has an error for it
    itemsize = parts[0].dtype.itemsize
    rows = [math.prod(shape[dim:]) * itemsize for shape in shapes]
    count = math.prod(whole[:dim])
    if count > 1 and not _is_worth_it(count * len(parts), min(rows)):
        return NotImplemented
    ordered = [pieces_in_order(part) for part in parts]
    if count == 1:
        pieces = [piece for part in ordered for piece in part]
    else:
        contents = [Content(part) for part in ordered]
        pieces = [
            piece
            for number in range(count)
            for content, row in zip(contents, rows, strict=True)
            for piece in content.part(number * row, (number + 1) * row)
        ]
    return recorder.tensor(Content(pieces), parts[0].dtype, tuple(whole), row_major(whole))


def _is_worth_it(count: int, nbytes: int) -> bool:
    return count <= _FEW_PIECES or (count <= _MANY_PIECES and nbytes >= _LONG_PIECE)


def _is_channels_last(view: View) -> bool:
    """Tell whether torch would give a result with this input the strides of the input."""
    return len(view.shape) in (4, 5) and not view.is_row_major and view.is_dense


# ---------------------------------------------------------------------- copies


def _clone(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _copied(recorder, args[0], kwargs.get("memory_format"))


def _to_copy(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    changes = (dtype is not None and dtype != tensor.dtype) or kwargs.get("pin_memory")
    if changes or (device is not None and torch.device(device) != tensor.device):
        return NotImplemented
    return _copied(recorder, tensor, kwargs.get("memory_format"))


def _copied(recorder: Recorder, tensor: Tensor, memory_format: torch.memory_format | None) -> Any:
    view = view_of_any(tensor)
    if view is None or memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    if view.is_dense and memory_format != torch.contiguous_format:
        return recorder.tensor(Content(view.hull()), view.dtype, view.shape, view.stride)
    pieces = view.gathered()
    if pieces is None or (memory_format != torch.contiguous_format and not view.is_row_major):
        return NotImplemented
    return recorder.tensor(Content(pieces), view.dtype, view.shape, row_major(view.shape))


# ---------------------------------------------------------------------- writes


def _copy_(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[:2]
    to, origin = _destination(target), view_of_any(source)
    if to is None or origin is None:
        return NotImplemented
    spread = _expanded(origin, to.shape)
    runs = to.runs()
    if spread is None or runs is None or (origin.dtype.is_complex and not to.dtype.is_complex):
        return NotImplemented
    pieces = pieces_in_order(_in_dtype(spread, to.dtype))
    target.storage_.content = to.content.replaced(runs, pieces)
    return target


def _fill_(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = args[0]
    to = _destination(target)
    value = args[1] if len(args) > 1 else 0
    runs = None if to is None else to.runs()
    if to is None or runs is None or isinstance(value, Tensor):
        return NotImplemented
    element = torch.zeros(1, dtype=to.dtype, device="cpu")
    if len(args) > 1:
        element.fill_(value)
    target.storage_.content = to.content.replaced(runs, [Piece(Fill(element), 0, to.nbytes)])
    return target


def _destination(target: Tensor) -> View | None:
    """Return the view that is written to, if each of its elements has a place of its own."""
    if not isinstance(target, LazyTensor) or target.storage_.device.type != "cpu":
        return None
    return None if overlaps_itself(target) else target.view_now()


def overlaps_itself(tensor: Tensor) -> bool:
    """Tell whether two elements of a tensor may have the same place."""
    reach = 1
    for step, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent > 1 and step < reach:
            return True
        reach += step * (extent - 1)
    return False


def _expanded(view: View, shape: tuple[int, ...]) -> View | None:
    """Return *view* broadcast to *shape*, or None if it cannot be."""
    missing = len(shape) - len(view.shape)
    if missing < 0:
        return None
    stride = [0] * missing
    for extent, step, wanted in zip(view.shape, view.stride, shape[missing:], strict=True):
        if extent != wanted and extent != 1:
            return None
        stride.append(step if extent == wanted else 0)
    return View(view.content, view.dtype, shape, tuple(stride), view.offset, view.device)


# ---------------------------------------------------------------------- constants


def _new(function: Any) -> Rule:
    """Return the rule of a ``new_*`` factory: (self, size, ...)."""

    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _constant(recorder, function, args[0], tuple(args[1]), None, ([1], *args[2:]), kwargs)

    return rule


def _like(function: Any) -> Rule:
    """Return the rule of a ``*_like`` factory: (self, ...)."""

    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stride = None
        if kwargs.get("memory_format") in (None, torch.preserve_format):
            shape, stride = tuple(args[0].shape), tuple(args[0].stride())
            if not is_dense(shape, stride):
                return NotImplemented
        elif kwargs["memory_format"] != torch.contiguous_format:
            return NotImplemented
        return _constant(recorder, function, args[0], tuple(args[0].shape), stride, args[1:], kwargs)

    return rule


def _constant(
    recorder: Recorder,
    function: Any,
    tensor: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...] | None,
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    device = kwargs.get("device") or tensor.device
    if torch.device(device).type != "cpu" or kwargs.get("pin_memory") or kwargs.get("layout"):
        return NotImplemented
    keywords = {name: value for name, value in kwargs.items() if name != "memory_format"}
    element = function(torch.zeros(1, dtype=tensor.dtype, device="cpu"), *rest, **keywords)
    return fill(recorder, element, shape, stride)


def fill(
    recorder: Recorder, element: Tensor, shape: tuple[int, ...], stride: tuple[int, ...] | None = None
) -> LazyTensor:
    """Return a lazy tensor whose elements are all the one element of *element*."""
    nbytes = math.prod(shape) * element.dtype.itemsize
    content = Content.of(Fill(element.view(1)), nbytes)
    return recorder.tensor(content, element.dtype, shape, stride or row_major(shape))


# ---------------------------------------------------------------------- indexing, refusals


def _index(function: Any) -> Rule:
    """Return a rule that replaces masks by positions: only the mask is read, not what it selects from."""

    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        indices = args[1]
        if not any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return NotImplemented
        positions: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                mask = index.values(str(function)) if isinstance(index, LazyTensor) else index
                positions += mask.nonzero().unbind(1)
            else:
                positions.append(index)
        replaced = (args[0], positions, *args[2:])
        if not any(isinstance(leaf, LazyTensor) for leaf in tree_leaves(replaced)):
            return function(*replaced, **kwargs)  # the mask was all that is lazy
        return recorder.call(function, replaced, kwargs)

    return rule


def _refuse(function: Any) -> Rule:
    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise recorder.refusal(function, args, kwargs, "changes the memory of a tensor")

    return rule


RULES: dict[Any, Rule] = {
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    _aten.fill_.Scalar: _fill_,
    _aten.zero_.default: _fill_,
    **{f: _new(f) for f in (_aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default)},
    _aten.new_full.default: _new(_aten.new_full.default),
    **{f: _like(f) for f in (_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default)},
    _aten.full_like.default: _like(_aten.full_like.default),
    **{f: _index(f) for f in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)},
    **{
        getattr(packet, overload): _refuse(getattr(packet, overload))
        for packet in (_aten.set_, _aten.resize_, _aten.resize_as_)
        for overload in packet.overloads()  # type: ignore[no-untyped-call]
    },
}
