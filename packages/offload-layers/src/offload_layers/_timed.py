"""How long operations of torch take on this device, each tried out on tensors like those that it gets."""

import itertools
import logging
import math
import statistics
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from offload_layers._fp8 import FP8
from offload_layers._probe import waiting
from offload_layers._trace import Operation, Shaped

_log = logging.getLogger("offload_layers.probe")

_ROUNDS = 3  # so that the median leaves out one that was disturbed
_ROUND_S = 0.002  # at least: long beside the clock's resolution
_ONCE_S = 0.25  # what takes longer is tried only once more
#: weights of different layers take turns in so much memory, which is several times the caches of most
#: processors: a model's layers find nothing in the caches either
_WEIGHTS_BYTES = 256 << 20
_MOST_TURNS = 64  # more would take longer to prepare than to measure


def seconds_of(operations: Iterable[Operation], device: torch.device) -> dict[Operation, float]:
    """Return the seconds that each operation takes.

    One that cannot be tried by itself counts as 0, and a warning is logged.
    """
    memory = _Memory(device)
    found: dict[Operation, float] = {}
    with torch.no_grad(), _own_random_numbers(device):
        for operation in operations:
            try:
                found[operation] = _seconds(operation, memory, device)
            except Exception as error:  # whatever torch's functions raise
                _log.warning("%s was not measured, and counts nothing: %s", operation.function, error)
                found[operation] = 0.0
    return found


def _own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Let the program's own sequences of random numbers go on afterwards as if nothing had been drawn."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def _seconds(operation: Operation, memory: "_Memory", device: torch.device) -> float:
    calls = itertools.cycle(memory.calls(operation))
    wait = waiting(device)

    def timed(times: int) -> float:
        wait()
        begin = time.perf_counter()
        for arguments, keywords in itertools.islice(calls, times):
            operation.function(*arguments, **keywords)
        wait()
        return time.perf_counter() - begin

    timed(1)  # the first call of a function prepares it
    once = timed(1)
    if once > _ONCE_S:
        return min(once, timed(1))  # or something else had the processor
    times = max(1, math.ceil(_ROUND_S / max(once, 1e-7)))
    return statistics.median(timed(times) for _ in range(_ROUNDS)) / times


class _Memory:
    """Tensors to try operations on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._weights: dict[torch.dtype, Tensor] = {}

    def calls(self, operation: Operation) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return arguments for *operation*, as often as there are weights that it can have in turn."""
        fixed: dict[int, Tensor] = {}
        values = (operation.arguments, dict(operation.keywords))
        nbytes = sum(_numel(s) * s.dtype.itemsize for s in tree_leaves(values) if _is_weight(s))
        turns = max(1, min(_MOST_TURNS, _WEIGHTS_BYTES // nbytes)) if nbytes else 1

        def tensor(value: Any, turn: int) -> Any:
            if isinstance(value, torch.Generator):
                return torch.Generator(value.device)
            if not isinstance(value, Shaped):
                return value
            if value.is_weight:
                return self._weight(value, turn)
            if id(value) not in fixed:
                fixed[id(value)] = self._new(_numel(value), value.dtype).as_strided(value.shape, value.stride)
            return fixed[id(value)]

        return [tree_map(lambda value, turn=turn: tensor(value, turn), values) for turn in range(turns)]

    def _weight(self, like: Shaped, turn: int) -> Tensor:
        numel = _numel(like)
        memory = self._weights.get(like.dtype)
        if memory is None or len(memory) < numel:
            memory = self._new(max(numel, _WEIGHTS_BYTES // like.dtype.itemsize), like.dtype)
            self._weights[like.dtype] = memory
        return memory.as_strided(like.shape, like.stride, turn * numel % (len(memory) - numel + 1))

    def _new(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return numbers that are not all alike: zeros are multiplied with less power, at a higher clock."""
        if dtype in FP8:
            return self._new(numel, torch.bfloat16).to(dtype)
        memory = torch.empty(numel, dtype=dtype, device=self._device)
        if dtype.is_complex:
            return memory.normal_(generator=self._generator)
        if dtype.is_floating_point:
            return memory.uniform_(-1, 1, generator=self._generator)
        return memory.fill_(dtype is torch.bool)  # indices of something that is there, masks of everything


def _is_weight(value: object) -> bool:
    return isinstance(value, Shaped) and value.is_weight


def _numel(like: Shaped) -> int:
    """Return the elements of memory that a tensor of this shape and these strides spans."""
    if 0 in like.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride, strict=True))
