"""The calls that no other file answers: put off, or run on real values.

A call on tensors that are all pending is put off if its result is known: the shape, strides and aliasing of
the result come from a rule, or from the meta device; its values can be computed later, in order. A call that
needs values, or that mixes pending and real tensors, gets the real values. It never runs on a mixture:
``torch.mm(cpu, meta)`` and ``cpu.fill_(meta)`` succeed silently.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ._call import Call, replace, tensors_in
from ._errors import PendingValueError
from ._pending import Log
from ._random import RANDOM, names
from ._tensors import META, become, resolve, storage_address

# Rules. Without them these calls would be put off nevertheless, but the first ``mul`` or ``normal_`` on the
# meta device makes torch import 800 modules.

#: functions of one floating tensor and numbers whose result has that tensor's shape, strides and dtype
ELEMENTWISE = names(
    "add sub mul div true_divide neg rsub __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__"
    " __neg__"
)
#: functions of one floating tensor and numbers that change nothing but its values
IN_PLACE = names(
    "add_ sub_ mul_ div_ neg_ clamp_ __iadd__ __isub__ __imul__ __itruediv__ uniform_ normal_ fill_ zero_"
    " exponential_ log_normal_ cauchy_ constant_ ones_ zeros_ trunc_normal_"
)
#: the same, for tensors of at least two dimensions (they raise for others)
IN_PLACE_2D = names("xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_ orthogonal_")
#: the types of arguments that cannot change between a call and the time when it is run
PLAIN = frozenset({bool, int, float, str, type(None)})
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
#: functions that autograd does not follow
UNTRACKED = frozenset({Tensor.data.__get__, SET_DATA, Tensor.detach})  # type: ignore[attr-defined]


class Calls:
    """Answers calls for one block."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def answer(self, call: Call) -> Any:
        """The result of a call."""
        tensors = call.tensors()
        pending = [tensor for tensor in tensors if self.log.find(tensor) is not None]
        if not pending:
            return self._run(call)
        if len(pending) == len(tensors):
            result = self._put_off(call, pending)
            if result is not NotImplemented:
                return result
        elif call.function == SET_DATA and call.arguments[0].is_meta:
            become(call.arguments[0], call.arguments[1].detach())
            return None
        return self._compute(call, pending)

    def _put_off(self, call: Call, pending: list[Tensor]) -> Any:
        """The pending result of a call on pending tensors; NotImplemented if the values are needed."""
        function, name, target = call.function, call.name, pending[0]
        storages = [self.log.storages[storage_address(tensor)] for tensor in pending]
        device = storages[0].device
        is_tracked = function not in UNTRACKED and getattr(function, "__module__", None) != "torch.nn.init"
        if (
            name == "__deepcopy__"
            or any(storage.value is not None or storage.device != device for storage in storages)
            or (name in RANDOM and self.log.streams.seeded_inside())
            or (is_tracked and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in pending))
        ):
            return NotImplemented
        others = [value for value in (*call.arguments, *call.keywords.values()) if value is not target]
        is_simple = target.is_floating_point() and all(type(value) in PLAIN for value in others)
        frozen = call.replace(self.log.alias)  # now: some calls change which storage a tensor has
        is_written = False
        if name in ("to", "cpu", "cuda") and len(pending) == 1:
            result, device = _converted(call, device)
        elif is_simple and name in ELEMENTWISE and target.is_contiguous():
            result = torch.empty(target.size(), dtype=target.dtype, device=META)
        elif is_simple and (name in IN_PLACE or (name in IN_PLACE_2D and target.dim() > 1)):
            result, is_written = target, True
        elif name in RANDOM:
            return NotImplemented
        else:
            result, is_written = _on_meta(call, pending)
        if result is NotImplemented or device == META:
            return result
        given = set(map(id, pending))
        result = replace(result, lambda output: output if id(output) in given else self.log.hand_out(output))
        outputs = [] if result is target else tensors_in(result)
        if is_written or any(self.log.find(output) is None for output in outputs):
            self.log.write(storages, frozen, outputs, device)
        return result

    def _compute(self, call: Call, pending: list[Tensor]) -> Any:
        """Run a call on real values.

        Pending tensors become real. Parameters stay as they are, since they must end without storage; a
        stand-in with the value takes part in the call.
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
                    self.log.materialize(tensor)
                    continue
            stand_in = self.log.value(tensor).requires_grad_(tensor.requires_grad and tensor.is_leaf)
            stand_ins[id(tensor)], originals[id(stand_in)] = stand_in, tensor
        result = self._run(call.replace(lambda tensor: stand_ins.get(id(tensor), tensor)))
        return originals.get(id(result), result)

    def _run(self, call: Call) -> Any:
        """Run a call on real tensors, and remember which storages it made."""
        given = call.tensors()
        if self.log.streams.seeded_inside() or torch._C._len_torch_dispatch_stack():
            result = call.run()
        else:
            device = given[0].device if given else resolve(call.keywords.get("device"))
            result = self.log.streams.run(call, device)
        made = _storages(tensors_in(result))
        if made:
            self.log.made.update(made - _storages(given))
        return result


def _converted(call: Call, device: torch.device) -> tuple[Any, torch.device]:
    """A pending tensor on another device, or of another dtype, and where it is; or `NotImplemented`."""
    tensor, *options = call.arguments
    if call.function is not Tensor.to:  # but Tensor.cpu or Tensor.cuda
        if options or call.keywords:
            return NotImplemented, device
        options = [call.name]
    known = {key: value for key, value in call.keywords.items() if key != "copy"}
    target, dtype, _, memory_format = torch._C._nn._parse_to(*options, **known)
    target, dtype = device if target is None else resolve(target), dtype or tensor.dtype
    is_same = (target, dtype) == (device, tensor.dtype) and not call.keywords.get("copy")
    if memory_format is not None or not (is_same or tensor.is_contiguous()):
        return NotImplemented, device
    return (tensor if is_same else torch.empty(tensor.size(), dtype=dtype, device=META)), target


def _on_meta(call: Call, pending: list[Tensor]) -> tuple[Any, bool]:
    """What a call gives on meta tensors, and whether it writes to them; or `NotImplemented`."""
    if torch.is_autocast_enabled() or torch._C._len_torch_dispatch_stack():
        return NotImplemented, False
    before = [_version(tensor) for tensor in pending]
    try:
        with torch.no_grad():
            result = call.run()
    except Exception:  # meta cannot tell, or the call is wrong: then it raises with real values too
        return NotImplemented, False
    is_written = before != [_version(tensor) for tensor in pending]
    if result is None:
        return (None if is_written or call.function == SET_DATA else NotImplemented), is_written
    outputs = [result] if isinstance(result, Tensor) else result
    if (
        not isinstance(outputs, (list, tuple))
        or not all(isinstance(output, Tensor) and output.is_meta for output in outputs)
        or not all(map(storage_address, outputs))  # sparse ones have none
        or (not any(map(torch.is_floating_point, pending)) and any(map(torch.is_floating_point, outputs)))
    ):  # the last: what it gives depends on the default dtype
        return NotImplemented, False
    return result, is_written


def _version(tensor: Tensor) -> object:
    """What changes when *tensor* is written to; always, where torch does not tell."""
    return object() if tensor.is_inference() else tensor._version


def _storages(tensors: list[Tensor]) -> set[torch.UntypedStorage]:
    """The storages of the real ones among *tensors*."""
    return {tensor.untyped_storage() for tensor in tensors if not tensor.is_meta and storage_address(tensor)}
