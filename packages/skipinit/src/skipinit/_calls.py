"""What a block answers in place of a torch function: it puts the call off, or runs it on real values.

A call on tensors that are all pending is put off if its result is known: the shape, strides and aliasing of
the result come from a rule, or from the meta device; its values can be computed later, in order. A call that
needs values, or that mixes pending and real tensors, gets the real values. It never runs on a mixture:
``torch.mm(cpu, meta)`` and ``cpu.fill_(meta)`` succeed silently.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._call import Call, replace, tensors_in
from ._errors import PendingValueError
from ._factories import FACTORIES, LIKE, make, make_like
from ._functions import DEVICE, ELEMENTWISE, IN_PLACE, IN_PLACE_2D, PLAIN, RANDOM
from ._log import Log
from ._tensors import META, autocasts, resolve, storage_address

#: functions that autograd does not follow
UNTRACKED = frozenset({Tensor.data.__get__, Tensor.detach})  # type: ignore[attr-defined]
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
#: since torch 2.12 this initializer announces itself only by asking whether its tensor is on meta
TRUNC_NORMAL = getattr(nn.init, "_no_grad_trunc_normal_").__code__  # noqa: B009
_dispatch_modes = torch._C._len_torch_dispatch_stack


class ValuesNeeded(Exception):
    """A call cannot be put off."""


def answer(log: Log, function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The result of a call."""
    made = None
    if function in FACTORIES:
        made = make(log, function, arguments, keywords)
    elif function in LIKE:
        made = make_like(log, function, arguments, keywords)
    if made is not None:
        return made
    call = Call(function, arguments, keywords)
    # the memo of a deepcopy holds tensors that take no part
    tensors = tensors_in(arguments[0]) if call.name == "__deepcopy__" else call.tensors()
    pending = [tensor for tensor in tensors if log.find(tensor) is not None]
    if not pending:
        return _run(log, call)
    if function in DEVICE:
        return _device(log, call)
    if function == SET_DATA and arguments[0].is_meta:  # what it showed before does not matter
        tensor, data = arguments
        return call.run() if data.is_meta else log.become(tensor, data.detach())
    if len(pending) == len(tensors):
        with contextlib.suppress(ValuesNeeded):
            return _put_off(log, call, pending)
    return _compute(log, call, pending)


def _device(log: Log, call: Call) -> Any:
    """The answer to a question for the device of a pending tensor."""
    caller = sys._getframe(3)
    if call.function == IS_META and caller.f_code is TRUNC_NORMAL:
        values = tuple(map(caller.f_locals.get, ("tensor", "mean", "std", "a", "b", "generator")))
        answer(log, nn.init.trunc_normal_, values, {})
        return True
    return call.function(torch.empty(0, device=log.storages[storage_address(call.arguments[0])].device))


def _put_off(log: Log, call: Call, pending: list[Tensor]) -> Any:
    """The pending result of a call on pending tensors.

    Raises:
        ValuesNeeded: the result is not known, or depends on values.
    """
    function, name = call.function, call.name
    storages = [log.storages[storage_address(tensor)] for tensor in pending]
    device = storages[0].device
    is_tracked = function not in UNTRACKED and getattr(function, "__module__", None) != "torch.nn.init"
    if (
        any(storage.value is not None or storage.device != device for storage in storages)
        or (name in RANDOM and log.streams.seeded_inside())
        or (is_tracked and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in pending))
    ):
        raise ValuesNeeded
    if name == "__deepcopy__":  # its memo goes by ids, which other objects have when it runs
        call = call._replace(arguments=(call.arguments[0], {}))
    frozen = call.replace(log.alias)  # now: some calls change which storage a tensor has
    if name in ("to", "cpu", "cuda") and len(pending) == 1 and not call.keywords.get("memory_format"):
        result, device = _converted(call, pending[0], device)
        is_written = False
    else:
        result, is_written = _ruled(call, pending[0]) or _on_meta(call, pending, device)
    if is_written and len({*map(id, storages)}) < len({*map(id, pending)}):
        raise ValuesNeeded  # torch may refuse to read what is being written, and should do so now
    if device == META:
        return result
    given = set(map(id, pending))
    result = replace(result, lambda output: output if id(output) in given else log.hand_out(output.data))
    outputs = tensors_in(result)
    new = [output for output in outputs if log.find(output) is None]
    if any(map(torch._debug_has_internal_overlap, new)):
        raise ValuesNeeded  # no value can be copied to it
    if is_written or new:
        log.write(frozen, storages + [log.add(output, device) for output in new], outputs)
    return result


