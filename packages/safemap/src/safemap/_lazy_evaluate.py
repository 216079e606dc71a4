"""From a view of what was recorded to a tensor: ranges are read straight into place, operations run again.

Note [Memory]
    A result is held until its last use and not longer, a source only while the operation that needs it runs.
    Ranges of files have no temporary at all.

Note [Deep graphs]
    Evaluation is recursive: the pieces of a result are made one after the other, so that only one of them
    exists beside it.  A loop that writes a thousand times makes a graph that is deeper than Python's stack,
    so operations at every ``_STEP``-th level are run beforehand, from the bottom.

Note [State of the process]
    What was recorded is what operators were given, below autocast and with the default dtype of that time.
    So they are run without autocast.  The default dtype cannot be set for one thread alone.  It decides in
    which dtype operators compute with integers, which come to the same by being converted first, to the dtype
    that was recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from safemap._buffers import assign, has_plain_bytes, note_write
from safemap._errors import ConverterError
from safemap._file import File
from safemap._lazy_content import Fill, Held, Piece, Result, Source
from safemap._lazy_graph import Operation, OutputInfo, View, Whole, replace_leaves, source_ranges

_STEP = 32
_without_autocast: Any = torch._C._DisableAutocast  # for every kind of device, on this thread


class StoredBytes(Protocol):
    """The bytes that sources stand for: what the evaluation needs of the reader of a map."""

    def allocate(self, numel: int, dtype: torch.dtype, *, pin: bool = False) -> Tensor:
        """Return a flat tensor on the CPU."""

    def read_parts(self, parts: Sequence[tuple[File, int, Tensor]], stored: torch.dtype) -> None:
        """Fill flat tensors from positions in files, converting from the dtype *stored*."""


#: a range of a file (file, position of its first byte), or bytes in memory
Place = tuple[File, int] | Tensor


class Evaluation:
    """One request: evaluates views, each operation at most once.

    Args:
        views: Everything that will be asked for, each once.
        converter: Its name, for messages.
    """

    def __init__(
        self, reader: StoredBytes, places: Sequence[Place], views: Sequence[View], converter: str
    ) -> None:
        self._converter = converter
        self._reader = reader
        self._places = places
        self._uses: Counter[Operation | View] = Counter()
        self._results: dict[Operation, list[Tensor | None]] = {}
        self._tensors: dict[View, Tensor] = {}
        self._shared: set[Operation] = set()  # some tensor in `_tensors` is in its memory
        deep = self._count(views)
        for operation in sorted(deep, key=lambda o: o.depth):
            self._results[operation] = self._run(operation)

    def _count(self, views: Sequence[View]) -> list[Operation]:
        """Count how often each result and argument is needed; return what Note [Deep graphs] is about."""
        deep: list[Operation] = []
        pending = [view.needed() for view in views]
        while pending:
            for piece in pending.pop():
                if not isinstance(piece.leaf, Result):
                    continue
                operation = piece.leaf.operation
                self._uses[operation] += 1
                if self._uses[operation] > 1:
                    continue
                if operation.depth % _STEP == 0:
                    deep.append(operation)
                for argument in operation.arguments():
                    if isinstance(argument, View):
                        self._uses[argument] += 1
                        if self._uses[argument] > 1:
                            continue
                    pending.append(argument.needed())
        return deep

    # ------------------------------------------------------------------ views

    def result(self, view: View, dtype: torch.dtype | None = None, *, pin: bool = False) -> Tensor:
        """Return a view in memory of its own, converted to *dtype*; dense views keep their strides."""
        dtype = view.dtype if dtype is None else dtype
        pieces = view.hull() if view.is_dense else view.gathered()
        if pieces is None or view.device.type != "cpu":
            tensor = self._tensor(view, view.needed())
            if dtype == view.dtype and not pin:
                return tensor.clone(memory_format=torch.contiguous_format)
            flat = self._reader.allocate(view.numel, dtype, pin=pin)
            return flat.view(view.shape).copy_(tensor)
        flat = self._flat(pieces, view.dtype, dtype, own=True, pin=pin)
        return flat.as_strided(view.shape, view.stride) if view.is_dense else flat.view(view.shape)

    def result_into(self, view: View, out: Tensor) -> None:
        """Write a view into *out*, of the same shape, converting to its dtype."""
        if has_plain_bytes(out) and view.is_row_major and view.device.type == "cpu":
            note_write(out)
            self._fill(view.hull(), view.dtype, out.view(-1))
        else:
            assign(out, self._tensor(view, view.needed()))

    def _argument(self, view: View) -> Tensor:
        tensor = self._tensors.get(view)
        if tensor is None:
            tensor = self._tensor(view, view.needed())
        self._uses[view] -= 1
        if self._uses[view] > 0:
            self._tensors[view] = tensor
            self._shared.update(p.leaf.operation for p in view.needed() if isinstance(p.leaf, Result))
        else:
            self._tensors.pop(view, None)
        return tensor

    def _tensor(self, view: View, pieces: list[Piece]) -> Tensor:
        """Return a view, perhaps in memory that others use."""
        if view.is_dense:
            flat = self._flat(pieces, view.dtype, view.dtype)
            return flat.as_strided(view.shape, view.stride, flat.storage_offset())
        if view.gathered() is not None:
            return self._flat(pieces, view.dtype, view.dtype).view(view.shape)
        flat = self._flat(pieces, view.dtype, view.dtype)
        return flat.as_strided(view.shape, view.stride, flat.storage_offset())

    # ------------------------------------------------------------------ pieces

    def _flat(
        self,
        pieces: list[Piece],
        stored: torch.dtype,
        dtype: torch.dtype,
        *,
        own: bool = False,
        pin: bool = False,
    ) -> Tensor:
        """Return the bytes of *pieces* as elements of *stored*, converted to *dtype*.

        With *own*, in memory that nobody else refers to, and that is no larger than needed.
        """
        if len(pieces) == 1 and dtype == stored and not pin:
            found = self._in_memory(pieces[0], own=own)
            if found is not None:
                return _in_dtype(found, stored)
        numel = sum(piece.nbytes for piece in pieces) // stored.itemsize
        flat = self._reader.allocate(numel, dtype, pin=pin)
        self._fill(pieces, stored, flat)
        return flat

    def _in_memory(self, piece: Piece, *, own: bool) -> Tensor | None:
        """Return the bytes of a piece that need not be read or made up, as they lie in memory."""
        leaf = piece.leaf
        if isinstance(leaf, Held):
            found, is_own = leaf.bytes, False
        elif isinstance(leaf, Source) and isinstance(place := self._places[leaf.index], Tensor):
            found, is_own = place, False
        elif isinstance(leaf, Result):
            found, is_own = self._consume(leaf)
        else:
            return None
        is_whole = piece.nbytes == found.numel()
        part = found[piece.start : piece.stop]
        return part if not own or (is_own and is_whole) else part.clone()

    def _fill(self, pieces: list[Piece], stored: torch.dtype, out: Tensor) -> None:
        """Write *pieces*, elements of *stored*, into a flat tensor on the CPU, converting to its dtype."""
        size = stored.itemsize
        if any(piece.nbytes % size for piece in pieces):
            if out.dtype != stored:  # an element lies in two pieces
                out.copy_(self._flat(pieces, stored, stored))
                return
            stored, out, size = torch.uint8, out.view(torch.uint8), 1
        parts: list[tuple[File, int, Tensor]] = []
        rest: list[tuple[Piece, Tensor]] = []
        position = 0
        for piece in pieces:
            target = out[position : position + piece.nbytes // size]
            position += piece.nbytes // size
            place = self._places[piece.leaf.index] if isinstance(piece.leaf, Source) else None
            if isinstance(place, tuple):
                parts.append((place[0], place[1] + piece.start, target))
            else:
                rest.append((piece, target))
        self._reader.read_parts(parts, stored)
        for piece, target in rest:
            if isinstance(piece.leaf, Fill):
                _repeat(piece.leaf.element, piece, stored, target)
            else:
                found = self._in_memory(piece, own=False)
                assert found is not None
                target.copy_(_in_dtype(found, stored))

    # ------------------------------------------------------------------ operations

    def _consume(self, leaf: Result) -> tuple[Tensor, bool]:
        """Return the memory of an output, and whether nobody else will look at it."""
        operation = leaf.operation
        outputs = self._results.get(operation)
        if outputs is None:
            outputs = self._run(operation)
        self._uses[operation] -= 1
        is_last = self._uses[operation] == 0
        if is_last:
            self._results.pop(operation, None)
        else:
            self._results[operation] = outputs
        found = outputs[leaf.output]
        assert found is not None
        return found, is_last and operation not in self._shared

    def _run(self, operation: Operation) -> list[Tensor | None]:
        buffer: Tensor | None = None

        def argument(leaf: Any) -> Tensor:
            nonlocal buffer
            if isinstance(leaf, View):
                return self._argument(leaf)
            buffer = self._flat(leaf.needed(), torch.uint8, torch.uint8, own=True)
            return view_of(buffer, leaf.view)

        args, kwargs = replace_leaves((operation.args, operation.kwargs), (View, Whole), argument)
        try:
            with _without_autocast():
                outputs = operation.function(*args, **kwargs)
                if buffer is None and _has_another_dtype(outputs, operation):  # Note [State of the process]
                    outputs = _of_integers(operation, args, kwargs, outputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            sources = ", ".join(f'"{s.name}"' for s in source_ranges(operation.arguments()))
            raise ConverterError(
                f"{operation.function}, which the state_dict_converter {self._converter} applied to "
                f"{sources or 'new tensors'}, failed when it was run: {type(error).__name__}: {error}"
            ) from error
        if buffer is not None:
            return [buffer]
        taken = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _has_memory(leaf)
        }
        return [
            None if info is None else _memory_of(leaf, info, operation, taken)
            for leaf, info in zip(tree_leaves(outputs), operation.outputs, strict=True)
        ]


def _has_another_dtype(outputs: Any, operation: Operation) -> bool:
    return any(
        info is not None and leaf.dtype != info.dtype
        for leaf, info in zip(tree_leaves(outputs), operation.outputs, strict=True)
    )


def _of_integers(operation: Operation, args: Any, kwargs: Any, outputs: Any) -> Any:
    """Return what an operator makes of integers, in the dtype that was recorded; else *outputs*."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    dtypes = {info.dtype for info in operation.outputs if info is not None}
    if len(dtypes) != 1 or any(t.dtype.is_floating_point or t.dtype.is_complex for t in tensors):
        return outputs
    (dtype,) = dtypes
    if not (dtype.is_floating_point or dtype.is_complex):
        return outputs
    args, kwargs = replace_leaves((args, kwargs), Tensor, lambda tensor: tensor.to(dtype))
    return operation.function(*args, **kwargs)


