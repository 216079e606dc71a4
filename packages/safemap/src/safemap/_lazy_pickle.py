"""Pickling what was recorded, without recursion: a graph may be deeper than Python's stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safemap._contents import map_leaves
from safemap._lazy_content import Content, Leaf, Piece, Result
from safemap._lazy_graph import Operation, OutputInfo, View, Whole, replace_leaves
from safemap._lazy_sources import Output


@dataclass(frozen=True, slots=True)
class _Reference:
    """Stands for a view that is packed on its own."""

    number: int
    is_whole: bool


@dataclass(frozen=True, slots=True)
class _Values:
    """Stands for a tensor in memory: torch cannot unpickle those of the newer dtypes."""

    bytes: Tensor  # (nbytes,) uint8
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Values | Tensor:
        """Return what stands for *tensor*; itself if it is no plain memory."""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            return tensor
        plain = tensor.detach().resolve_conj().resolve_neg()
        flat = plain.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        return cls(flat, tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """Return the tensor again, row-major."""
        return self.bytes.view(self.dtype).view(self.shape)


class _Packer:
    """Gives numbers to operations and views, those that others need first."""

    def __init__(self) -> None:
        self.operations: dict[Operation, int] = {}
        self.views: dict[View, int] = {}
        self.steps: list[tuple[Any, ...]] = []

    def number(self, view: View) -> int:
        """Return the number of a view, after everything that it depends on has one."""
        pending: list[View | Operation] = [view]
        while pending:
            item = pending[-1]
            known = self.views if isinstance(item, View) else self.operations
            missing: list[View | Operation] = []
            if item not in known:
                missing = self._missing(item)
            pending += missing
            if not missing:
                pending.pop()
                if item not in known:
                    self._add(item)
        return self.views[view]

    def _missing(self, item: View | Operation) -> list[View | Operation]:
        if isinstance(item, View):
            leaves = {p.leaf.operation for p in item.content.pieces if isinstance(p.leaf, Result)}
            return [operation for operation in leaves if operation not in self.operations]
        arguments = [a.view if isinstance(a, Whole) else a for a in item.arguments()]
        return [view for view in arguments if view not in self.views]

    def _add(self, item: View | Operation) -> None:
        if isinstance(item, View):
            pieces = [(self._leaf(piece.leaf), piece.start, piece.stop) for piece in item.content.pieces]
            self.views[item] = len(self.views)
            self.steps.append((pieces, item.dtype, item.shape, item.stride, item.offset, item.device))
            return

        def change(leaf: View | Whole | Tensor) -> _Reference | _Values | Tensor:
            if isinstance(leaf, Tensor):
                return _Values.of(leaf)
            is_whole = isinstance(leaf, Whole)
            return _Reference(self.views[leaf.view if isinstance(leaf, Whole) else leaf], is_whole)

        args, kwargs = replace_leaves((item.args, item.kwargs), (View, Whole, Tensor), change)
        schema = item.function._schema
        self.operations[item] = len(self.operations)
        self.steps.append((schema.name, schema.overload_name or "default", args, kwargs, item.outputs))

    def _leaf(self, leaf: Leaf) -> Leaf | tuple[int, int]:
        return (self.operations[leaf.operation], leaf.output) if isinstance(leaf, Result) else leaf


@dataclass(frozen=True, slots=True)
class _Packed:
    """Stands for an output that is a view."""

    view: int
    storage: int


def pack(tree: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """Return *tree* with references in place of views, and what they refer to, in order of dependence."""
    packer = _Packer()

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Output) and isinstance(leaf.tensor, View):
            return _Packed(packer.number(leaf.tensor), leaf.storage)
        return _Values.of(leaf) if isinstance(leaf, Tensor) else leaf

    return map_leaves(tree, change), packer.steps


def unpack(tree: Any, steps: list[tuple[Any, ...]]) -> Any:
    """Do the opposite of ``pack``."""
    operations: list[Operation] = []
    views: list[View] = []

    def lookup(leaf: _Reference | _Values) -> View | Whole | Tensor:
        if isinstance(leaf, _Values):
            return leaf.tensor()
        return Whole(views[leaf.number]) if leaf.is_whole else views[leaf.number]

    for step in steps:
        if isinstance(step[0], str):
            operations.append(_operation(*step, lookup=lookup))
        else:
            pieces = [
                Piece(Result(operations[leaf[0]], leaf[1]) if isinstance(leaf, tuple) else leaf, start, stop)
                for leaf, start, stop in step[0]
            ]
            views.append(View(Content(pieces), *step[1:]))

    def restore(leaf: Any) -> Any:
        if isinstance(leaf, _Values):
            return leaf.tensor()
        return Output(views[leaf.view], leaf.storage) if isinstance(leaf, _Packed) else leaf

    return map_leaves(tree, restore)


def _operation(
    name: str, overload: str, args: Any, kwargs: Any, outputs: list[OutputInfo | None], *, lookup: Any
) -> Operation:
    namespace, _, base = name.partition("::")
    function = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    args, kwargs = replace_leaves((args, kwargs), (_Reference, _Values), lookup)
    return Operation(function, args, kwargs, outputs)
