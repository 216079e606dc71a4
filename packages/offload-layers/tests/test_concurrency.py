"""Threads, nested calls, generators and the end of the interpreter."""

import copy
import functools
import gc
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, AutoWrappedModule, State, enable_vram_management
from offload_layers._budget import Budget
from offload_layers._device import HostDevice, replaced
from offload_layers._placement import GIB, Placement
from offload_layers._schedule import Schedule
from offload_layers._transfer import convert
from offload_layers.testing import CountingSource, FakeDevice, assert_invariants, residencies, with_own_budget
from torch import Tensor, nn

WIDTH = 8
RESTING = ("offload", "onload", "preparing")
DISK: dict[str, Any] = {
    **{f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")},
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}
PREPARING: dict[str, Any] = DISK | {"preparing_dtype": torch.float32, "preparing_device": "cpu"}
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def lent(model: nn.Module) -> int:
    return sum(residency.leased_nbytes for residency in residencies(model))


class Nested(nn.Module):
    """Calls itself, and fails at some depth if told so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.fails_at: int | None = None

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        if depth == self.fails_at:
            raise RuntimeError(f"at depth {depth}")
        return self(x * self.weight, depth - 1) + self.weight if depth else x  # type: ignore[no-any-return]


def test_a_layer_that_calls_itself() -> None:
    plain = Nested()
    source = CountingSource(plain.state_dict())
    layer: Any = AutoWrappedModule(Nested(), **DISK, disk_map=source)
    assert torch.equal(layer(X), plain(X))
    assert source.reads == ["weight"]
    layer.fails_at = 1
    with pytest.raises(RuntimeError, match="at depth 1"):
        layer(X)
    layer.fails_at = None
    assert lent(layer) == 0
    assert torch.equal(layer(X), plain(X))
    assert_invariants(layer)


class Generating(nn.Module):
    """Its forward returns before it has computed anything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(3):
            x = self.inner(x) * self.weight
            yield x


def test_a_generator_reads_real_weights_after_its_layer_has_returned() -> None:
    torch.manual_seed(0)
    plain = Generating()
    model = enable_vram_management(
        nn.Sequential(plain), {Generating: AutoWrappedModule}, DISK, None, {
            f"0.{name}": tensor.clone() for name, tensor in plain.state_dict().items()
        }
    )  # fmt: skip
    torch.manual_seed(0)
    expected = list(Generating()(X))
    assert all(torch.equal(a, b) for a, b in zip(model[0](X), expected, strict=True))
    half = model[0](X)
    next(half)
    model[0].offload()  # in the middle
    assert torch.equal(next(half), expected[1])
    half.close()
    model[0].offload()
    assert_invariants(model)


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))


