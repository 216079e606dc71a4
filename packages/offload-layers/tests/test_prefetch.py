"""Fetching ahead: the order is learned, the bytes are bounded, and nothing stale is ever used."""

import copy
import gc
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, _prefetch, enable_vram_management
from offload_layers._counters import Counters
from offload_layers._order import ExecutionOrder
from offload_layers._prefetch import Prefetcher
from offload_layers.testing import CountingSource, FakeDevice, assert_invariants, residencies
from torch import Tensor, nn

LAYERS = 6
RESTING = ("offload", "onload", "preparing")
DISK: dict[str, Any] = {
    **{f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")},
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


def learn(order: "ExecutionOrder[Named]", path: list[Named]) -> None:
    for layer in path:
        order.saw(layer)


def names(order: "ExecutionOrder[Named]") -> str:
    return "".join(layer.name for layer in order.upcoming())


class TestExecutionOrder:
    @pytest.fixture
    def layers(self) -> dict[str, Named]:
        return {name: Named(name) for name in "abcdn"}

    def test_nothing_is_known_at_first(self, layers: dict[str, Named]) -> None:
        order: ExecutionOrder[Named] = ExecutionOrder()
        assert names(order) == ""
        learn(order, [layers["a"]])
        assert names(order) == ""

    def test_one_forward_predicts_the_next(self, layers: dict[str, Named]) -> None:
        order: ExecutionOrder[Named] = ExecutionOrder()
        learn(order, [layers[n] for n in "abcda"])
        assert names(order) == "bcda"

    def test_a_layer_that_is_called_twice(self, layers: dict[str, Named]) -> None:
        order: ExecutionOrder[Named] = ExecutionOrder()
        learn(order, [layers[n] for n in "anbncnanbn"])
        assert names(order).startswith("cnanbn")

    def test_the_latest_path_counts(self, layers: dict[str, Named]) -> None:
        order: ExecutionOrder[Named] = ExecutionOrder()
        learn(order, [layers[n] for n in "abcabdab"])
        assert names(order).startswith("da")

    def test_layers_that_are_gone_end_the_prediction(self, layers: dict[str, Named]) -> None:
        order: ExecutionOrder[Named] = ExecutionOrder()
        learn(order, [layers[n] for n in "abcda"])
        del layers["c"]
        gc.collect()
        assert names(order) == "b"

    def test_what_is_presumed_is_no_knowledge(self, layers: dict[str, Named]) -> None:
        order: ExecutionOrder[Named] = ExecutionOrder()
        order.presume([layers[n] for n in "abc"])
        assert order.presumed(order.place) is None  # nothing was called
        learn(order, [layers["a"]])
        assert names(order) == ""
        found = order.presumed(order.place)
        assert found is not None
        assert found[0] is layers["b"]
        assert order.presumed((None, weakref.ref(layers["c"]))) is None
        layers.pop("b")
        del found
        gc.collect()
        assert order.presumed(order.place) is None

    def test_threads_have_places_of_their_own(self, layers: dict[str, Named]) -> None:
        order: ExecutionOrder[Named] = ExecutionOrder()
        learn(order, [layers[n] for n in "abcda"])
        seen = []

        def run() -> None:
            seen.append(names(order))
            learn(order, [layers["c"]])
            seen.append(names(order))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen == ["", "dabc"]
        assert names(order) == "bcda"


class Gate(CountingSource):
    """A source that tells which thread reads, and lets the reader thread wait until it may go on."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.ahead: list[str] = []
        self.open = threading.Event()
        self.open.set()

    def __getitem__(self, name: str) -> Tensor:
        if threading.current_thread().name.startswith("offload-layers-reader"):
            self.ahead.append(name)
            assert self.open.wait(20)
        return super().__getitem__(name)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(LAYERS)))


@pytest.fixture
def source() -> Gate:
    return Gate(plain().state_dict())


@pytest.fixture
def model(source: Gate) -> nn.Module:
    return enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, None, source)


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def prefetcher(model: nn.Module) -> Prefetcher:
    schedule = residencies(model)[0].schedule
    assert schedule is not None
    return schedule.prefetcher


def settle(model: nn.Module) -> None:
    """Wait until the reader thread has nothing more to do."""
    prefetcher(model).settle()


def test_the_second_forward_finds_its_weights_ready(model: nn.Module, source: Gate) -> None:
    expected = plain()(X)
    for layer in model:
        layer.register_forward_hook(lambda *_: settle(model))  # the reader is always faster
    assert torch.equal(model(X), expected)
    assert source.ahead == []
    source.reads.clear()
    for _ in range(3):
        assert torch.equal(model(X), expected)
    assert source.reads[0] == "0.weight"  # what follows the last layer is not known in the first forward
    assert source.reads[1:] == source.ahead
    assert source.ahead == [f"{i % LAYERS}.weight" for i in range(1, 3 * LAYERS + 2)]
    assert sum(r.counters.hits for r in residencies(model)) == 3 * LAYERS - 1


def test_never_more_than_two_of_the_largest_layers_are_ahead(model: nn.Module, source: Gate) -> None:
    largest = 8 * 8 * 4
    lent = []
    for layer in model:
        layer.register_forward_hook(lambda *_: lent.append(prefetcher(model).ahead_nbytes()))
    for _ in range(3):
        model(X)
    assert max(lent) == 2 * largest


def test_a_limit_bounds_what_is_ahead(source: Gate) -> None:
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, 0, source)
    for _ in range(3):
        assert torch.equal(model(X), plain()(X))
    assert source.ahead == []


def test_offload_drops_what_was_fetched(model: nn.Module) -> None:
    for _ in range(2):
        model(X)
    budget = residencies(model)[0].budget
    settle(model)
    before = budget.statistics().lent_nbytes
    assert prefetcher(model).ahead_nbytes()
    model[0].offload()
    assert not prefetcher(model).ahead_nbytes()
    assert budget.statistics().lent_nbytes == before - 2 * 8 * 8 * 4


def test_weights_that_were_replaced_meanwhile_are_not_used_stale(model: nn.Module, source: Gate) -> None:
    model(X)
    model(X)
    settle(model)
    fetched = [name for name in source.ahead if name == "0.weight"]
    assert fetched
    new = {f"{i}.weight": torch.randn(8, 8) for i in range(LAYERS)}
    model.load_state_dict(new)
    oracle = plain()
    oracle.load_state_dict(new)
    assert torch.equal(model(X), oracle(X))


def test_in_place_changes_of_host_weights_are_seen() -> None:
    stored = {f"{role}_dtype": torch.float64 for role in RESTING}
    config = {**stored, "computation_dtype": torch.float32, "computation_device": "cpu"}
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, config)
    with torch.no_grad():
        for _ in range(3):
            model(X)
            settle(model)
            for parameter in model.parameters():
                parameter.mul_(0.5)
    oracle = plain()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.mul_(0.125)
        assert torch.equal(model(X), oracle(X))


def test_another_order_costs_time_and_nothing_else(model: nn.Module) -> None:
    weights = plain()
    for _ in range(2):
        model(X)
    for path in ([5, 4, 3, 2, 1, 0], [0, 0, 1, 1, 0], [2, 2, 2, 5], list(range(LAYERS))):
        x = y = X
        for index in path:
            x, y = model[index](x), weights[index](y)
        assert torch.equal(x, y)


def test_a_failure_of_the_reader_is_raised_by_the_layer_that_needs_the_weights(
    model: nn.Module, source: Gate
) -> None:
    for _ in range(2):
        model(X)
    source.failing = {"3.weight"}
    with pytest.raises(OSError, match=r"3\.weight: the disk is gone"):
        model(X)
    source.failing = set()
    assert torch.equal(model(X), plain()(X))


def test_a_layer_waits_for_weights_that_are_on_their_way(model: nn.Module, source: Gate) -> None:
    for _ in range(2):
        model(X)
    settle(model)
    source.open.clear()
    model[0](X)  # its weights were ready; from here on the reader waits at the gate
    for layer in residencies(model):
        layer.counters = Counters()
    opener = threading.Timer(0, source.open.set)
    results = []
    runner = threading.Thread(target=lambda: results.append(model(X)))
    runner.start()
    opener.start()
    runner.join()
    assert torch.equal(results[0], plain()(X))
    assert sum(r.counters.calls for r in residencies(model)) == LAYERS


def test_the_reader_thread_ends_with_the_model(source: Gate) -> None:
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    for _ in range(2):
        model(X)
    executor = prefetcher(model)._reader._executor
    assert executor is not None
    (thread,) = executor._threads
    settle(model)
    del model, executor
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_reads_by_itself(model: nn.Module) -> None:
    for _ in range(2):
        model(X)
    settle(model)
    expected = plain()(X)
    pid = os.fork()
    if pid == 0:  # pragma: no cover - runs in another process
        status = 1
        try:
            status = int(not all(torch.equal(model(X), expected) for _ in range(3)))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_layer_that_is_read_and_then_called_is_fetched_once(model: nn.Module, source: Gate) -> None:
    assert model[2].weight.dtype is torch.float32
    assert model[2].weight.shape == (8, 8)
    model[2](X)
    model[2](X)
    assert source.reads == ["2.weight"]
    lent = residencies(model)[0].budget.statistics().lent_nbytes
    model[3](X)
    assert "weight" not in model[2].__dict__
    assert residencies(model)[0].budget.statistics().lent_nbytes == lent - 8 * 8 * 4
    assert model[2].weight is not None
    model[2].offload()
    assert_invariants(model)


def test_copies_of_a_model_fetch_for_themselves(model: nn.Module, source: Gate) -> None:
    twin = copy.deepcopy(model)
    assert prefetcher(twin) is not prefetcher(model)
    assert {id(r.schedule) for r in residencies(twin)} == {id(residencies(twin)[0].schedule)}


def test_what_came_from_another_source_is_not_used(model: nn.Module) -> None:
    for _ in range(2):
        model(X)
    settle(model)  # the first two layers are ready
    oracle = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(LAYERS)))
    for residency in residencies(model):
        residency.source = CountingSource(oracle.state_dict())
    assert torch.equal(model(X), oracle(X))


class Asked(Gate):
    """A source that can be told beforehand."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.asked: list[str] = []

    def prefetch(self, names: list[str]) -> None:
        self.asked += names


@pytest.mark.parametrize("told", [0, 4])
def test_beside_a_computation_on_the_cpu_a_source_is_only_told(
    told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = 8 * 8 * 4
    monkeypatch.setattr(_prefetch, "ASKED_AHEAD", told * nbytes)
    source = Asked(plain().state_dict())
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    for _ in range(4):
        assert torch.equal(model(X), plain()(X))
    assert source.ahead == []  # copying takes the cores that compute
    first_asked = list(dict.fromkeys(source.asked))
    assert first_asked == [f"{i % LAYERS}.weight" for i in range(1, LAYERS + 1)]
    window = max(2, told) * nbytes
    assert window / 2 < prefetcher(model).ahead_nbytes() <= window
    model[0].offload()
    assert prefetcher(model).ahead_nbytes() == 0


def test_a_source_is_told_however_fast_it_gives_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks may be faster than some page caches; what there is to ask for is known to the source."""
    monkeypatch.setattr(_prefetch, "ASKED_AHEAD", 0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    asked: list[str] = []

    class Source(dict[str, Tensor]):
        def prefetch(self, names: list[str]) -> None:
            asked.extend(names)

    managed = enable_vram_management(
        model, {nn.Linear: AutoWrappedLinear}, DISK, None, Source(model.state_dict())
    )
    x = torch.ones(1, 512)
    managed(x)
    managed(x)
    asked.clear()
    managed(x)
    assert asked == ["2.weight", "3.weight", "0.weight", "1.weight"]


def test_for_a_device_with_a_bus_it_is_read_ahead_too() -> None:
    source = Asked(plain().state_dict())
    with FakeDevice().installed():
        model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, None, source)
        for layer in model:
            layer.register_forward_hook(lambda *_: settle(model))
        for _ in range(3):
            assert torch.equal(model(X), plain()(X))
    assert set(source.asked) == set(source.ahead) == {f"{i}.weight" for i in range(LAYERS)}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(list(range(40)), id="each once"),
        pytest.param([index for index in range(40) for _ in range(2)], id="each twice in turn"),
        pytest.param([index for other in range(1, 40) for index in (0, other)], id="one between all others"),
    ],
)
def test_looking_ahead_takes_a_few_steps_however_long_the_model(
    order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the whole model fits into the window, all that is to be found is the layer that was just used."""
    oracle = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(40)))
    model = copy.deepcopy(oracle)
    source = Asked(oracle.state_dict())
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    steps = 0
    following = ExecutionOrder.following

    def count(self: Any, place: Any) -> Any:
        nonlocal steps
        steps += 1
        return following(self, place)

    def run(model: nn.Sequential) -> Tensor:
        y = X
        for index in order:
            y = model[index](y)
        return y

    for _ in range(3):
        assert torch.equal(run(model), run(oracle))
    monkeypatch.setattr(ExecutionOrder, "following", count)
    source.asked.clear()
    run(model)
    assert sorted(set(source.asked)) == sorted(oracle.state_dict())
    assert steps <= 6 * len(order)


def test_a_source_is_told_again_when_layers_come_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was told of long before may have left the page cache since."""
    nbytes = 8 * 8 * 4
    monkeypatch.setattr(_prefetch, "ASKED_AHEAD", 5 * nbytes)
    source = Asked(plain().state_dict())
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    told_before: list[set[str]] = []
    for layer in model:
        layer.register_forward_pre_hook(lambda *_: told_before.append(set(source.asked)))
    for _ in range(3):
        model(X)
    source.asked.clear()
    told_before.clear()
    model(X)
    assert len(told_before) == LAYERS
    for index, told in list(enumerate(told_before))[2:]:  # one call ago and two calls ago
        assert f"{index}.weight" in told
    assert all(source.asked.count(f"{index}.weight") <= 3 for index in range(LAYERS))


@pytest.mark.parametrize("reverse", [False, True])
def test_in_the_first_forward_a_source_is_told_in_the_order_of_the_model(reverse: bool) -> None:
    source = Asked(plain().state_dict())
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    order = range(LAYERS)[::-1] if reverse else range(LAYERS)
    expected, y = X, X
    for index in order:
        expected, y = plain()[index](expected), model[index](y)
        if index == 0 and not reverse:
            assert source.asked == [f"{other}.weight" for other in range(1, LAYERS)]
    assert torch.equal(y, expected)
    assert source.ahead == []


def test_what_is_only_presumed_is_not_fetched() -> None:
    source = Asked(plain().state_dict())
    with FakeDevice().installed():
        model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, None, source)
        assert torch.equal(model(X), plain()(X))
        settle(model)
        assert source.ahead == []
        assert source.asked[: LAYERS - 1] == [f"{index}.weight" for index in range(1, LAYERS)]
        assert torch.equal(model(X), plain()(X))
        settle(model)
        assert source.ahead


def test_a_model_that_calls_few_of_its_layers_is_not_presumed_to_call_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_prefetch, "ASKED_AHEAD", 20 * 8 * 8 * 4)
    oracle = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(400)))
    model = copy.deepcopy(oracle)
    source = Asked(oracle.state_dict())
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    for index in range(0, 400, 8):
        assert torch.equal(model[index](X), oracle[index](X))
    assert 20 < len(set(source.asked)) < 100


def test_layers_that_are_called_later_than_presumed_do_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prefetch, "ASKED_AHEAD", 20 * 8 * 8 * 4)
    oracle = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(400)))
    model = copy.deepcopy(oracle)
    source = Asked(oracle.state_dict())
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    unasked = 0
    for block in range(0, 400, 8):
        for index in (0, 5, 1, 2, 3, 4, 6, 7):
            unasked += f"{block + index}.weight" not in source.asked
            model[block + index](X)
    assert unasked == 1  # the very first
