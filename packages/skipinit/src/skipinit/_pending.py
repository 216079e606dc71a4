"""Pending tensors: meta tensors whose values are written down, and computed only if somebody needs them.

What identifies a pending tensor is its storage. Views, and Parameters made from it, share the storage, so
what is written to one of them is found by the others.
"""

import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._errors import PendingValueError
from ._random import Streams

META = torch.device("meta")
_use_count = torch._C._storage_Use_Count
Function = Callable[..., Any]


def storage_address(tensor: Tensor) -> int:
    """What tells storages apart; 0 for tensors that have none (sparse ones, some wrappers)."""
    try:
        address: int = torch._C._storage_address(tensor)  # type: ignore[attr-defined]
    except (NotImplementedError, RuntimeError):
        return 0
    return address


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def replace(values: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists and dicts with every tensor and every `Storage` changed."""
    if isinstance(values, (Tensor, Storage)):
        return change(values)
    if isinstance(values, list):
        return [replace(value, change) for value in values]
    if isinstance(values, tuple):
        changed = [replace(value, change) for value in values]
        return type(values)(*changed) if hasattr(values, "_fields") else type(values)(changed)
    if isinstance(values, dict):
        return {name: replace(value, change) for name, value in values.items()}
    return values


def view_of(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """What *tensor* shows of its own storage, of another *storage*."""
    empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def alias_of(tensor: Tensor) -> Tensor:
    """Another tensor that shows the same, which autograd does not know to be a view of the first.

    It is made without ``tensor.untyped_storage()``, whose result torch may count as a user of the storage for
    as long as the storage lives.
    """
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        empty.set_(tensor)  # type: ignore[call-overload]
    return empty


def become(tensor: Tensor, other: Tensor) -> None:
    """Exchange the data of *tensor*, which stays the same Python object, with that of *other*."""
    is_held = tensor._use_count() > 1  # type: ignore[attr-defined]
    if not is_held:
        other.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        try:
            torch._C._swap_tensor_impl(tensor, other)
        except RuntimeError:
            is_held = True
    if is_held:
        raise PendingValueError(
            f"a tensor of shape {tuple(tensor.shape)} made inside skip_model_initialization() is held by C++ "
            "code (TorchScript, torch.func, or an autograd graph), which would not see its new storage.\n"
            "    Register it as a buffer first, or make it before the block."
        )
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):  # autograd knew them by the old data
        if getattr(tensor, hooks, None):
            setattr(tensor, hooks, getattr(tensor, hooks))


class Storage:
    """One pending storage: how it begins, and the calls that use it."""

    __slots__ = ("calls", "device", "dtype", "factory", "length", "value")

    def __init__(self, factory: Function, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.factory, self.length, self.dtype, self.device = factory, length, dtype, device
        self.calls: list[Call] | None = None  # most storages are used by one call or none
        self.value: torch.UntypedStorage | None = None


class Call:
    """One call that was put off. Meta tensors among its arguments stand for what they show of a storage."""

    __slots__ = (
        "arguments", "default_dtype", "function", "is_done", "keywords", "order", "results", "storages"
    )  # fmt: skip

    def __init__(
        self,
        order: int,
        function: Function,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        storages: list[Storage],
    ) -> None:
        self.order, self.function, self.arguments, self.keywords = order, function, arguments, keywords
        self.storages = storages  # all that it reads, writes or makes
        self.results: tuple[Tensor, ...] = ()
        self.default_dtype = torch.get_default_dtype()
        self.is_done = False


class Log:
    """The pending tensors of one block, and the calls on them."""

    def __init__(self) -> None:
        self.streams = Streams()
        self.storages: dict[int, Storage] = {}  # by address
        self.made: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()  # real storages of the block
        self._handed_out: list[Tensor] = []  # kept, so that no address is used twice
        self._aliases: list[Tensor] = []  # not handed out
        self._wrapped: list[int] = []  # addresses of storages that have a Python object, which is a user too
        self._orders = itertools.count()

    def find(self, tensor: Tensor) -> Storage | None:
        """The storage of a pending *tensor*; None for any other."""
        if not tensor.is_meta:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise PendingValueError(
                "a transform of torch.func (vmap, grad, ...) got a tensor made inside "
                "skip_model_initialization(), whose value it would not see.\n"
                "    Make its inputs before the block, or clone real tensors."
            )
        return self.storages.get(storage_address(tensor))

    # Writing down

    def add(self, tensor: Tensor, factory: Function, length: int, device: torch.device) -> Tensor:
        """Make the meta *tensor* pending: *factory* makes its storage of *length* elements on *device*."""
        self.storages[storage_address(tensor)] = Storage(factory, length, tensor.dtype, device)
        self._handed_out.append(tensor)
        return tensor

    def _add_empty(self, tensor: Tensor, device: torch.device) -> Storage:
        address = storage_address(tensor)
        uses = _use_count(address)
        length = tensor.untyped_storage().nbytes() // tensor.itemsize
        self._wrapped += [address] * (_use_count(address) - uses)
        self.storages[address] = storage = Storage(torch.empty, length, tensor.dtype, device)
        return storage

    def hand_out(self, result: Tensor) -> Tensor:
        """*result*, without autograd's reference to its base, which could then not become real."""
        if result._is_view():
            result = alias_of(result)
        self._handed_out.append(result)
        return result

    def adopt(self, parameter: Tensor) -> None:
        """Make a real *parameter* pending, with the value that it has.

        Raises:
            PendingValueError: C++ code holds it.
        """
        device, value = parameter.device, parameter.untyped_storage()
        on_meta = torch.empty(value.nbytes() // parameter.itemsize, dtype=parameter.dtype, device=META)
        layout = parameter.size(), parameter.stride(), parameter.storage_offset()
        become(parameter, alias_of(on_meta.as_strided(*layout)))
        self._add_empty(self._alias(parameter), device).value = value

    def freeze(self, arguments: Any, keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with aliases of the pending tensors, which may change later."""
        return replace((tuple(arguments), keywords), self._alias)  # type: ignore[no-any-return]

    def write(
        self,
        storages: list[Storage],
        function: Function,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Call:
        """Put a call off that uses *storages*; its arguments are frozen, or hold whole storages."""
        call = Call(next(self._orders), function, arguments, keywords, storages)
        for storage in storages:
            if storage.calls is None:
                storage.calls = [call]
            else:
                storage.calls.append(call)
        return call

    def promise(self, call: Call, results: Iterable[Tensor], device: torch.device) -> None:
        """Say what *call* will give: meta tensors, of new storages or of those that it got."""
        for result in results:
            storage = self.find(result) or self._add_empty(result, device)
            if storage not in call.storages:
                call.storages.append(storage)
                storage.calls = [call]
            call.results += (self._alias(result),)

    def _alias(self, tensor: Tensor) -> Tensor:
        alias = alias_of(tensor)
        self._aliases.append(alias)
        return alias

    # Computing

    def value(self, tensor: Tensor) -> Tensor:
        """A real tensor with the value of the pending *tensor*, in storage shared by all its aliases."""
        with torch.no_grad():
            self._compute(self.storages[storage_address(tensor)])
            return self._real(tensor)

    def materialize(self, tensor: Tensor) -> None:
        """Make the pending *tensor* a real one, in place."""
        value = self.value(tensor)
        become(tensor, value)
        self._handed_out.append(value)  # which is the meta tensor now

    def _compute(self, storage: Storage) -> None:
        """Run, in order, every call connected with *storage*.

        Connected is more than needed: a call that only read the storage runs too. That keeps the rule simple
        enough to be right when tensors are overwritten after others were made from them.
        """
        connected: set[Call] = set()
        to_visit = [storage]
        while to_visit:
            for call in to_visit.pop().calls or ():
                if not call.is_done and call not in connected:
                    connected.add(call)
                    to_visit.extend(call.storages)
        for call in sorted(connected, key=lambda call: call.order):
            self._run(call)

    def _run(self, call: Call) -> None:
        call.is_done = True
        arguments, keywords = replace((call.arguments, call.keywords), self._real)
        given = {storage.value._cdata for storage in call.storages if storage.value is not None}
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(call.default_dtype)
        try:
            with torch._C.DisableTorchFunction():
                result = self.streams.call(call.function, arguments, keywords, call.storages[0].device)
                for promised, made in zip(call.results, tensors_in(result), strict=False):
                    self._keep(promised, made, is_new=made.untyped_storage()._cdata not in given)
        finally:
            torch.set_default_dtype(default_dtype)

    def _real(self, part: Any) -> Tensor:
        """The value of a whole storage, or of what a meta tensor shows of one."""
        storage = part if isinstance(part, Storage) else self.storages[storage_address(part)]
        if storage.value is None:
            options = {"dtype": storage.dtype, "device": storage.device}
            made = self.streams.call(storage.factory, ([storage.length],), options, storage.device)
            storage.value = made.untyped_storage()
            self.made.add(storage.value)
        if isinstance(part, Storage):
            return torch.empty(0, dtype=storage.dtype, device=storage.device).set_(storage.value)
        return view_of(storage.value, part)

    def _keep(self, promised: Tensor, made: Tensor, *, is_new: bool) -> None:
        """Let *made* be the value of *promised*, in the layout that was promised."""
        storage, value = self.storages[storage_address(promised)], made.untyped_storage()
        if storage.value is None and is_new and _layout(made) == _layout(promised):
            storage.value = value
            self.made.add(value)
        elif storage.value is None or storage.value._cdata != value._cdata:
            if made.size() != promised.size():
                raise PendingValueError(
                    f"internal: a call promised the shape {tuple(promised.size())} "
                    f"and gave {tuple(made.size())}"
                )
            self._real(promised).copy_(made)

    # At the end

    def survivors(self) -> list[Tensor]:
        """The pending tensors that somebody else than this log refers to."""
        counts = zip(self._handed_out, _reference_counts(self._handed_out), strict=True)
        return [tensor for tensor, count in counts if count > _UNSHARED and self.find(tensor) is not None]

    def storages_with_unknown_users(self, known: Iterable[int]) -> set[int]:
        """Addresses of pending storages with users that are neither in this log nor *known* by address."""
        own = map(storage_address, itertools.chain(self._handed_out, self._aliases))
        uses = Counter(itertools.chain(own, known, self._wrapped))
        return {address for address in self.storages if _use_count(address) > uses[address]}

    def own_ids(self) -> set[int]:
        return {id(tensor) for tensor in itertools.chain(self._handed_out, self._aliases)}


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()


def _reference_counts(tensors: list[Tensor]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]


#: what that gives for a tensor that nobody else refers to, in this version of Python
_UNSHARED = _reference_counts([torch.empty(0)])[0]