def in_threads(*runs: Callable[[], None]) -> list[Exception]:
    """Run all at once, and return what was raised."""
    raised: list[Exception] = []

    def without_gradients(run: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                run()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=without_gradients, args=(run,), daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


@pytest.mark.parametrize("limit", [None, 0, 1e-6])
def test_many_threads_in_one_model(limit: float | None) -> None:
    model = enable_vram_management(
        stack(), {nn.Linear: AutoWrappedLinear}, DISK, limit, CountingSource(stack().state_dict())
    )
    expected = stack()(X)

    def run() -> None:
        for _ in range(20):
            assert torch.equal(model(X), expected)

    assert in_threads(*[run] * 4) == []
    model[0].offload()
    assert_invariants(model)


@pytest.mark.parametrize("config", [DISK, PREPARING], ids=["ahead", "residents"])
def test_models_in_threads_make_room_for_each_other(config: dict[str, Any]) -> None:
    room, expected = 8 * (WIDTH * WIDTH + WIDTH) * 4, stack()(X)

    def run(model: Any, pauses: random.Random) -> None:
        for _ in range(60):
            assert torch.equal(model(X), expected)
            time.sleep(pauses.choice([0, 0, 0, 0.01]))
        for layer in model:
            layer.offload()
        assert_invariants(model)

    models = []
    for _ in range(3):
        source = CountingSource(stack().state_dict())
        models.append(
            enable_vram_management(stack(), {nn.Linear: AutoWrappedLinear}, config, room / GIB, source)
        )
    budget = with_own_budget(*models)
    runs = [functools.partial(run, model, random.Random(seed)) for seed, model in enumerate(models)]
    assert in_threads(*runs) == []
    gc.collect()
    assert budget.statistics().lent_nbytes == 0


class SlowToReadAhead(CountingSource):
    """Takes its time on the reader's thread, and none on others."""

    def __getitem__(self, name: str) -> Tensor:
        if threading.current_thread().name.startswith("offload-layers-reader"):
            time.sleep(0.2)
        return super().__getitem__(name)


def two_small_and_a_large_one(source_of: type[CountingSource]) -> tuple[Any, Budget, int]:
    """Return a model whose limit has room for its last layer and half of one of the others."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8 * WIDTH))
    small, large = (4 * (WIDTH + 1) * width for width in (WIDTH, 8 * WIDTH))
    limit = large + small // 2
    source = source_of(plain.state_dict())
    model: Any = enable_vram_management(plain, {nn.Linear: AutoWrappedLinear}, DISK, limit / GIB, source)
    budget = with_own_budget(model)
    for residency in residencies(model):
        residency.keeps_staged = False
    for _ in range(2):  # the order of the layers is learned
        model(X)
    residencies(model)[0].schedule.forget()  # type: ignore[union-attr]
    budget.reset_peak()
    return model, budget, limit


def test_a_fetch_that_was_in_vain_does_not_exceed_the_limit() -> None:
    model, budget, limit = two_small_and_a_large_one(SlowToReadAhead)
    model[0](X)  # what comes next is being fetched
    model[2](X)  # something else comes
    assert budget.statistics().peak_nbytes <= limit


def test_what_one_thread_has_ahead_makes_room_for_the_computation_of_another() -> None:
    model, budget, limit = two_small_and_a_large_one(CountingSource)
    model[0](X)
    residencies(model)[0].schedule.prefetcher.settle()  # type: ignore[union-attr]
    assert budget.statistics().lent_nbytes  # for the next layer

    def other() -> None:
        with torch.no_grad():
            model[2](X)

    assert in_threads(other) == []
    assert budget.statistics().peak_nbytes <= limit
    model[1](X)  # what was dropped is fetched again
    assert_invariants(model)


def test_a_thread_that_ends_leaves_nothing_borrowed() -> None:
    model = enable_vram_management(
        stack(), {nn.Linear: AutoWrappedLinear}, DISK, None, CountingSource(stack().state_dict())
    )
    budget = with_own_budget(model)

    def run() -> None:
        with torch.no_grad():
            for _ in range(3):
                model(X)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    residencies(model)[0].schedule.prefetcher.settle()  # type: ignore[union-attr]
    gc.collect()  # the queue of the thread, if something still refers to it
    assert budget.statistics().lent_nbytes == 0
    assert budget.statistics().peak_nbytes > 0


PROGRAM = """
    import sys, time, torch
    from torch import nn
    from offload_layers import AutoWrappedLinear, enable_vram_management

    class Slow(dict):
        def __getitem__(self, name):
            {slow}
            return super().__getitem__(name).clone()

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    source = Slow(model.state_dict())
    config = {{f"{{role}}_{{what}}": "disk" for role in ("offload", "onload", "preparing")
              for what in ("dtype", "device")}}
    config |= {{"computation_dtype": torch.float32, "computation_device": "cpu"}}
    enable_vram_management(model, {{nn.Linear: AutoWrappedLinear}}, config, None, source)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 64))
    print("done", flush=True)
    {end}
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemExit(3)"])
def test_the_interpreter_ends_while_weights_are_on_their_way(end: str) -> None:
    program = textwrap.dedent(PROGRAM).format(slow="time.sleep(0.01)", end=end)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.stdout == "done\n"
    assert run.stderr == ""
    assert run.returncode == (3 if end else 0)


