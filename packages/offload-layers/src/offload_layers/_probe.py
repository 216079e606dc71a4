"""How fast this machine moves and computes, found out by trying, in about a second.

Each figure is the median of several rounds after one that does not count. What is measured is what a model
does: a matrix product as wide as a transformer's layer, with many rows; a pass over more of the device's
memory than caches hold; a copy to the device from page-locked memory; and reading pieces of a checkpoint.
"""

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers import _fp8_matmul
from offload_layers._device import device_of
from offload_layers._errors import ConfigError
from offload_layers._fp8 import FP8
from offload_layers._machine import check_is_there
from offload_layers._pinned import release_kept
from offload_layers._probe_disk import probe_disk
from offload_layers._rates import Rates

_log = logging.getLogger("offload_layers.probe")

_ROUNDS = 3  # at least, so that the median leaves out one that was disturbed
_WIDTH = 3072  # of a layer, as in Flux and Qwen-Image
_FEWEST_ROWS, _MOST_ROWS = 64, 8192
_ROUND_S = (
    0.02  # at least: long beside the time in which a device is told to begin, and tells that it is done
)
_MEMORY_BYTES = 256 << 20  # several times the caches of most processors
_BUS_BYTES = 64 << 20


def probe(
    device: torch.device,
    *,
    file: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rows: int | None = None,
    seconds: float = 1.0,
) -> Rates:
    """Measure; the first use of a device, when torch wakes it, comes on top of *seconds*.

    Args:
        device: Where the model is to compute.
        file: A checkpoint: pieces of it are dropped from the page cache and read again. If the system does
            not drop them, because they were just written, say, or others have them mapped, the figure is that
            of the page cache, and a warning is logged.
        dtype: What matrices are multiplied in; for eight-bit floats as `AutoWrappedLinear` does it.
        rows: Of the input of the matrix product, such as tokens times batch, since few rows are computed at
            another rate than many; None: as many as keep the device busy.
        seconds: About how long all measurements together may take; each is made at least three times.

    Raises:
        ConfigError: the device is not there or cannot multiply *dtype*, or *file* cannot be read.
    """
    check_is_there(device)
    share = seconds / (3 if file is None else 4)
    disk, busy = math.inf, 0.0
    if file is not None:
        disk, is_cached, busy = probe_disk(file, seconds=share)
        if is_cached:
            _log.warning("%s stays in the page cache; its disk was not measured, but the cache", file)
    try:
        with torch.no_grad():
            memory = _memory(device, share)
            bus = memory if device.type in ("cpu", "mps") else _bus(device, share)
            return Rates(disk, bus, memory, _flops(device, dtype, rows, share), busy)
    finally:
        release_trials(device)


def release_trials(device: torch.device) -> None:
    """Give back the memory in which something was tried, which torch keeps for whoever wants as much."""
    device_of(device).release_cached()
    if device.type != "cpu":
        release_kept()


def _memory(device: torch.device, seconds: float) -> float:
    numbers = torch.ones(_MEMORY_BYTES // 4, device=device)  # written: or it would be one page of zeros
    return _rate(_MEMORY_BYTES, numbers.amax, device, seconds)


def _bus(device: torch.device, seconds: float) -> float:
    host = torch.ones(_BUS_BYTES, dtype=torch.uint8)
    there = torch.empty_like(host, device=device)
    try:
        host = host.pin_memory()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        _log.warning("no page-locked memory (%s); copies to %s are measured without", reason, device)
    return _rate(_BUS_BYTES, lambda: there.copy_(host, non_blocking=True), device, seconds)


def _flops(device: torch.device, dtype: torch.dtype, rows: int | None, seconds: float) -> float:
    multiply, wait = _multiplication(dtype), waiting(device)
    most = _MOST_ROWS if rows is None else max(1, min(rows, _MOST_ROWS))
    x, weight = _matrix(min(_FEWEST_ROWS, most), device), _matrix(_WIDTH, device).to(dtype)
    # several, that a model's layers find nothing in the caches either
    copies = range(math.ceil(_MEMORY_BYTES / weight.numel() / weight.element_size()))
    weights = itertools.cycle([weight, *(weight.clone() for _ in copies[1:])])
    x = x.to(torch.bfloat16 if dtype in FP8 else dtype)

    def product() -> Tensor:
        return multiply(x, next(weights), None)

    try:
        product()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{device} cannot multiply matrices of {dtype}: {reason}") from error
    while len(x) < most and _seconds(product, wait) < _ROUND_S:  # more rows would not be faster
        x = torch.cat([x, x])[:most]
    return _rate(2.0 * len(x) * _WIDTH * _WIDTH, product, device, seconds)


def _multiplication(dtype: torch.dtype) -> Callable[[Tensor, Tensor, None], Tensor]:
    return _fp8_matmul.linear if dtype in FP8 else nn.functional.linear


def _matrix(rows: int, device: torch.device) -> Tensor:
    """Return varied numbers: zeros would be multiplied with less power, and so at a higher clock."""
    own = torch.Generator(device).manual_seed(
        0
    )  # the program's own sequence of random numbers stays as it is
    return torch.empty(rows, _WIDTH, device=device).uniform_(-1, 1, generator=own)


def waiting(device: torch.device) -> Callable[[], object]:
    """Return what waits until *device* has done what it was told."""
    if device.type == "cpu":
        return lambda: None
    module: Any = torch.get_device_module(device)
    return module.synchronize if device.type == "mps" else lambda: module.synchronize(device)


def _rate(amount: float, act: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return how much of *amount*, which ``act()`` deals with, *device* does in a second."""
    wait = waiting(device)
    _seconds(act, wait)
    times = max(1, math.ceil(_ROUND_S / max(_seconds(act, wait), 1e-6)))
    end = time.perf_counter() + seconds
    rounds: list[float] = []
    while len(rounds) < _ROUNDS or time.perf_counter() < end:
        rounds.append(_seconds(act, wait, times))
    return amount * times / statistics.median(rounds)


def _seconds(act: Callable[[], object], wait: Callable[[], object], times: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        act()
    wait()
    return time.perf_counter() - begin
