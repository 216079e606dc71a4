"""One open block: who is in it, what it made, and how it ends."""

import asyncio
import contextlib
import contextvars
import gc
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from ._errors import PendingValueError
from ._log import Log, become, storage_address
from ._mode import BlockMode
from ._streams import Streams

_entered: contextvars.ContextVar["Block | None"] = contextvars.ContextVar("skipinit_block", default=None)


_running_loop = asyncio._get_running_loop


def _current_task() -> Any:
    loop = _running_loop()
    return None if loop is None else asyncio.current_task(loop)


class Block:
    """What one thread, or one asyncio task, makes between entering and leaving."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.depth = 1
        self.log = Log(Streams())
        self.parameters: dict[int, nn.Parameter] = {}  # by id
        self._thread, self._task = threading.get_ident(), _current_task()
        self._outer = _entered.get()
        self._mode = BlockMode(self)

    @staticmethod
    def current() -> "Block | None":
        """The block that the calling thread and task are in."""
        block = _entered.get()
        if block is None or block._thread != threading.get_ident() or not block.is_current():
            return None
        return block

    def is_current(self) -> bool:
        """Whether the running task, on this block's thread, is the one that opened the block."""
        loop = _running_loop()
        return self.depth > 0 and self._task is (None if loop is None else asyncio.current_task(loop))

    def open(self) -> None:
        _entered.set(self)
        _push_mode(self._mode)  # type: ignore[no-untyped-call]

    def close(self, *, failed: bool) -> None:
        """End the block: no pending tensor outlives it, except parameters on the meta device.

        Args:
            failed: An exception ends the block; what has no value then does not matter.
        """
        self.depth = 0
        _entered.set(self._outer)
        above = []  # blocks of other tasks on this thread may have been entered later and be open still
        while self._mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            above.append(_pop_mode())  # type: ignore[no-untyped-call]
        for mode in reversed(above[:-1]):
            _push_mode(mode)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunction():
            try:
                self._give_values()
            except PendingValueError:
                if not failed:
                    raise
            self._place_parameters()

    def _give_values(self) -> None:
        for parameter in (
            self.parameters.values() if self.log.born else ()
        ):  # ``parameter.data = ...`` made some real
            self._empty(parameter)
        for tensor in self.log.survivors():
            if self.log.device_of(tensor) is not None:
                self.log.materialize(tensor)
        pending = [p for p in self.parameters.values() if self.log.device_of(p) is not None]
        unknown = self.log.storages_with_unknown_users(pending)
        if unknown:
            self._search_for_users(unknown)

    def _search_for_users(self, storages: set[int]) -> None:
        """Parameters that were registered past the hook (deepcopy) are noted, all others get values."""
        ours = {id(entry[0]) for entries in (self.log.births, self.log.kept) for entry in entries}
        registered: set[int] = set()
        users: list[Tensor] = []
        for candidate in gc.get_objects():
            kind = type(candidate)  # isinstance would run the __class__ of lazy proxies
            if issubclass(kind, nn.Module):
                registered.update(id(p) for p in candidate.__dict__.get("_parameters", {}).values())
            elif (
                issubclass(kind, Tensor)
                and id(candidate) not in ours
                and id(candidate) not in self.parameters
            ):
                device = self.log.device_of(candidate)
                if device is not None and storage_address(candidate) in storages:
                    users.append(candidate)
        for tensor in users:
            if id(tensor) in registered:
                self.parameters[id(tensor)] = tensor  # type: ignore[assignment]
            else:
                self.log.materialize(tensor)

    def note(self, parameter: nn.Parameter) -> None:
        """A module registers *parameter*."""
        self.parameters[id(parameter)] = parameter
        if self.log.born and storage_address(parameter) in self.log.born:
            with torch._C.DisableTorchFunction():
                self._empty(parameter)

    def _empty(self, parameter: nn.Parameter) -> None:
        """Take the storage of a real *parameter* whose data this block made."""
        if parameter.is_meta or storage_address(parameter) not in self.log.born or _has_own_rules(parameter):
            return
        with contextlib.suppress(
            PendingValueError
        ):  # C++ code holds it; it stays real, which costs memory only
            self.log.adopt(parameter)

    def _place_parameters(self) -> None:
        if self.device.type != "meta":
            for parameter in self.parameters.values():
                if self.log.device_of(parameter) is not None:
                    become(parameter, self.log.value(parameter).to(self.device, copy=True))


def _has_own_rules(parameter: Tensor) -> bool:
    own_dispatch = type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own_dispatch or isinstance(parameter, UninitializedTensorMixin)


def _note_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if _entered.get() is not None and parameter is not None:
        block = Block.current()
        if block is not None:
            block.note(parameter)


def _give_buffer_its_value(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    """A buffer will be needed for certain, and TorchScript must find it real."""
    if _entered.get() is not None and buffer is not None:
        block = Block.current()
        if block is not None:
            with torch._C.DisableTorchFunction():
                if block.log.device_of(buffer) is not None:
                    block.log.materialize(buffer)


register_module_parameter_registration_hook(_note_parameter)
register_module_buffer_registration_hook(_give_buffer_its_value)