class WatchedDevice(FakeDevice):
    """Writes down who tells it what about its queues."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int]] = []
        self.recorded: list[Tensor] = []
        self.residency: Any = None
        self.was: list[tuple[bool, State]] = []  # resident, and in which state, at each ``synchronize``

    def wait(self, mark: Any) -> None:
        self.told.append(("wait", threading.get_ident()))
        super().wait(mark)

    def finished(self) -> None:
        self.told.append(("finished", threading.get_ident()))
        super().finished()

    def record_use(self, tensor: Tensor, *, by_anyone: bool = False) -> None:
        self.recorded.append(tensor)

    def synchronize(self) -> None:
        if self.residency is not None:
            self.was.append((self.residency.resident, self.residency.state))
        super().synchronize()


@pytest.mark.parametrize("leaves_first", ["the one who staged it", "the other"])
def test_everyone_who_shares_a_copy_tells_the_device_so(leaves_first: str) -> None:
    """Two threads may compute in two queues: each has to wait for the copy, and to be waited for."""
    device = WatchedDevice()
    with device.installed():
        layer: Any = AutoWrappedLinear(
            nn.Linear(WIDTH, WIDTH), **DISK, disk_map=CountingSource(linear_state())
        )
        residency = layer._owner()
        entered, may_leave = threading.Event(), threading.Event()

        def other() -> None:
            residency.enter()
            entered.set()
            may_leave.wait(10)
            residency.leave()

        thread = threading.Thread(target=other)
        residency.enter()
        thread.start()
        assert entered.wait(10)
        if leaves_first == "the other":
            may_leave.set()
            thread.join()
            residency.leave()
        else:
            residency.leave()
            may_leave.set()
            thread.join()
    for ident in (threading.get_ident(), thread.ident):
        told = [what for what, who in device.told if who == ident]
        assert told[0] == "wait"
        assert told[-1] == "finished"


def test_the_host_waits_before_a_layer_is_resident_and_before_its_memory_is_free() -> None:
    """A resident layer is called without a question, in any queue; not any more while the host waits."""
    config = DISK | {"preparing_dtype": torch.float32, "preparing_device": "cpu"}
    device = WatchedDevice()
    with device.installed():
        layer: Any = AutoWrappedLinear(
            nn.Linear(WIDTH, WIDTH), **config, disk_map=CountingSource(linear_state())
        )
        device.residency = layer._owner()
        layer(X)
        assert layer._owner().resident
        assert device.was == [(False, State.ONLOAD)]
        layer.offload()
        assert device.was[1:] == [(False, State.PREPARING)]


@pytest.mark.parametrize("outlives", ["autograd", "a reader", "nobody"])
def test_memory_of_copies_that_outlive_the_forward_is_kept_for_them(outlives: str) -> None:
    device = WatchedDevice()
    with device.installed():
        plain = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        source = CountingSource(linear_state())
        layer: Any = AutoWrappedLinear(plain, **DISK, disk_map=source, schedule=Schedule())
        read: list[Tensor] = []
        if outlives == "autograd":
            with torch.enable_grad():
                x = X.clone().requires_grad_()
                layer(x).sum().backward()
        else:
            layer(X)
        if outlives == "a reader":
            read += [layer.weight, layer.bias]
    assert len(device.recorded) == (0 if outlives == "nobody" else 2)
    assert {id(t) for t in read} <= {id(t) for t in device.recorded}


def test_a_device_that_shares_the_memory_of_the_host_gets_tensors_of_its_own() -> None:
    there = torch.device("meta")  # stands for mps, which this machine need not have
    with replaced(there, HostDevice(there)):
        assert convert(torch.ones(2), Placement(there)).device == there


def linear_state() -> dict[str, Tensor]:
    return nn.Linear(WIDTH, WIDTH).state_dict()


class Hasty(FakeDevice):
    """While the host waits for the device, other threads go on: they do *meanwhile*."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] = lambda: None

    def synchronize(self) -> None:
        self.meanwhile()
        super().synchronize()


def test_a_model_that_is_dropped_while_it_makes_room_for_another() -> None:
    with Hasty().installed() as device:
        models = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))) for _ in range(2)]
        plain, gone = models[0].requires_grad_(False), models[1]
        config = PREPARING | {"preparing_dtype": torch.float32}
        limit = 4 * sum(parameter.nbytes for parameter in plain.parameters()) / 3 / GIB
        managed = []
        for model in (copy.deepcopy(plain), gone):
            source = CountingSource(model.state_dict())
            managed.append(
                enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config, limit, source)
            )
        with_own_budget(*managed)
        del model, gone, models
        for _ in range(2):
            managed[1](X)
        assert any(layer.resident for layer in residencies(managed[1]))
        device.meanwhile = functools.partial(managed.__delitem__, slice(1, None))
        for _ in range(3):
            assert torch.equal(managed[0](X), plain(X))
        assert len(managed) == 1
        device.meanwhile = lambda: None
        assert_invariants(managed[0])
