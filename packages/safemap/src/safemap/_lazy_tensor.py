"""A tensor without data: it has dtype, shape and strides, and every operator on it goes to a recorder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

from safemap._errors import ConverterError
from safemap._lazy_content import Content
from safemap._lazy_graph import View

if TYPE_CHECKING:
    from safemap._lazy_record import Recorder


class Storage:
    """What several lazy tensors may be views of; writing replaces its content.

    Attributes:
        is_frozen: Must not be written to; see Note [Conjugate views] in ``_lazy_record``.
    """

    __slots__ = ("_meta", "content", "device", "is_frozen", "recorder")

    def __init__(
        self, content: Content, recorder: Recorder, device: torch.device, *, is_frozen: bool = False
    ) -> None:
        self.content = content
        self.recorder = recorder
        self.device = device
        self.is_frozen = is_frozen
        self._meta: torch.UntypedStorage | None = None

    def meta(self) -> torch.UntypedStorage:
        """Return a storage on the meta device, by whose identity torch's own view logic is followed."""
        if self._meta is None:
            self._meta = torch.UntypedStorage(self.content.nbytes, device="meta")  # type: ignore[no-untyped-call]
        return self._meta


class LazyTensor(Tensor):
    """A view of a ``Storage``; a subclass of ``torch.Tensor``, so that any code for tensors takes it."""

    storage_: Storage
    _view: View | None
    _meta: Tensor | None

    @staticmethod
    def __new__(
        cls,
        storage: Storage,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        storage_offset: int = 0,
    ) -> LazyTensor:
        self: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, storage_offset=storage_offset, dtype=dtype, device=storage.device
        )
        self.storage_ = storage
        self._view = self._meta = None
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor))
        return first.storage_.recorder.call(function, args, kwargs)

    def view_now(self) -> View:
        """Return the tensor as it is now; what is written to its storage later does not change it."""
        content = self.storage_.content
        view = self._view
        if view is None or view.content is not content:
            view = self._view = View(
                content,
                self.dtype,
                tuple(self.shape),
                tuple(self.stride()),
                int(self.storage_offset()) * self.dtype.itemsize,
                self.storage_.device,
            )
        return view

    def meta_now(self) -> Tensor:
        """Return a tensor on the meta device with the same layout, in the meta storage."""
        if self._meta is None:
            empty = torch.empty(0, dtype=self.dtype, device="meta")
            self._meta = empty.set_(
                self.storage_.meta(),
                self.storage_offset(),
                self.shape,
                self.stride(),
            )
        return self._meta

    def change_layout(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyTensor:
        """Apply an operator that gives this same object another shape or other strides, such as ``t_``."""
        with no_dispatch():
            function(*args, **kwargs)
        self._view = self._meta = None
        return self

    @property
    def data(self) -> Tensor:
        """Another tensor of the same storage; assigning makes this one a view of the storage assigned."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        new = value if isinstance(value, LazyTensor) else self.storage_.recorder.lazy(value)
        torch._C.TensorBase.data.__set__(self, new)  # type: ignore[attr-defined]
        self.storage_ = new.storage_
        self._view = self._meta = None

    def values(self, operation: str) -> Tensor:  # type: ignore[override]
        """Read the tensor now, because *operation* cannot be recorded."""
        return self.storage_.recorder.force(self.view_now(), operation)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={list(self.shape)}, dtype={self.dtype}, {self.storage_.content!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyTensor:
        storage = memo.get(id(self.storage_))
        if storage is None:
            storage = Storage(self.storage_.content, self.storage_.recorder, self.storage_.device)
            memo[id(self.storage_)] = storage
        copy = LazyTensor(
            storage, self.dtype, tuple(self.shape), tuple(self.stride()), int(self.storage_offset())
        )
        memo[id(self)] = copy
        return copy

    def __copy__(self) -> LazyTensor:
        return self.detach()  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values("pickling").__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        """Read the values."""
        return self.values("tolist").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Read the values; the array is a copy."""
        return self.values("numpy").numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.values("__array__").__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.values("__dlpack__").__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.values("__dlpack_device__").__dlpack_device__()

    def data_ptr(self) -> int:
        """Refuse: a tensor that was not read has no address."""
        self._no_memory("data_ptr()")

    def untyped_storage(self) -> torch.UntypedStorage:
        """Refuse, as ``data_ptr`` does."""
        self._no_memory("untyped_storage()")

    def storage(self) -> torch.TypedStorage:
        """Refuse, as ``data_ptr`` does."""
        self._no_memory("storage()")

    def share_memory_(self) -> Tensor:
        """Refuse, as ``data_ptr`` does."""
        self._no_memory("share_memory_()")

    def _no_memory(self, what: str) -> NoReturn:
        raise ConverterError(
            f"the state_dict_converter {self.storage_.recorder.label} calls {what} on "
            f"{self.storage_.recorder.describe(self.view_now())}, which is not in memory yet: tensors are "
            "read when a converted name is asked for. Compare tensors with `is` instead, or convert the "
            "checkpoint in memory."
        )