def _converted(call: Call, tensor: Tensor, device: torch.device) -> tuple[Tensor, torch.device]:
    """A pending *tensor* on another device, or of another dtype, and where it is: as an empty tensor goes."""
    probe = torch.empty(0, dtype=tensor.dtype, device=device)
    moved = call.replace(lambda _: probe).run()
    return tensor if moved is probe else _alike(tensor, moved.dtype), moved.device


def _ruled(call: Call, tensor: Tensor) -> tuple[Tensor, bool] | None:
    """What a call gives by a rule, and whether it writes to its *tensor*; None if there is no rule."""
    others = [value for value in (*call.arguments, *call.keywords.values()) if value is not tensor]
    if tensor.is_floating_point() and all(type(value) in PLAIN for value in others):
        if call.name in ELEMENTWISE:
            return _alike(tensor, tensor.dtype), False
        if call.name in IN_PLACE or (call.name in IN_PLACE_2D and tensor.dim() > 1):
            return tensor, True
    return None


def _alike(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A meta tensor of the same shape and strides, if these are the usual ones."""
    alike = torch.empty(tensor.size(), dtype=dtype, device=META)
    if alike.stride() != tensor.stride():
        raise ValuesNeeded
    return alike


def _on_meta(call: Call, pending: list[Tensor], device: torch.device) -> tuple[Any, bool]:
    """What a call on a *device* gives on meta tensors, and whether it writes to them."""
    if call.name in RANDOM or autocasts(device) or _dispatch_modes():
        raise ValuesNeeded
    before = [_version(tensor) for tensor in pending]
    try:
        with torch.no_grad():
            result = call.run()
    except Exception as error:  # meta cannot tell, or the call is wrong: then it raises with real values too
        raise ValuesNeeded from error
    is_written = before != [_version(tensor) for tensor in pending]
    outputs = [result] if isinstance(result, Tensor) else [] if result is None and is_written else result
    if (
        not isinstance(outputs, (list, tuple))
        or not all(isinstance(output, Tensor) and output.is_meta for output in outputs)
        or not all(map(storage_address, outputs))  # sparse ones have none
        or any(output.is_conj() or output.is_neg() for output in outputs)  # their storage holds other values
        or (not any(map(torch.is_floating_point, pending)) and any(map(torch.is_floating_point, outputs)))
    ):  # the last: what it gives depends on the default dtype
        raise ValuesNeeded
    return result, is_written


def _version(tensor: Tensor) -> object:
    """What changes when *tensor* is written to; always, where torch does not tell."""
    return object() if tensor.is_inference() else tensor._version


def _compute(log: Log, call: Call, pending: list[Tensor]) -> Any:
    """Run a call on real values.

    Pending tensors become real. Parameters stay as they are, since they must end without storage; a stand-in
    with the value takes part in the call.
    """
    if torch._C._get_tracing_state() is not None:
        raise PendingValueError(
            "torch.jit.trace was called inside skip_model_initialization(): the trace would hold the "
            "values that its parameters have now.\n"
            "    Trace the model after its weights are loaded, or use torch.jit.script."
        )
    stand_ins: dict[int, Tensor] = {}
    originals: dict[int, Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in pending}.values():
        if not isinstance(tensor, nn.Parameter):
            with contextlib.suppress(PendingValueError):
                log.materialize(tensor)
                continue
        stand_in = log.value(tensor).requires_grad_(tensor.requires_grad and tensor.is_leaf)
        stand_ins[id(tensor)], originals[id(stand_in)] = stand_in, tensor
    if stand_ins:
        call = call.replace(lambda tensor: stand_ins.get(id(tensor), tensor))
    result = _run(log, call)
    return originals.get(id(result), result)


def _run(log: Log, call: Call) -> Any:
    """Run a call on real tensors, and remember which storages it made."""
    given = call.tensors()
    if log.streams.seeded_inside() or _dispatch_modes():
        result = call.run()
    else:
        device = given[0].device if given else resolve(call.keywords.get("device"))
        result = log.streams.run(call, device)
    made = _storages(tensors_in(result))
    if made:
        log.made.update(made - _storages(given))
    return result


def _storages(tensors: list[Tensor]) -> set[torch.UntypedStorage]:
    """The storages of the real ones among *tensors*."""
    with torch._C.DisableTorchFunction():  # lazy parameters refuse to tell
        return {t.untyped_storage() for t in tensors if not t.is_meta and storage_address(t)}
