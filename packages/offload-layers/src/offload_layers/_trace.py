"""What one forward consists of, found without weights and without computing.

A copy of the model whose tensors have shapes but no values is run once, and each operation of torch is taken
down: which it is, on what kinds of tensors, and which layer was called last before it. The model itself, its
buffers, what it caches and its inputs are not touched.
"""

import copy
import functools
import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload_layers._errors import ConfigError
from offload_layers._source import Source, stored_dtype

_log = logging.getLogger("offload_layers.trace")
_log_of_torch = logging.getLogger("torch._subclasses.fake_tensor")

#: positional arguments, or keyword arguments, of a model
Inputs = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Shaped:
    """A tensor without values.

    Attributes:
        shape, stride, dtype: As of a tensor.
        is_weight: Whether it is a parameter, which each layer has another of.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_weight: bool


@dataclass(frozen=True)
class Operation:
    """A call of a function of torch; in its arguments tensors are `Shaped`, and lists are tuples."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Trace:
    """What one forward consists of.

    Attributes:
        calls: How often each operation is called, by the layer that was called last before it; by ``""``
            before any was.
        activations_nbytes: Most bytes that tensors made in the forward take at once, its inputs included.
    """

    calls: Counter[tuple[str, Operation]]
    activations_nbytes: int


def trace(
    model: nn.Module,
    inputs: Inputs,
    *,
    layers: Sequence[str],
    device: torch.device,
    dtype: torch.dtype | None,
    source: Source | None,
) -> Trace:
    """Return what a forward of *model* on *inputs* consists of.

    Args:
        model: Its parameters may be on ``meta``.
        inputs: Of its forward: a mapping of keyword arguments, or a sequence of positional ones. Of tensors
            only shape and dtype matter; they may be on ``meta``.
        layers: Names of the modules that count as layers.
        device: Where it would compute.
        dtype: In which it would compute; None: in that of its weights.
        source: Where weights come from, if not from the model.

    Raises:
        ConfigError: the forward fails, or depends on the values of tensors.
    """
    given = _split(inputs)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fakes:
            memo = _stand_ins(model, device, dtype, source)
            taken = _Taken([x for x in memo.values() if isinstance(x, nn.Parameter)])
            for x in tree_leaves(given):
                if isinstance(x, Tensor):
                    memo[id(x)] = _like(x, device, x.dtype)
                elif isinstance(x, torch.Generator):
                    memo[id(x)] = x  # nothing is drawn
        _run_twin(model, given, memo, layers, fakes, taken)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{type(model).__name__} does not run on tensors without values ({type(error).__name__}: "
            f"{reason}). Check that inputs are those of its forward, or pass rows instead: a forward that "
            "depends on the values of tensors cannot be foreseen."
        ) from error
    finally:
        _empty_caches(fakes)
    memo.clear()
    if taken.count_left():
        gc.collect()  # what refers to itself
    if left := taken.count_left():
        _log.warning(
            "%s keeps %s of its forward in a place that is not its own, as a hook does, or a cache beside "
            "its class. They have no values: empty that place before the model runs.",
            type(model).__name__,
            "1 tensor" if left == 1 else f"{left:,} tensors",
        )
    return Trace(taken.calls, taken.peak)


def _run_twin(
    model: nn.Module,
    inputs: tuple[list[Any], dict[str, Any]],
    memo: dict[int, Any],
    layers: Sequence[str],
    fakes: FakeTensorMode,
    taken: "_Taken",
) -> None:
    """Run a copy of *model* on copies of *inputs*, with the tensors that *memo* has for theirs."""
    twin = copy.deepcopy(model, memo)
    with FakeCopyMode(fakes):
        args, kwargs = copy.deepcopy(inputs, memo)
    taken.note((args, kwargs))
    for name in layers:
        twin.get_submodule(name).register_forward_pre_hook(taken.entered(name))
    with torch.no_grad(), _quiet(), fakes, taken:
        twin(*args, **kwargs)


def _split(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return [], dict(inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return list(inputs), {}
    raise ConfigError(
        f"inputs must be a mapping of keyword arguments or a sequence of positional ones; got "
        f"{type(inputs).__name__}"
    )


def _like(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if tensor.layout is not torch.strided:
        raise ConfigError(f"a tensor of layout {tensor.layout} cannot be foreseen")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)


def _empty_caches(fakes: FakeTensorMode) -> None:
    """Empty the caches of functions that have kept tensors without values, for these are the model's too."""
    for cache in gc.get_objects():
        if type(cache) is functools._lru_cache_wrapper:
            kept = tree_leaves(gc.get_referents(cache))
            if any(isinstance(x, FakeTensor) and x.fake_mode is fakes for x in kept):
                cache.cache_clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch logs about an operation that fails: there will be an error that says it."""

    def keep(record: logging.LogRecord) -> bool:
        return False

    _log_of_torch.addFilter(keep)
    try:
        yield
    finally:
        _log_of_torch.removeFilter(keep)


def _stand_ins(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None, source: Source | None
) -> dict[int, Any]:
    """Return tensors without values for the parameters and buffers, by the identity of these."""
    found: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        stored = parameter.dtype
        if source is not None and name in source:
            stored = stored_dtype(source, name, stored)
        computed = dtype if dtype is not None and stored.is_floating_point else stored
        found[id(parameter)] = nn.Parameter(_like(parameter, device, computed), requires_grad=False)
    for buffer in model.buffers():
        found[id(buffer)] = _like(buffer, device, buffer.dtype)
    return found


class _Taken(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down what is called."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = ""
        self.calls: Counter[tuple[str, Operation]] = Counter()
        self.peak = self._nbytes = 0
        self._weights = {weight.untyped_storage() for weight in weights}
        self._alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(self._weights)

    def entered(self, layer: str) -> Callable[..., None]:
        """Return the hook that is called before *layer*."""

        def hook(*_: object) -> None:
            self.layer = layer

        return hook

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.prim.device.default:
            arguments = tuple(map(self._shaped, args))
            keywords = tuple((name, self._shaped(value)) for name, value in (kwargs or {}).items())
            self.calls[self.layer, Operation(function, arguments, keywords)] += 1
            self.note(result)
        return result

    def _shaped(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            is_weight = value.untyped_storage() in self._weights
            return Shaped(tuple(value.shape), value.stride(), value.dtype, is_weight)
        return tuple(map(self._shaped, value)) if isinstance(value, (list, tuple)) else value

    def note(self, values: object) -> None:
        """Count the bytes of tensors that are new, for as long as they are there."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._alive:
                self._alive.add(storage)
                self._nbytes += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self._nbytes)

    def count_left(self) -> int:
        """Return how many of the tensors counted are still there."""
        return sum(storage not in self._weights for storage in self._alive)

    def _forget(self, nbytes: int) -> None:
        self._nbytes -= nbytes