def _in_dtype(found: Tensor, dtype: torch.dtype) -> Tensor:
    aligned = found.storage_offset() % dtype.itemsize == 0
    return (found if aligned else found.clone()).view(dtype)


def view_of(buffer: Tensor, view: View) -> Tensor:
    """Return the tensor that *view* is, given all bytes of its storage."""
    typed = buffer[view.offset : view.offset + view.hull_nbytes].view(view.dtype)
    return typed.as_strided(view.shape, view.stride, typed.storage_offset())


def _has_memory(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta"


def _memory_of(output: Tensor, info: OutputInfo, operation: Operation, taken: set[int]) -> Tensor:
    """Return the bytes of an output, laid out as it was recorded."""
    if output.dtype != info.dtype or tuple(output.shape) != info.shape:
        raise ConverterError(
            f"{operation.function} gave {output.dtype} {list(output.shape)}; torch's meta implementation of "
            f"it, by which the converter ran, gave {info.dtype} {list(info.shape)}."
        )
    storage = output.untyped_storage()
    is_as_recorded = all(
        extent == 1 or step == recorded
        for extent, step, recorded in zip(output.shape, output.stride(), info.stride, strict=True)
    )
    is_alone = storage.data_ptr() not in taken and storage.nbytes() <= info.nbytes + info.dtype.itemsize
    if not (is_as_recorded and is_alone) or output.is_conj() or output.is_neg():
        laid_out = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=output.device)
        output = laid_out.copy_(output)
    numel = info.nbytes // info.dtype.itemsize
    return output.as_strided((numel,), (1,), output.storage_offset()).view(torch.uint8)


def _repeat(element: Tensor, piece: Piece, stored: torch.dtype, target: Tensor) -> None:
    """Write a range of an element repeated without end."""
    if element.dtype == stored and piece.start % stored.itemsize == 0:
        target.copy_(element.expand(target.shape))
        return
    phase = piece.start % element.dtype.itemsize
    count = -(-(phase + piece.nbytes) // element.dtype.itemsize)
    repeated = element.expand(count).contiguous().view(torch.uint8)[phase : phase + piece.nbytes]
    target.copy_((repeated if phase == 0 else repeated.clone()).view(stored))
