"""One open block: who is in it, what it is told, and how it ends.

While a `TorchFunctionMode` is entered, torch calls its ``__torch_function__(function, types, arguments,
keywords)`` in place of every torch function and tensor method that the current thread calls, and takes what
it returns as the result. Inside that method the mode is off, so calling ``function`` there runs it plainly.
"""

import asyncio
import contextlib
import contextvars
import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from ._calls import answer
from ._errors import PendingValueError
from ._functions import METADATA
from ._linear import expect_reset
from ._log import Log
from ._tensors import become, storage_address

_entered: contextvars.ContextVar["Block | None"] = contextvars.ContextVar("skipinit_block", default=None)
LOAD_STATE_DICT = nn.Module.load_state_dict.__code__
_use_count = torch._C._storage_Use_Count
_running_loop, _thread = asyncio._get_running_loop, threading.get_ident


def _current_task() -> Any:
    loop = _running_loop()
    return None if loop is None else asyncio.current_task(loop)


class Block(TorchFunctionMode):
    """What one thread, or one asyncio task, makes between entering and leaving."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.depth = 1
        self.suspensions = 0
        self.log = Log()
        self.parameters: dict[int, nn.Parameter] = {}  # by id: those that modules registered
        self.loaded: dict[int, weakref.ref[nn.Parameter]] = {}  # by id: what load_state_dict assigned
        self._thread, self._task = _thread(), _current_task()
        self._outer = _entered.get()

    @staticmethod
    def current() -> "Block | None":
        """The block that the calling thread and task are in."""
        block = _entered.get()
        return block if block is not None and block.is_current() else None

    def is_current(self) -> bool:
        """Whether this thread and this task are those that opened the block, and have not suspended it."""
        is_open = self.depth > 0 and not self.suspensions
        return is_open and self._thread == _thread() and self._task is _current_task()

    def __torch_function__(
        self, function: Any, types: object, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function in METADATA or not self.is_current():
            return function(*arguments, **keywords) if keywords else function(*arguments)
        return answer(self.log, function, arguments, keywords or {})

    def open(self) -> None:
        _entered.set(self)
        _push_mode(self)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave the thread alone for a while; what is pending gets its value, unless it is a parameter."""
        with torch._C.DisableTorchFunction():
            for tensor in self.log.survivors():
                self.log.materialize(tensor)
        self.suspensions += 1
        try:
            yield
        finally:
            self.suspensions -= 1

    def close(self, *, failed: bool) -> None:
        """End the block: no pending tensor outlives it, except parameters on the meta device.

        Args:
            failed: An exception ends the block; what has no value then does not matter.
        """
        self.depth = 0
        _entered.set(self._outer)
        above = []  # blocks of other tasks on this thread may have been entered later and be open still
        while self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            above.append(_pop_mode())  # type: ignore[no-untyped-call]
        for mode in reversed(above[:-1]):
            _push_mode(mode)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunction():
            for parameter in self.parameters.values():
                if storage_address(parameter) not in self.log.storages:  # since ``parameter.data = ...``
                    self.take_storage(parameter)
            with contextlib.suppress(*([PendingValueError] if failed else [])):
                for tensor in self.log.survivors():
                    self.log.materialize(tensor)
                known = [*self.log.own(), *self.parameters.values()]
                users = sum(map(self.log.storages.__contains__, map(storage_address, known)))
                if sum(map(_use_count, self.log.storages)) > users:
                    self._search_for_users()
            if self.device.type != "meta":
                for parameter in self.parameters.values():
                    if self.log.find(parameter) is not None:
                        become(parameter, self.log.value(parameter).to(self.device, copy=True))

    def _search_for_users(self) -> None:
        """Parameters that were registered past the hook (deepcopy) are noted, all others get values."""
        known = set(map(id, self.log.own())) | self.parameters.keys()
        registered: set[int] = set()
        users: list[Tensor] = []
        for candidate in gc.get_objects():
            kind = type(candidate)  # isinstance would run the __class__ of lazy proxies
            if issubclass(kind, nn.Module):
                registered.update(id(p) for p in candidate.__dict__.get("_parameters", {}).values())
            elif issubclass(kind, Tensor) and storage_address(candidate) in self.log.storages:
                users.append(candidate)
        for tensor in users:
            if id(tensor) in registered:
                self.parameters[id(tensor)] = tensor  # type: ignore[assignment]
            elif id(tensor) not in known:
                self.log.materialize(tensor)

    def take_storage(self, parameter: nn.Parameter) -> None:
        """Make a *parameter* pending if its data are real, and this block made them as initial values."""
        has_own_rules = type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if has_own_rules or isinstance(parameter, UninitializedTensorMixin) or not storage_address(parameter):
            return
        with torch._C.DisableTorchFunction(), contextlib.suppress(PendingValueError):
            if parameter.untyped_storage() in self.log.made and not self._is_loaded(parameter):
                self.log.adopt(parameter)  # unless C++ code holds it: then it stays real

    def _is_loaded(self, parameter: nn.Parameter) -> bool:
        """Whether ``load_state_dict(assign=True)`` gave a module this real *parameter*, now or before.

        What somebody loads is to stay, whoever made its memory: a file may have been read into a tensor that
        was made in the block.
        """
        known = self.loaded.get(id(parameter))
        if known is not None and known() is parameter:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not LOAD_STATE_DICT:
            frame = frame.f_back
        if frame is not None:
            self.loaded[id(parameter)] = weakref.ref(parameter)
        return frame is not None


def _note_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    block = _entered.get()
    if block is not None and parameter is not None and block.is_current():
        block.parameters[id(parameter)] = parameter
        if storage_address(parameter) not in block.log.storages:
            block.take_storage(parameter)
        elif name == "weight":
            expect_reset(module, parameter, block.log)


def _give_buffer_its_value(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    """A buffer will be needed for certain, and TorchScript must find it real."""
    if buffer is not None and (block := Block.current()) is not None:
        with torch._C.DisableTorchFunction():
            if block.log.find(buffer) is not None:
                block.log.materialize(buffer)


register_module_parameter_registration_hook(_note_parameter)
register_module_buffer_registration_hook(_give_buffer_its_value)
