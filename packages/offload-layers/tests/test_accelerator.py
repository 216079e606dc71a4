"""What an accelerator is told about its streams, with a fake of torch's module for it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from offload_layers._device import Accelerator


class Stream:
    def __init__(self, device: torch.device) -> None:
        time.sleep(0.01)  # so that threads meet here
        self.waited_for: list[Any] = []
        FakeModule.made.append(self)

    def wait_event(self, event: "Event") -> None:
        self.waited_for.append(event)


class Event:
    recorded_in: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_in = stream


class FakeModule:
    """As ``torch.cuda``, of which an `Accelerator` uses this much."""

    made: list[Stream]
    current: threading.local
    Stream, Event = Stream, Event
    synchronized: int

    @classmethod
    def current_stream(cls, device: torch.device) -> Stream:
        if not hasattr(cls.current, "stream"):
            cls.current.stream = Stream(device)
        stream: Stream = cls.current.stream
        return stream

    @classmethod
    @contextmanager
    def stream(cls, stream: Stream) -> Iterator[None]:
        before = cls.current_stream(torch.device("cpu"))
        cls.current.stream = stream
        try:
            yield
        finally:
            cls.current.stream = before

    @classmethod
    def synchronize(cls, device: torch.device) -> None:
        cls.synchronized += 1


class Recorded:
    """A tensor that tells which streams were recorded."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.streams.append(stream)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    FakeModule.made, FakeModule.current, FakeModule.synchronized = [], threading.local(), 0
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeModule)
    return Accelerator(torch.device("cpu"))


def test_threads_share_one_copying_stream(accelerator: Accelerator) -> None:
    found: list[Stream] = []
    together = threading.Barrier(4)

    def copy() -> None:
        together.wait(10)
        with accelerator.aside():
            found.append(FakeModule.current_stream(torch.device("cpu")))

    threads = [threading.Thread(target=copy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_who_waits_for_whom(accelerator: Accelerator) -> None:
    computing = FakeModule.current_stream(torch.device("cpu"))
    with accelerator.aside():
        copying = FakeModule.current_stream(torch.device("cpu"))
        ready = accelerator.mark()
    assert copying is not computing
    assert ready.recorded_in is copying
    accelerator.wait(ready)
    assert computing.waited_for == [ready]
    accelerator.wait(None)
    assert computing.waited_for == [ready]
    accelerator.finished()
    (event,) = copying.waited_for
    assert event.recorded_in is computing


def test_memory_is_kept_for_the_stream_that_computes(accelerator: Accelerator) -> None:
    tensor: Any = Recorded()
    accelerator.record_use(tensor)
    assert tensor.streams == [FakeModule.current_stream(torch.device("cpu"))]


def test_the_first_copy_aside_waits_for_the_computation(accelerator: Accelerator) -> None:
    accelerator.finished()
    with accelerator.aside():
        (event,) = FakeModule.current_stream(torch.device("cpu")).waited_for
    assert event.recorded_in is FakeModule.current_stream(torch.device("cpu"))


@pytest.mark.parametrize("tells_all", [True, False])
def test_what_torch_keeps_for_reuse_is_not_in_use(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, tells_all: bool
) -> None:
    told: dict[str, Any] = {
        "is_available": lambda: True,
        "mem_get_info": lambda device: (600, 1000),
        "memory_stats_as_nested_dict": lambda device: {
            "allocated_bytes": {"all": {"current": 30, "peak": 70}},
            "reserved_bytes": {"all": {"current": 100, "peak": 200}},
        },
    }
    if not tells_all:  # as before the device is used, and as some vendors do
        told |= {
            "memory_stats_as_nested_dict": lambda device: {},
            "memory_allocated": lambda device: 30,
            "max_memory_allocated": lambda device: 70,
            "memory_reserved": lambda device: 100,
        }
    for name, function in told.items():
        monkeypatch.setattr(FakeModule, name, function, raising=False)
    assert accelerator.in_use() == 400 - 70
    assert accelerator.peak_in_use() == 400 - 70 + 40


def test_the_host_waits_for_all_streams(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator.synchronize()
    assert FakeModule.synchronized == 1
    monkeypatch.setattr(FakeModule, "is_initialized", lambda: False, raising=False)
    accelerator.synchronize()  # not even started
    assert FakeModule.synchronized == 1
