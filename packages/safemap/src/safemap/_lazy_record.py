"""Recording: what happens when a converter applies an operator to lazy tensors.

Note [Views by storage]
    Operators run on meta tensors first, which costs nothing and tells dtype, shape and strides.  Whether an
    output is a view is not taken from a list of view operators: it is one if torch put it into the storage
    of an input.  A view is then known completely by its offset and strides, whatever chain of operators made
    it, and a write through one view is seen through the others, as in memory.

Note [Conjugate views]
    Conjugate and negative views (``conj()``, ``.mH``) lie in the storage of their input, but their bytes mean
    something else there, which strides cannot say.  So they are recorded as results with bytes of their own.
    Writes to one would not be seen in the other; they are refused from then on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from safemap._errors import ConverterError
from safemap._lazy_content import Content, Held, Result, Source
from safemap._lazy_evaluate import view_of
from safemap._lazy_graph import CPU, Operation, OutputInfo, View, Whole, is_dense, source_ranges
from safemap._lazy_rules import RULES, overlaps_itself, row_major
from safemap._lazy_tensor import LazyTensor, Storage

_log = logging.getLogger("safemap.converter")

Evaluate = Callable[[View], Tensor]

_aten = torch.ops.aten
_VALUES = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
#: an operator with one of these tags has outputs that depend on values, or that differ from call to call
_VALUE_TAGS = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
#: these have the tag, but their shape depends on values only for masks, which their rule replaces
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


class Recorder:
    """Makes lazy tensors and records what is done to them.

    Args:
        label: Name of the converter, for messages.
        evaluate: Reads a view.
        limit: How many bytes may be read while the converter runs; None for any number.
    """

    def __init__(self, label: str, evaluate: Evaluate, limit: int | None = None) -> None:
        self.label = label
        self.limit = limit
        self.forced_nbytes = 0
        self.failure: tuple[BaseException, str] | None = None  # the last one, and the call it is from
        self.refused: ConverterError | None = None  # the first one; an operator such as += may have hidden it
        self.was_used = False  # an operation was applied, or values were read
        self._evaluate = evaluate
        self._lock = threading.RLock()  # a converter may use threads

    def tensor(
        self,
        content: Content,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        storage_offset: int = 0,
        device: torch.device = CPU,
    ) -> LazyTensor:
        """Return a lazy tensor with a storage of its own."""
        return LazyTensor(Storage(content, self, device), dtype, shape, stride, storage_offset)

    def lazy(self, tensor: Tensor) -> LazyTensor:
        """Return a lazy copy of a real tensor."""
        plain = tensor.detach().resolve_conj().resolve_neg()
        flat = plain.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        content = Content.of(Held(flat), flat.numel())
        return self.tensor(content, tensor.dtype, tuple(tensor.shape), row_major(tensor.shape))

    # ------------------------------------------------------------------ operators

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what *function* does, without data where that is possible."""
        with self._lock:
            self.was_used = True
            args, kwargs = tree_map(self._own, (args, kwargs))
            try:
                self.failure = None
                return self._call(function, args, kwargs)
            except Exception as error:
                self.failure = error, _call_text(function, args, kwargs)
                raise

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.Tag.inplace_view not in function.tags and any(
            isinstance(leaf, LazyTensor) and leaf.storage_.is_frozen
            for leaf in _written(function, args, kwargs)
        ):
            why = "writes to a tensor of which there is a conjugate or negative view"
            raise self.refusal(function, args, kwargs, why)
        rule = RULES.get(function)
        if rule is not None:
            outcome = rule(self, args, kwargs)
            if outcome is not NotImplemented:
                return outcome
        if torch.Tag.inplace_view in function.tags:
            return args[0].change_layout(function, args, kwargs)
        if function in _VALUES or (_VALUE_TAGS & set(function.tags) and function not in _INDEXING):
            return self._run_now(function, args, kwargs)
        return self._record(function, args, kwargs)

    def _own(self, leaf: Any) -> Any:
        """Read a lazy tensor that another converter left behind."""
        if isinstance(leaf, LazyTensor) and leaf.storage_.recorder is not self:
            return leaf.values("use in another converter")
        return leaf

    def _record(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        written = _written(function, args, kwargs)
        if any(not isinstance(leaf, LazyTensor) or overlaps_itself(leaf) for leaf in written):
            return self._run_now(function, args, kwargs)  # a real tensor needs values; torch refuses the rest
        if len(written) > 1 or (written and (not args or args[0] is not written[0])):
            raise self.refusal(function, args, kwargs, "writes to more than its first argument")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            return function(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        try:
            metas, meta_kwargs = tree_map(_meta, (args, kwargs))
            if device is not None:
                meta_kwargs["device"] = torch.device("meta")
            outputs = function(*metas, **meta_kwargs)
        except (NotImplementedError, RuntimeError, AssertionError):
            # no meta implementation, an output that depends on values, or a mistake of the caller: the
            # operator itself tells, in its own words
            return self._run_now(function, args, kwargs)
        if written:
            self._write(function, args, kwargs)
            return args[0]
        return self._outputs(
            function, args, kwargs, outputs, None if device is None else torch.device(device)
        )

    def _outputs(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Any,
        device: torch.device | None,
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor)]
        by_storage = {leaf.storage_.meta()._cdata: leaf.storage_ for leaf in inputs}
        leaves = tree_leaves(outputs)
        infos: list[OutputInfo | None] = [
            OutputInfo(
                leaf.dtype, tuple(leaf.shape), _recorded_stride(leaf), device or inputs[0].storage_.device
            )
            if isinstance(leaf, Tensor)
            else None
            for leaf in leaves
        ]
        operation: Operation | None = None
        results: list[Any] = []
        for position, (leaf, info) in enumerate(zip(leaves, infos, strict=True)):
            if info is None:
                results.append(leaf)
                continue
            storage, offset = by_storage.get(leaf.untyped_storage()._cdata), leaf.storage_offset()
            is_flipped = _is_flipped(leaf)
            if storage is not None and is_flipped:
                storage.is_frozen = True
            if storage is None or is_flipped:  # Note [Views by storage], Note [Conjugate views]
                if operation is None:
                    arguments, keywords = self._snapshot((args, kwargs))
                    operation = Operation(function, arguments, keywords, infos)
                content = Content.of(Result(operation, position), info.nbytes)
                storage, offset = Storage(content, self, info.device, is_frozen=is_flipped), 0
            results.append(LazyTensor(storage, info.dtype, info.shape, info.stride, offset))
        following = iter(results)
        return tree_map(lambda _: next(following), outputs)

    def _write(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a write: the storage gets the memory as it is after the call as its content."""
        target: LazyTensor = args[0]
        storage = target.storage_
        rest, keywords = self._snapshot((args[1:], kwargs))
        nbytes = storage.content.nbytes
        whole = OutputInfo(torch.uint8, (nbytes,), (1,), storage.device)
        arguments = (Whole(target.view_now()), *rest)
        operation = Operation(function, arguments, keywords, [whole])
        storage.content = Content.of(Result(operation, 0), nbytes)

    def _snapshot(self, tree: Any) -> Any:
        """Return *tree* with views for lazy tensors, and copies of real ones, which may change later."""

        def snapshot(leaf: Any) -> Any:
            if isinstance(leaf, LazyTensor):
                return leaf.view_now()
            return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

        return tree_map(snapshot, tree)

    # ------------------------------------------------------------------ values

    def _run_now(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run *function* on values, reading them.  What it writes to becomes content in memory."""
        written = _written(function, args, kwargs)
        buffers: dict[int, Tensor] = {}

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, LazyTensor):
                return leaf
            view = leaf.view_now()
            is_written = any(leaf is other for other in written)
            if view.is_dense and not is_written:
                return self.force(view, str(function))
            # with its strides, by which some operators decide what they accept
            start, stop = (
                (0, view.content.nbytes) if is_written else (view.offset, view.offset + view.hull_nbytes)
            )
            buffer = buffers.get(id(leaf))  # what is written to may be read as well
            if buffer is None:
                memory = View(view.content, torch.uint8, (stop - start,), (1,), start, view.device)
                buffer = self.force(memory, str(function))
            if is_written:
                buffers[id(leaf)] = buffer
            return view_of(buffer, replace(view, offset=view.offset - start))

        values, keywords = tree_map(value, (args, kwargs))
        outputs = function(*values, **keywords)
        originals = {id(v): a for v, a in zip(values, args, strict=True) if isinstance(a, LazyTensor)}
        for leaf in written:
            if isinstance(leaf, LazyTensor):
                storage = leaf.storage_
                storage.content = Content.of(Held(buffers[id(leaf)]), storage.content.nbytes)
        return tree_map(lambda leaf: originals.get(id(leaf), leaf) if written else leaf, outputs)

    def force(self, view: View, operation: str) -> Tensor:
        """Read a view while the converter runs, into memory of its own.

        Raises:
            ConverterError: more would be read than is allowed.
        """
        self.was_used = True
        nbytes = sum(stop - start for found in source_ranges([view]).values() for start, stop in found)
        if nbytes:
            total = self.forced_nbytes + nbytes
            if self.limit is not None and total > self.limit:
                raise ConverterError(
                    f"the state_dict_converter {self.label} needs the values of {self.describe(view)} for "
                    f"{operation}; that takes {nbytes:,} bytes, {total:,} in all, and it may read "
                    f"{self.limit:,}. Raise converter_read_limit, or convert the file once."
                )
            _log.info(
                "%s reads %s (%s bytes) while it runs, for %s",
                self.label,
                self.describe(view),
                f"{nbytes:,}",
                operation,
            )
            self.forced_nbytes = total
        return self._evaluate(view)

    # ------------------------------------------------------------------ messages

    def describe(self, view: View) -> str:
        """Name the stored tensors that *view* comes from."""
        return describe(view)

    def refusal(self, function: Any, args: Any, kwargs: Any, why: str) -> ConverterError:
        """Return an error about an operator that cannot be followed; it is remembered."""
        error = ConverterError(
            f"the state_dict_converter {self.label} calls {_call_text(function, args, kwargs)}, which "
            f"{why}. Reading by name cannot follow that: use the form that returns a new tensor, or "
            "convert the file once."
        )
        self.refused = self.refused or error
        return error


def describe(view: View) -> str:
    """Say what *view* is: a stored tensor or a part of one, or made of which."""
    names = [f'"{source.name}"' for source in source_ranges([view])]
    if len(names) == 1 and all(isinstance(piece.leaf, Source) for piece in view.hull()):
        return f"tensor {names[0]}"
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    return f"a tensor of shape {list(view.shape)} made of {shown or 'no stored ones'}"


def _call_text(function: Any, args: Any, kwargs: Any) -> str:
    found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor)]
    return f"{function} on {describe(found[0].view_now())}" if found else str(function)


def _is_flipped(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


def _recorded_stride(output: Tensor) -> tuple[int, ...]:
    """Return the strides of an output; of a view that becomes memory of its own, without gaps or overlap."""
    shape, stride = tuple(output.shape), tuple(output.stride())
    return row_major(shape) if _is_flipped(output) and not is_dense(shape, stride) else stride


def _meta(leaf: Any) -> Any:
    if isinstance(leaf, LazyTensor):
        return leaf.meta_now()
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a call writes to."""
    schema = function._schema
    if not schema.is_mutable:
        return []
    written: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return written
