"""What an accelerator is told about its streams, with a fake of torch's module for it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from offload_layers import _device
from offload_layers._device import Accelerator, InUse


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


def test_the_host_waits_for_all_streams(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator.synchronize()
    assert FakeModule.synchronized == 1
    monkeypatch.setattr(FakeModule, "is_initialized", lambda: False, raising=False)
    accelerator.synchronize()  # not even started
    assert FakeModule.synchronized == 1


class FakeMemoryModule(FakeModule):
    """As ``torch.cuda``: torch holds 300 of 1,000 bytes and uses 200 of them, others have taken 50."""

    asked = 0
    available, ever = True, 0

    @classmethod
    def is_available(cls) -> bool:
        return cls.available

    @classmethod
    def mem_get_info(cls, device: torch.device) -> tuple[int, int]:
        cls.asked += 1
        return 1000 - 300 - 50, 1000

    @staticmethod
    def memory_allocated(device: torch.device) -> int:
        return 200

    @staticmethod
    def max_memory_allocated(device: torch.device) -> int:
        return 250

    @staticmethod
    def memory_reserved(device: torch.device) -> int:
        return 300

    @staticmethod
    def empty_cache() -> None:
        pass


class NestedMemoryModule(FakeMemoryModule):
    """One that tells everything at once, as ``torch.cuda`` and ``torch.xpu`` do."""

    is_used, ever = True, 900

    @classmethod
    def memory_stats_as_nested_dict(cls, device: torch.device) -> dict[str, Any]:
        if not cls.is_used:
            return {}
        return {
            "allocated_bytes": {"all": {"current": 200, "peak": 250, "allocated": cls.ever}},
            "reserved_bytes": {"all": {"current": 300, "peak": 300}},
        }

    memory_allocated = max_memory_allocated = memory_reserved = None  # type: ignore[assignment]


@pytest.mark.parametrize("module", [FakeMemoryModule, NestedMemoryModule])
def test_what_is_in_use(module: Any, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_module", module)
    monkeypatch.setattr(module, "asked", 0)
    now = 0.0
    monkeypatch.setattr(_device.time, "monotonic", lambda: now)
    for now in (100.0, 100.0 + _device._DRIVER_S / 2):  # noqa: B007 - monotonic reads it
        assert accelerator.in_use() == InUse(200, 250, module.ever, 50)
        assert module.asked == 1
    accelerator.release_cached()
    assert accelerator.in_use() == InUse(200, 250, module.ever, 50)
    assert module.asked == 2
    now += _device._DRIVER_S
    accelerator.in_use()
    assert module.asked == 3


def test_a_device_that_was_not_used_yet(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_module", NestedMemoryModule)
    monkeypatch.setattr(NestedMemoryModule, "is_used", False)
    assert accelerator.in_use() == InUse(0, 0, 0, 350)


def test_a_device_that_does_not_tell(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeModule, "is_available", lambda: True, raising=False)
    assert accelerator.in_use() is None
    monkeypatch.setattr(accelerator, "_module", FakeMemoryModule)
    monkeypatch.setattr(FakeMemoryModule, "available", False)
    assert accelerator.in_use() is None


def test_a_driver_that_cannot_tell(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("The device doesn't support querying the available free memory.")

    monkeypatch.setattr(accelerator, "_module", FakeMemoryModule)
    monkeypatch.setattr(FakeMemoryModule, "mem_get_info", fail)
    assert accelerator.in_use() is None
