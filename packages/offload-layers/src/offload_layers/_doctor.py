"""The command ``offload-layers doctor``: how fast this machine is, and what it lacks for full speed."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch

from offload_layers._advice import Advice, advice
from offload_layers._device import default_device
from offload_layers._facts import Facts, gather
from offload_layers._sizes import format_size


def doctor(device: torch.device | None = None, *, file: str | None = None, is_json: bool = False) -> str:
    """Measure for about a second, and return the findings.

    Args:
        device: Where models are to compute; None: the first accelerator, or the CPU if there is none.
        file: A checkpoint, to measure the disk it is on.
        is_json: Return one JSON object, with sizes in bytes, instead of text for people.

    Raises:
        ConfigError: the device is not there, or the file cannot be read.
    """
    facts = gather(device or default_device(), file=file)
    missing = advice(facts)
    return json.dumps(as_json(facts, missing), indent=2) if is_json else "\n".join(as_text(facts, missing))


def as_json(facts: Facts, missing: list[Advice]) -> dict[str, Any]:
    """Return everything as plain values, under the names of the fields of `Facts`."""
    return {**dataclasses.asdict(facts), "missing": [dataclasses.asdict(entry) for entry in missing]}


def as_text(facts: Facts, missing: list[Advice]) -> Iterator[str]:
    """Yield lines for people."""
    for name, value in _rows(facts):
        yield f"{name:<13} {value}"
    yield ""
    if not missing:
        yield "Nothing is missing for full speed."
        return
    yield "Missing for full speed:"
    for entry in missing:
        yield f"- {entry.problem}."
        yield f"  {entry.remedy[0].upper()}{entry.remedy[1:]}."


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "device", f"{facts.device}, {facts.device_name}"
    if facts.driver is not None:
        yield "driver", facts.driver
    yield "torch", facts.torch
    if facts.device_total_bytes is not None and facts.device_free_bytes is not None:
        yield "device memory", _of(facts.device_free_bytes, facts.device_total_bytes)
    yield "host memory", _of(facts.host_free_bytes, facts.host_total_bytes)
    yield "container", "no limit" if facts.container_bytes is None else format_size(facts.container_bytes)
    quota = "" if facts.core_quota is None else f", time for {facts.core_quota:g}"
    yield "cores", f"{facts.cores}{quota}; torch computes with {facts.threads} threads"
    locked = (
        "no limit" if facts.locked_limit_bytes is None else f"limit {format_size(facts.locked_limit_bytes)}"
    )
    pinning = {None: "not needed", "": "works"}.get(facts.why_not_pinned, "refused")
    yield "page-locked", f"{pinning} ({locked})"
    yield "huge pages", facts.huge_pages or "unknown"
    yield "eight bits", "no matrix products" if facts.why_no_fp8 else "matrix products"
    yield "disk", _disk(facts)
    if facts.device != "cpu":
        link = facts.link
        lanes = "" if link is None else f" ({link.lanes} lanes at {link.gigatransfers_per_s:g} GT/s)"
        yield "bus", f"{_rate(facts.bus_bytes_per_s)}{lanes}"
    yield "memory", _rate(facts.memory_bytes_per_s)
    yield "computing", f"{facts.flops / 1e12:.3g} TFLOP/s in bfloat16"


def _disk(facts: Facts) -> str:
    if facts.disk_bytes_per_s is None:
        return "not measured; name a file on it with --file"
    return _rate(facts.disk_bytes_per_s) + (" (the page cache, which stays)" if facts.is_disk_cached else "")


def _of(free: int, total: int | None) -> str:
    return f"{format_size(free)} free" + ("" if total is None else f" of {format_size(total)}")


def _rate(bytes_per_s: float) -> str:
    return f"{format_size(int(bytes_per_s))}/s"
