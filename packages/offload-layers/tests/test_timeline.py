"""The recording of a device's memory and of the calls: complete, under the limit, and gone afterwards."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    ConfigError,
    Report,
    Timeline,
    enable_vram_management,
    recording,
    report,
)
from offload_layers._placement import GIB
from offload_layers._timeline import _Memory
from offload_layers.testing import CountingSource, FakeDevice, residencies, with_own_budget
from torch import Tensor, nn

LAYERS = 8
WIDTH = 16
NBYTES = (WIDTH + 1) * WIDTH * 4
RESTING = ("offload", "onload", "preparing")
DISK: dict[str, Any] = {
    **{f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")},
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}
HALF_ON_HOST = {"dtype": torch.bfloat16, "device": "cpu"}
PREPARING = DISK | {"preparing_dtype": torch.float32, "preparing_device": "cpu"}
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A layer with a parameter of its own, around another one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gate  # type: ignore[no-any-return]


def managed(model: nn.Module, config: dict[str, Any] = DISK, limit_nbytes: int | None = None) -> Any:
    torch.manual_seed(0)
    limit = None if limit_nbytes is None else limit_nbytes / GIB
    faces = {nn.Linear: AutoWrappedLinear, Block: AutoWrappedNonRecurseModule}
    enable_vram_management(model, faces, config, limit, CountingSource(model.state_dict()))
    with_own_budget(model)
    return model


def linears() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def test_weights_that_wait_in_host_memory_are_told() -> None:
    at_rest = {f"{role}_{what}": value for role in RESTING for what, value in HALF_ON_HOST.items()}
    model = managed(linears().bfloat16(), DISK | at_rest)
    with recording(model) as timeline:
        model(X)
    assert {sample.host_nbytes for sample in timeline.samples} == {LAYERS * NBYTES // 2}
    assert timeline.host_peak_nbytes == LAYERS * NBYTES // 2
    assert json.loads(json.dumps(timeline.to_dict()))["samples"][-1]["host_nbytes"] == LAYERS * NBYTES // 2


def test_host_memory_is_seen_to_fill_and_to_empty() -> None:
    timeline = Timeline(torch.device("cpu"), None)
    layers: Any = [Waiting(host_nbytes=0) for _ in range(3)]
    memory = _Memory(timeline, layers)
    memory.changed(5, 1)
    for nbytes in (10, 10, 0):
        for layer in layers:
            layer.host_nbytes = nbytes
            memory.look(layer)
    assert [sample.host_nbytes for sample in timeline.samples] == [0, 10, 20, 30, 20, 10, 0]
    assert {(sample.lent_nbytes, sample.resident_nbytes) for sample in timeline.samples} == {(5, 1)}


class Waiting:
    def __init__(self, host_nbytes: int) -> None:
        self.host_nbytes = host_nbytes


@pytest.mark.parametrize("layers", [3, 5, LAYERS + 2])
def test_the_limit_is_never_passed(layers: int) -> None:
    with FakeDevice().installed() as device:
        model = managed(linears(), PREPARING, layers * NBYTES)
        with recording(model) as timeline:
            for _ in range(4):
                model(X)
        residencies(model)[0].schedule.prefetcher.settle()  # type: ignore[union-attr]
    assert timeline.limit_nbytes == layers * NBYTES
    assert all(0 <= s.resident_nbytes <= s.lent_nbytes <= layers * NBYTES for s in timeline.samples)
    assert timeline.peak_nbytes >= device.peak_nbytes > 0
    assert timeline.samples[-1].resident_nbytes == (layers - 2) * NBYTES


def test_the_books_are_those_of_the_budget() -> None:
    model = managed(linears())
    with recording(model) as timeline:
        model(X)
        model(X)
    statistics = model[0]._owner().budget.statistics()
    assert timeline.peak_nbytes == statistics.peak_nbytes
    assert timeline.samples[0].lent_nbytes == 0
    times = [sample.time_s for sample in timeline.samples]
    assert times == sorted(times)
    assert timeline.duration_s == times[-1]
    assert timeline.device == torch.device("cpu")
    assert timeline.limit_nbytes is None


def test_every_call_has_its_interval() -> None:
    model = managed(nn.Sequential(Block(), nn.ReLU(), Block()))
    with recording(model) as timeline:
        model(X)
    found = sorted((i.begin_s, i.name, i.depth) for i in timeline.intervals)
    assert [(name, depth) for _, name, depth in found] == [("0", 0), ("0.inner", 1), ("2", 0), ("2.inner", 1)]
    by_name = {interval.name: interval for interval in timeline.intervals}
    assert (
        by_name["0"].begin_s <= by_name["0.inner"].begin_s <= by_name["0.inner"].end_s <= by_name["0"].end_s
    )
    for interval in timeline.intervals:
        assert 0 < interval.waited_s <= interval.end_s - interval.begin_s
    assert timeline.waited_s == pytest.approx(report(model).total.waited_s)


def test_calls_of_residents_wait_for_nothing() -> None:
    model = managed(linears(), PREPARING)
    model(X)
    with recording(model) as timeline:
        model(X)
    assert [interval.name for interval in timeline.intervals] == [str(i) for i in range(LAYERS)]
    assert timeline.waited_s == 0
    assert {sample.lent_nbytes for sample in timeline.samples} == {LAYERS * NBYTES}


def test_threads_have_calls_of_their_own() -> None:
    model = managed(linears(), PREPARING)
    model(X)
    with recording(model) as timeline:
        threads = [threading.Thread(target=model, args=(X,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(timeline.intervals) == 3 * LAYERS
    assert {interval.depth for interval in timeline.intervals} == {0}


def test_a_call_that_fails_has_an_end() -> None:
    model = managed(nn.Sequential(Block()))
    with recording(model) as timeline:
        with pytest.raises(RuntimeError):
            model(torch.ones(3))
        model(X)
    assert sorted(interval.name for interval in timeline.intervals) == ["0", "0", "0.inner", "0.inner"]
    assert {i.depth for i in timeline.intervals if i.name == "0"} == {0}


def test_a_call_that_a_hook_refuses_does_not_confuse_the_others() -> None:
    model = managed(nn.Sequential(Block()))

    def refuse(module: nn.Module, args: Any) -> None:
        raise ValueError("not today")

    refusing = model[0].inner.register_forward_pre_hook(refuse)
    with recording(model) as timeline:
        with pytest.raises(ValueError, match="not today"):
            model(X)
        refusing.remove()
        model(X)
    assert {(i.name, i.depth) for i in timeline.intervals} == {("0", 0), ("0.inner", 1)}


def test_nothing_is_left_afterwards() -> None:
    model = managed(linears())
    with pytest.raises(RuntimeError), recording(model) as timeline:
        model(torch.ones(3))
    samples, intervals = len(timeline.samples), len(timeline.intervals)
    model(X)
    assert (len(timeline.samples), len(timeline.intervals)) == (samples, intervals)
    assert not any("forward" in layer.__dict__ for layer in model)
    assert model[0]._owner().budget._books.listeners == ()


def test_forwards_that_others_have_replaced_are_put_back() -> None:
    model = managed(linears())
    forward = model[0].forward
    replaced = model[0].forward = lambda x: forward(x) + 1
    expected = model(X)
    with recording(model) as timeline:
        assert torch.equal(model(X), expected)
    assert len(timeline.intervals) == LAYERS
    assert model[0].__dict__["forward"] is replaced


def test_layers_compute_as_they_do_unwatched(check_runs) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True).eval()
    model: Any = nn.Sequential(layer)
    source = CountingSource(model.state_dict())
    x = X.view(2, 1, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):  # where two ways of computing differ most
        check_runs(layer, x)
        enable_vram_management(model, {nn.TransformerEncoderLayer: AutoWrappedModule}, DISK, None, source)
        expected = model(x)
        with recording(model):
            found = model(x)
    assert torch.equal(found, expected)


def test_two_recordings_at_once() -> None:
    model = managed(linears())
    with recording(model) as outer:
        model(X)
        with recording(model) as inner:
            model(X)
    assert len(outer.intervals) == 2 * len(inner.intervals) == 2 * LAYERS
    assert outer.samples[-1].lent_nbytes == inner.samples[-1].lent_nbytes


def test_the_dictionary_is_for_json() -> None:
    model = managed(linears(), limit_nbytes=4 * NBYTES)
    with recording(model) as timeline:
        model(X)
    again = json.loads(json.dumps(timeline.to_dict()))
    assert again["limit_nbytes"] == 4 * NBYTES
    assert len(again["samples"]) == len(timeline.samples)
    assert again["intervals"][0]["name"] == "0"


def measured(layers: int = LAYERS) -> tuple[Report, Timeline]:
    model = managed(linears() if layers else nn.Sequential(Block()), PREPARING, 5 * NBYTES)
    with recording(model) as timeline:
        for _ in range(3):
            model(X)
    return report(model), timeline


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_pictures(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    pictures: tuple[Report | Timeline, ...] = measured()
    for i, picture in enumerate((*pictures, Timeline(torch.device("cpu"), None))):
        path = tmp_path / f"{i}.{ending}"
        picture.plot(path)
        content = path.read_bytes()
        assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending])
        if ending == "svg" and i == 0:
            assert b"<!-- waited, ms -->" in content


def test_pictures_need_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    for picture in measured():
        with pytest.raises(ConfigError, match=r"pip install 'offload-layers\[plot\]'"):
            picture.plot(tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []
