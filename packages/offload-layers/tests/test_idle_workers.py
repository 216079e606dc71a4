"""Torch's idle workers give up their cores while layers are read, and only then."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, _fetching, _idle_workers, enable_vram_management
from offload_layers.testing import CountingSource, FakeDevice
from torch import Tensor, nn

NAME = "offload-layers-idle-workers"
DISK: dict[str, Any] = {
    **{
        f"{role}_{what}": "disk"
        for role in ("offload", "onload", "preparing")
        for what in ("dtype", "device")
    },
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}


def holders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def on_two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_idle_workers, "_team_size", lambda: 2)
    monkeypatch.setattr(_idle_workers, "HELD_S", 0.05)
    yield
    wait_until(lambda: not holders())


MEASURE = """
import os, time, torch
from offload_layers._idle_workers import let_idle_workers_sleep

torch.set_num_threads(max(2, len(os.sched_getaffinity(0))))
x = torch.zeros(1 << 20)

def of_others():
    begin = time.process_time() - time.thread_time()
    for _ in range(20):
        x.add_(1)
        time.sleep(0.005)
    return time.process_time() - time.thread_time() - begin

of_others()
before = of_others()
let_idle_workers_sleep()
time.sleep(0.2)
print(before, of_others())
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="other systems have another OpenMP")
def test_workers_that_wait_take_no_core_while_layers_are_read() -> None:
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True
    )
    before, after = map(float, run.stdout.split())
    if before < 0.02:
        pytest.skip(f"this torch's workers do not spin: {before} s of 0.1")
    assert after < before / 2


@pytest.mark.parametrize(
    ("cores", "computing", "size"),
    [(2, 2, 2), (16, 16, 2), (8, 5, 5), (16, 8, 0), (2, 1, 0), (4, 8, 0)],
)
def test_a_team_is_as_small_as_makes_more_threads_than_cores(
    cores: int, computing: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: computing)
    assert _idle_workers._team_size() == size


@pytest.mark.usefixtures("on_two_cores")
def test_the_team_goes_when_nothing_is_read_and_comes_again() -> None:
    for _ in range(2):
        for _ in range(3):
            _idle_workers.let_idle_workers_sleep()
        assert len(holders()) == 1
        wait_until(lambda: not holders())


def test_an_interpreter_that_ends_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(_idle_workers, "_team_size", lambda: 2)
    monkeypatch.setattr(threading.Thread, "start", fail)
    _idle_workers.let_idle_workers_sleep()
    assert _idle_workers._holder is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.usefixtures("on_two_cores")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_none() -> None:
    _idle_workers.let_idle_workers_sleep()
    child = os.fork()
    if child == 0:
        os._exit(_idle_workers._holder is not None)
    assert os.waitpid(child, 0)[1] == 0


class InThreads(CountingSource):
    """A source that reads on several threads."""

    def with_threads(self, threads: int) -> "InThreads":
        return InThreads(dict(self))


class TestWhen:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[None]:
        calls: list[None] = []
        monkeypatch.setattr(_fetching, "let_idle_workers_sleep", lambda: calls.append(None))
        return calls

    @staticmethod
    def run(source: Callable[[dict[str, Tensor]], Any], features: int = 1024) -> None:
        model = nn.Sequential(nn.Linear(features, features), nn.Linear(features, features))
        managed = enable_vram_management(
            model, {nn.Linear: AutoWrappedLinear}, DISK, None, source(model.state_dict())
        )
        managed(torch.ones(1, features))

    def test_large_layers_are_read_between_computations(self, calls: list[None]) -> None:
        self.run(InThreads)
        assert len(calls) == 2

    def test_small_ones_are_read_before_a_thread_wakes_up(self, calls: list[None]) -> None:
        self.run(InThreads, features=64)
        assert calls == []

    def test_one_thread_needs_one_core(self, calls: list[None]) -> None:
        self.run(CountingSource)
        assert calls == []

    def test_views_are_not_read(self, calls: list[None]) -> None:
        class Mapped(InThreads):
            def renew(self, names: list[str]) -> bool:
                return True

        self.run(Mapped)
        assert calls == []

    def test_an_accelerator_does_not_compute_on_cores(self, calls: list[None]) -> None:
        with FakeDevice().installed():
            self.run(InThreads)
        assert calls == []
