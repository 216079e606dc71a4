"""The calls that the mode does not answer itself: put off, or run on real values.

A call on tensors that are all pending is put off if its result is known: the shape, strides and aliasing of
the result come from a rule, or from the meta device; its values can be computed later, in order. A call that
needs values, or that mixes pending and real tensors, gets the real values. It never runs on a mixture:
``torch.mm(cpu, meta)`` and ``cpu.fill_(meta)`` succeed silently.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import PendingValueError
from ._pending import META, Function, Log, Storage, become, replace, storage_address, tensors_in
from ._random import RANDOM, name_of, names

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
#: pure views: nothing to write down
VIEWS = names(
    "__get__ __getitem__ detach view view_as t transpose permute unsqueeze squeeze narrow select chunk split"
    " unbind expand expand_as diagonal flatten unflatten swapaxes movedim"
)
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
#: functions that autograd does not follow
UNTRACKED = frozenset({Tensor.data.__get__, SET_DATA, Tensor.detach})  # type: ignore[attr-defined]
_INITIALIZERS = frozenset(name for name in dir(nn.init) if name.endswith("_") and name[0] != "_")


class Calls:
    """Answers calls for one block."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def answer(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], device: torch.device
    ) -> Any:
        """The result of a call; *device* is where it would make a tensor from nothing."""
        tensors = tensors_in((arguments, keywords))
        pending = [tensor for tensor in tensors if self.log.find(tensor) is not None]
        if not pending:
            return self._run(function, arguments, keywords, tensors[0].device if tensors else device)
        if len(pending) == len(tensors):
            result = self._put_off(function, arguments, keywords, pending)
            if result is not NotImplemented:
                return result
        elif function == SET_DATA and arguments[0].is_meta:
            become(arguments[0], arguments[1].detach())
            return None
        return self._compute(function, arguments, keywords, pending)

    def _run(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], device: torch.device
    ) -> Any:
        """Run a call on real tensors, and remember which storages it made."""
        if self.log.streams.seeded_inside() or torch._C._len_torch_dispatch_stack():
            result = function(*arguments, **keywords)
        else:
            result = self.log.streams.call(function, arguments, keywords, device)
        made = _storages(result)
        if made:
            self.log.made.update(made - _storages((arguments, keywords)))
        return result

    # Putting off

    def _put_off(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], pending: list[Tensor]
    ) -> Any:
        """The pending result of a call on pending tensors; NotImplemented if the values are needed."""
        name, target = name_of(function), pending[0]
        storages = [self.log.storages[storage_address(tensor)] for tensor in pending]
        device = storages[0].device
        is_initializer = name in _INITIALIZERS and function is not getattr(Tensor, name, None)
        if (
            name == "__deepcopy__"
            or any(storage.value is not None or storage.device != device for storage in storages)
            or (name in RANDOM and self.log.streams.seeded_inside())
            or (torch.is_grad_enabled() and not is_initializer and function not in UNTRACKED
                and any(tensor.requires_grad for tensor in pending))
        ):  # fmt: skip
            return NotImplemented
        others = [value for value in (*arguments, *keywords.values()) if value is not target]
        if name in ("to", "cpu", "cuda") and len(pending) == 1:
            return self._move(function, arguments, keywords, storages)
        if target.is_floating_point() and all(type(value) in PLAIN for value in others):
            if name in IN_PLACE or (name in IN_PLACE_2D and target.dim() > 1):
                self.log.write(storages, function, *self.log.freeze(arguments, keywords))
                return target
            if name in ELEMENTWISE and target.is_contiguous():
                return self._promise(function, arguments, keywords, storages, target.dtype, device)
        return NotImplemented if name in RANDOM else self._ask_meta(function, arguments, keywords, storages)

    def _promise(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], storages: list[Storage],
        dtype: torch.dtype, device: torch.device,
    ) -> Tensor:  # fmt: skip
        """The pending result, contiguous and on *device*, of a call on one tensor of that shape."""
        shape = tensors_in((arguments, keywords))[0].size()
        result = self.log.hand_out(torch.empty(shape, dtype=dtype, device=META))
        call = self.log.write(storages, function, *self.log.freeze(arguments, keywords))
        self.log.promise(call, [result], device)
        return result

    def _move(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], storages: list[Storage]
    ) -> Any:
        """Changing the device or the dtype of a pending tensor does not need its values."""
        tensor, device, dtype = arguments[0], storages[0].device, None
        if function is Tensor.to:
            known = {key: value for key, value in keywords.items() if key != "copy"}
            target, dtype, _, memory_format = torch._C._nn._parse_to(*arguments[1:], **known)
            if memory_format is not None:
                return NotImplemented
        elif len(arguments) > 1 or keywords:
            return NotImplemented
        else:
            target = torch.device(function.__name__)
        target, dtype = device if target is None else with_index(target), dtype or tensor.dtype
        if target == META:
            return torch.empty(tensor.size(), dtype=dtype, device=META)  # the caller's own meta tensor
        if (target, dtype) == (device, tensor.dtype) and not keywords.get("copy"):
            return tensor
        if not tensor.is_contiguous():
            return NotImplemented
        return self._promise(function, arguments, keywords, storages, dtype, target)

    def _ask_meta(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], storages: list[Storage]
    ) -> Any:
        """Run the call on the meta tensors, to learn the shape and the aliasing of its result."""
        if torch.is_autocast_enabled() or torch._C._len_torch_dispatch_stack():
            return NotImplemented
        frozen = self.log.freeze(arguments, keywords)  # the call may change which storage a tensor has
        given = {id(tensor) for tensor in tensors_in((arguments, keywords))}
        try:
            with torch.no_grad():
                result = function(*arguments, **keywords)
        except Exception:  # meta cannot tell, or the call is wrong: then it raises with real values too
            return NotImplemented
        if function == SET_DATA:
            return None
        outputs = tensors_in(result)
        if name_of(function) == "__setitem__":
            self.log.write(storages, function, *frozen)
            return None
        if not outputs or not all(output.is_meta for output in outputs) or not _is_flat(result):
            return NotImplemented
        result = replace(result, lambda output: output if id(output) in given else self.log.hand_out(output))
        if name_of(function) not in VIEWS or any(self.log.find(output) is None for output in outputs):
            self.log.promise(
                self.log.write(storages, function, *frozen), tensors_in(result), storages[0].device
            )
        return result

    # Computing

    def _compute(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], pending: list[Tensor]
    ) -> Any:
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
        device = self.log.storages[storage_address(pending[0])].device
        for tensor in {id(tensor): tensor for tensor in pending}.values():
            if not isinstance(tensor, nn.Parameter):
                with contextlib.suppress(PendingValueError):
                    self.log.materialize(tensor)
                    continue
            stand_in = self.log.value(tensor)
            stand_ins[id(tensor)] = stand_in.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        originals = {id(stand_ins[id(tensor)]): tensor for tensor in pending if id(tensor) in stand_ins}
        arguments, keywords = replace(
            (tuple(arguments), keywords), lambda tensor: stand_ins.get(id(tensor), tensor)
        )
        result = self._run(function, arguments, keywords, device)
        return originals.get(id(result), result)


def with_index(device: torch.device) -> torch.device:
    """*device* as tensors say it: an accelerator has an index. A missing one raises, as it does plainly."""
    return device if device.type in ("cpu", "meta") else torch.empty(0, device=device).device


def _is_flat(result: Any) -> bool:
    return isinstance(result, Tensor) or all(isinstance(entry, Tensor) for entry in result)


def _storages(values: Any) -> set[torch.UntypedStorage]:
    """The real storages among *values*."""
    return {
        tensor.untyped_storage()
        for tensor in tensors_in(values)
        if not tensor.is_meta and storage_address(tensor)
    }
