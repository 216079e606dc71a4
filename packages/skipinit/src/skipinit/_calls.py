"""The calls that the fast path does not know: run, deferred, or given the values that they need.

A call on tensors that are all pending is deferred if its result is known: the shape, strides and aliasing of
the result come from a rule, or from the meta device; its values can then be computed later, in order. A call
that needs values, or that mixes pending and real tensors, gets the real values. It never runs on a mixture:
``torch.mm(cpu, meta)`` and ``cpu.fill_(meta)`` succeed silently.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import PendingValueError
from ._log import CPU, META, Log, become, meta_like, replace, storage_address, tensors_in
from ._vocabulary import (
    CASTS,
    ELEMENTWISE,
    ELEMENTWISE_IN_PLACE,
    INITIALIZERS,
    PLAIN,
    RANDOM,
    UNTRACKED,
    VIEWS,
    Function,
)

SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _independent(view: Tensor) -> Tensor:
    """*view* without autograd's reference to its base, which could then not become real."""
    if not view._is_view():
        return view
    with torch.no_grad():
        alias: Tensor = torch.empty(0, dtype=view.dtype, device=META).set_(view.detach())  # type: ignore[call-overload]
    return alias


class Calls:
    """Answers calls for one block."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def answer(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], *, device: torch.device
    ) -> Any:
        """The result of a call; *device* is where it would make a tensor from nothing."""
        tensors = tensors_in((tuple(arguments), keywords))
        pending = [tensor for tensor in tensors if self.log.device_of(tensor) is not None]
        if not pending:
            return self._run(function, arguments, keywords, tensors[0].device if tensors else device)
        if len(pending) == len(tensors):
            result = self._defer(function, arguments, keywords, pending)
            if result is not NotImplemented:
                return result
        elif function == SET_DATA and arguments[0].is_meta:
            self.log.sort()
            target, data = arguments
            alias = data.detach()
            become(target, alias)
            self.log.keep_replaced(alias)
            return None
        return self._compute(function, arguments, keywords, pending)

    def _run(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], device: torch.device
    ) -> Any:
        """Run a call on real tensors, and remember which storages it made."""
        is_random = function.__name__ in RANDOM and not torch._C._len_torch_dispatch_stack()
        if is_random and device.type != "meta" and not self.log.streams.seeded_inside():
            result = self.log.streams.call(function, arguments, keywords, device)
        else:
            result = function(*arguments, **keywords)
        made = [
            tensor for tensor in tensors_in(result) if tensor.layout is torch.strided and not tensor.is_meta
        ]
        if made:
            given = {_address(tensor) for tensor in tensors_in((tuple(arguments), keywords))}
            self.log.born.update({_address(tensor) for tensor in made} - given)
        return result

    # Deferring

    def _defer(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], pending: list[Tensor]
    ) -> Any:
        """The pending result of a call on pending tensors; NotImplemented if the values are needed."""
        name, first = function.__name__, pending[0]
        device = self.log.device_of(first) or CPU
        is_initializer = name in INITIALIZERS and function is not getattr(Tensor, name, None)
        overwrites = is_initializer or name in ELEMENTWISE_IN_PLACE
        if (
            name == "__deepcopy__"
            or any(self.log.has_value(tensor) for tensor in pending)
            or (name in RANDOM and (not overwrites or self.log.streams.seeded_inside()))
            or (torch.is_grad_enabled() and not is_initializer and function not in UNTRACKED
                and any(tensor.requires_grad for tensor in pending))
            or any(self.log.device_of(tensor) != device for tensor in pending)
        ):  # fmt: skip
            return NotImplemented
        if len(pending) == 1 and arguments and arguments[0] is first:
            others = (*arguments[1:], *keywords.values())
            only_numbers = first.is_floating_point() and all(type(value) in PLAIN for value in others)
            if overwrites and only_numbers:
                self.log.write(function, arguments, keywords, [], device)
                return first
            if name in ELEMENTWISE and only_numbers and first.is_contiguous():
                return self._pending(function, arguments, keywords, meta_like(first), device)
            if name in CASTS or name in ("to", "cpu", "cuda", "type"):
                return self._cast(function, arguments, keywords, device)
        return self._ask_meta(function, arguments, keywords, device)

    def _pending(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], result: Tensor,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        self.log.write(function, arguments, keywords, [result], device)
        return self.log.keep(result, device)

    def _cast(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], device: torch.device
    ) -> Any:
        """Changing the device or the dtype of a pending tensor does not need its values."""
        tensor, name = arguments[0], function.__name__
        target, dtype = device, CASTS.get(name)
        always_copies = bool(keywords.get("copy"))
        if name == "to":
            known = {key: value for key, value in keywords.items() if key != "copy"}
            parsed_device, dtype, _, memory_format = torch._C._nn._parse_to(*arguments[1:], **known)
            if memory_format is not None and memory_format is not torch.preserve_format:
                return NotImplemented
            target = parsed_device or device
        elif name == "cpu":
            target = CPU
        elif len(arguments) > 1 or keywords or name in ("cuda", "type"):
            return NotImplemented
        if target.type == "meta":
            return meta_like(tensor, dtype)  # the caller's own meta tensor
        if target.type != "cpu":
            target = torch.empty(0, device=target).device  # raises for a missing device; fills in its index
        if target == device and dtype in (None, tensor.dtype) and not always_copies:
            return tensor
        if not tensor.is_contiguous():
            return NotImplemented
        return self._pending(function, arguments, keywords, meta_like(tensor, dtype), target)

    def _ask_meta(
        self, function: Function, arguments: Sequence[Any], keywords: dict[str, Any], device: torch.device
    ) -> Any:
        """Run the call on the meta tensors, to learn the shape and the aliasing of its result."""
        if torch.is_autocast_enabled() or torch._C._len_torch_dispatch_stack():
            return NotImplemented
        self.log.sort()  # the call may change which storage a tensor has
        as_it_was = self.log.snapshot(arguments, keywords)
        given = {id(tensor) for tensor in tensors_in((tuple(arguments), keywords))}
        try:
            with torch.no_grad():
                result = function(*arguments, **keywords)
        except Exception:  # meta cannot tell, or the call is wrong: then it raises with real values too
            return NotImplemented
        if function == SET_DATA:
            return None
        if function.__name__ == "__setitem__":
            self.log.write(function, *as_it_was, [], device)
            return None
        result = replace(result, lambda output: output if id(output) in given else _independent(output))
        outputs = tensors_in(result)
        known = isinstance(result, Tensor) or (
            isinstance(result, (tuple, list)) and len(outputs) == len(result)
        )
        if not known or not outputs or not all(output.is_meta for output in outputs):
            return NotImplemented
        new = [output for output in outputs if self.log.device_of(output) is None]
        if new or function.__name__ not in VIEWS:
            self.log.write(function, *as_it_was, new, device)
        for output in outputs:
            if id(output) not in given:
                self.log.keep(output, device)
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
        for tensor in {id(tensor): tensor for tensor in pending}.values():
            try:
                if not isinstance(tensor, nn.Parameter):
                    self.log.materialize(tensor)
                    continue
            except PendingValueError:
                pass
            stand_in = self.log.value(tensor)
            stand_ins[id(tensor)] = stand_in.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        originals = {id(stand_ins[id(tensor)]): tensor for tensor in pending if id(tensor) in stand_ins}
        real_arguments = replace(tuple(arguments), lambda tensor: stand_ins.get(id(tensor), tensor))
        real_keywords = replace(keywords, lambda tensor: stand_ins.get(id(tensor), tensor))
        device = self.log.device_of(pending[0]) or pending[0].device
        result = self._run(function, real_arguments, real_keywords, device)
        return originals.get(id(result), result)


def _address(tensor: Tensor) -> int:
    try:
        return storage_address(tensor)
    except (NotImplementedError, RuntimeError):  # sparse, or a wrapper without storage
        return 0
