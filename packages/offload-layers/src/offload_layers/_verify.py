"""Comparing a managed model with the plain one, layer by layer, in the memory that the managed one needs.

The model runs once. Each layer is run again as it was before it was managed, on the same inputs and with the
same random numbers, and the results are compared to the last bit. So one layer's weights are in memory at a
time, and a layer that differs is found by name: those after it get the model's own inputs, and agree.
"""

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offload_layers._around import Forward, around_forward
from offload_layers._compare import difference_of, same_bits
from offload_layers._errors import OffloadLayersError, VerificationError
from offload_layers._layers import AutoTorchModule
from offload_layers._report import managed_layers
from offload_layers._residency import Residency
from offload_layers._twin import Twin, due_values


@dataclass(frozen=True)
class Difference:
    """A result that is not that of the plain layer.

    Attributes:
        name: Dotted name of the layer, or of the weight where only weights are compared.
        max_abs: The largest difference of two elements; infinite for NaN, and for other shapes or dtypes.
        shape: Of the result that differs, or of the weight.
    """

    name: str
    max_abs: float
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name or '(the model)'} {self.shape} differs by up to {self.max_abs:.3g}"


@dataclass(frozen=True)
class Verification:
    """What `verify` has found. It is neither true nor false: ask for `is_equal`.

    Attributes:
        layers_checked: How many layers were compared.
        differences: What differs, in the order in which it was met; empty is as it should be.
        unchecked: Names of the layers that were not compared, since they were not called, or gave no tensor.
    """

    layers_checked: int
    differences: tuple[Difference, ...]
    unchecked: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether layers were compared, and each gave what the plain layer gives, to the last bit."""
        return self.layers_checked > 0 and not self.differences

    def raise_if_different(self) -> None:
        """Raise ``VerificationError`` unless `is_equal`."""
        if not self.is_equal:
            raise VerificationError(str(self))

    def __bool__(self) -> bool:
        raise TypeError("a Verification is neither true nor false; ask for its is_equal or its differences")

    def __str__(self) -> str:
        checked = f"{self.layers_checked:,} layers"
        if self.differences:
            lines = [f"of {checked}, these are not as the plain ones:", *map(str, self.differences)]
        elif self.layers_checked:
            lines = [f"{checked} are as the plain ones, to the last bit"]
        else:
            lines = ["no layer was compared"]
        if self.unchecked:
            lines.append(f"not compared, {len(self.unchecked):,}: {', '.join(self.unchecked)}")
        return "\n".join(lines)


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Verification:
    """Run *model* once on the given inputs, and compare each managed layer with the plain one.

    The model is afterwards as after any other call. For the comparison, one layer more than usual is on the
    device at a time, borrowed from its budget as any other. Of a module whose children are managed by
    themselves the own weights are compared, as they are while it runs.

    Args:
        model: A model with managed layers.
        *args: Inputs of its forward.
        **kwargs: The same.

    Raises:
        ConfigError: the model has no managed layers.
        OffloadLayersError: a layer runs managed, but not plain.
    """
    layers = {layer: layer.name for layer in managed_layers(model) if layer.weights}
    checker = _Checker(model)
    with checker.watching():
        model(*args, **kwargs)
    return Verification(
        layers_checked=len(checker.checked),
        differences=tuple(checker.differences.values()),
        unchecked=tuple(name for layer, name in layers.items() if layer not in checker.checked),
    )


class _Checker:
    """Compares the calls of layers."""

    def __init__(self, model: nn.Module) -> None:
        self.checked: set[Residency] = set()
        self.differences: dict[str, Difference] = {}
        self._model = model
        self._local = threading.local()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Compare the calls in the block."""
        with ExitStack() as stack:
            for module in self._model.modules():
                if not isinstance(module, AutoTorchModule) or "forward" in module.__dict__:
                    continue  # the latter: somebody has put a forward of their own in its place
                if module._covers_children:
                    watch = functools.partial(self._run_twice, module)
                    stack.enter_context(around_forward(module, watch))
                else:
                    watch = functools.partial(self._look_at_resident, module._owner())
                    stack.enter_context(around_forward(module, watch))
                    stack.enter_context(self._looking_at(module._owner()))
            yield

    # -- layers that are run again ------------------------------------------------------------------

    def _run_twice(self, module: AutoTorchModule, forward: Forward, args: Any, kwargs: Any) -> Any:
        if getattr(self._local, "is_comparing", False):  # a twin calls a layer around it
            return forward(*args, **kwargs)
        layer = module._owner()
        twin = Twin(module, self._model)
        inputs, random = _apart((args, kwargs)), _RandomState(layer.policy.computation.device)
        output = forward(*args, **kwargs)
        lease = layer.budget.borrow(layer, twin.nbytes, limit=layer.limit)
        self._local.is_comparing = True
        try:
            with random.again():
                plain = twin(*inputs[0], **inputs[1])
        except Exception as error:
            raise OffloadLayersError(f'layer "{layer.name}" runs managed, but not plain: {error}') from error
        finally:
            self._local.is_comparing = False
            del twin  # with it the weights go
            lease.give_back()
        self._compare(layer, output, plain)
        return output

    def _compare(self, layer: Residency, output: Any, plain: Any) -> None:
        ours, plains = pytree.tree_leaves(output), pytree.tree_leaves(plain)
        pairs = [(a, b) for a, b in zip(ours, plains, strict=False) if isinstance(a, Tensor)]
        if pairs:
            self.checked.add(layer)
        for a, b in pairs:
            self._note(layer.name, a, b)
        if [isinstance(a, Tensor) for a in ours] != [isinstance(b, Tensor) for b in plains]:
            self.checked.add(layer)
            self.differences[layer.name] = Difference(layer.name, math.inf, ())

    def _note(self, name: str, ours: Tensor, plain: Any) -> None:
        if isinstance(plain, Tensor) and same_bits(ours, plain):
            return
        found = Difference(name, difference_of(ours, plain), tuple(ours.shape))
        before = self.differences.get(name)
        if before is None or before.max_abs < found.max_abs:
            self.differences[name] = found

    # -- layers that are only looked at -------------------------------------------------------------

    def _look_at_resident(self, layer: Residency, forward: Forward, args: Any, kwargs: Any) -> Any:
        if layer.resident:
            self._look_at(layer)
        return forward(*args, **kwargs)

    @contextmanager
    def _looking_at(self, layer: Residency) -> Iterator[None]:
        """Look at the weights of *layer* each time that they are brought."""
        entering = layer.enter

        def enter(work: float = 0.0, calls: bool = True) -> None:
            entering(work, calls)
            self._look_at(layer)

        layer.__dict__["enter"] = enter  # costs nothing outside of this block
        try:
            yield
        finally:
            del layer.__dict__["enter"]

    def _look_at(self, layer: Residency) -> None:
        for weight in layer.weights:
            brought = weight.exposed if weight.staged is None else weight.staged
            if brought is not None:
                self._note(weight.name, brought.detach(), due_values(layer, weight))
                self.checked.add(layer)


class _RandomState:
    """Where the random numbers of the host and of *device* are now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._own = None if self._module is None else self._module.get_rng_state(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers in the block, and go on afterwards as if there had been none."""
        host = torch.get_rng_state()
        own = None if self._module is None else self._module.get_rng_state(self._device)
        torch.set_rng_state(self._host)
        if self._module is not None:
            self._module.set_rng_state(self._own, self._device)
        try:
            yield
        finally:
            torch.set_rng_state(host)
            if self._module is not None:
                self._module.set_rng_state(own, self._device)


def _apart(inputs: Any) -> Any:
    """Return *inputs* with copies of all tensors, since a forward may change them in place.

    What is one tensor stays one: attention looks whether its inputs are.
    """
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    return pytree.tree_map_only(Tensor, copied, inputs)
