"""The report: where the weights are, and counts that add up."""

import copy
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    ConfigError,
    State,
    Tier,
    enable_vram_management,
    report,
    reset_counters,
)
from offload_layers._budget import IN_FLIGHT
from offload_layers._placement import GIB
from offload_layers.testing import CountingSource, FakeDevice, residencies, with_own_budget
from torch import Tensor, nn

LAYERS = 6
WIDTH = 16
NBYTES = WIDTH * WIDTH + WIDTH * 4  # weight in eight bits, bias in float32
STAGED_NBYTES = (WIDTH + 1) * WIDTH * 4
RESTING = ("offload", "onload", "preparing")
DISK: dict[str, Any] = {
    **{f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")},
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}
HOST = {"dtype": torch.bfloat16, "device": "cpu"}
PREPARING = DISK | {"preparing_dtype": torch.float32, "preparing_device": "cpu"}
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


def stored(model: nn.Module) -> CountingSource:
    def in_eight_bits(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor

    return CountingSource({name: in_eight_bits(tensor) for name, tensor in model.state_dict().items()})


def managed(config: dict[str, Any] = DISK, limit: float | None = None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    return enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config, limit, stored(model))


def settle(model: nn.Module) -> None:
    schedule = residencies(model)[0].schedule
    assert schedule is not None
    schedule.prefetcher.settle()


@pytest.fixture
def fake() -> Iterator[FakeDevice]:
    with FakeDevice().installed() as device:
        yield device


def test_each_call_is_a_hit_a_wait_or_a_miss() -> None:
    model = managed()
    for _ in range(5):
        model(X)
    layers = report(model).layers
    assert [layer.hits + layer.waits + layer.misses for layer in layers] == LAYERS * [5]
    assert all(layer.waited_s > 0 for layer in layers)  # nothing was fetched ahead in the first forward
    assert [layer.name for layer in layers] == [str(i) for i in range(LAYERS)]


def test_a_reader_that_is_always_faster_gives_hits_only() -> None:
    model = managed()
    for layer in model:
        layer.register_forward_hook(lambda *_: settle(model))
    model(X)
    first = report(model)
    assert (first.total.hits, first.total.waits, first.total.misses) == (0, 0, LAYERS)
    reset_counters(model)
    for _ in range(3):
        model(X)
    total = report(model).total
    assert (total.hits, total.waits, total.misses) == (
        3 * LAYERS - 1,
        0,
        1,
    )  # what follows the last was unknown


def test_a_reader_that_has_begun_is_waited_for() -> None:
    model = managed()
    for _ in range(2):
        model(X)
    settle(model)
    reset_counters(model)
    source = residencies(model)[0].source
    reading, opened = threading.Event(), threading.Event()
    plain_read = CountingSource.__getitem__

    class Gated(CountingSource):
        def __getitem__(self, name: str) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                reading.set()
                assert opened.wait(60)
            return plain_read(self, name)

    source.__class__ = Gated
    model[0](X)  # was ready; now the reader goes on with a later layer, and stands at the gate
    assert reading.wait(60)
    threading.Timer(0.01, opened.set).start()
    for layer in model[1:]:
        layer(X)
    total = report(model).total
    assert total.waits >= 1
    assert total.hits + total.waits + total.misses == LAYERS
    assert total.waited_s > 0


def test_moved_bytes_are_those_that_cross_the_bus(fake: FakeDevice) -> None:
    model = managed()
    for _ in range(4):
        model(X)
    settle(model)
    total = report(model).total
    assert total.moved_nbytes == fake.copied_nbytes
    assert total.moved_nbytes % NBYTES == 0
    assert total.moved_nbytes >= 4 * LAYERS * NBYTES


def test_moved_bytes_count_what_becomes_resident(fake: FakeDevice) -> None:
    model = managed(PREPARING)
    for _ in range(3):
        model(X)
    total = report(model).total
    assert total.moved_nbytes == fake.copied_nbytes == LAYERS * NBYTES
    assert (total.hits, total.waits, total.misses) == (0, 0, LAYERS)
    assert total.waited_s > 0


def test_a_layer_counts_again_when_its_source_is_another_one(fake: FakeDevice) -> None:
    model = managed()
    model[0](X)
    layer = model[0]
    layer.add_lora(torch.randn(2, WIDTH), torch.randn(WIDTH, 2))
    layer.merge_lora()
    layer._owner().schedule.forget()
    reset_counters(model)
    before = fake.copied_nbytes
    layer(X)
    assert report(model).layers[0].moved_nbytes == STAGED_NBYTES  # the sum is in float32
    settle(model)
    assert fake.copied_nbytes >= before + STAGED_NBYTES


def test_tiers_are_where_the_weights_are() -> None:
    model = managed(DISK | {f"{role}_{what}": HOST[what] for role in RESTING[1:] for what in HOST})
    for layer in model[:2]:
        layer.onload()
    layers = report(model).layers
    assert [layer.tier for layer in layers] == [Tier.HOST] * 2 + [Tier.DISK] * 4
    assert [layer.state for layer in layers] == [State.ONLOAD] * 2 + [State.OFFLOAD] * 4
    assert [layer.dtype for layer in layers] == ["bfloat16"] * 2 + ["float32"] * 4  # a dict does not tell
    assert layers[0].nbytes == STAGED_NBYTES // 2


def test_what_was_read_is_known() -> None:
    model = managed()
    assert report(model).layers[0].dtype == "float32"
    model[0](X)
    assert report(model).layers[0].dtype == "float8_e4m3fn+float32"
    assert report(model).layers[0].nbytes == NBYTES


def test_residents_are_on_the_device() -> None:
    model = managed(PREPARING)
    limit = 5 * STAGED_NBYTES / GIB
    with_own_budget(model)
    for layer in model:
        layer.vram_limit = limit
    for _ in range(3):
        model(X)
    found = report(model)
    staying = [layer for layer in found.layers if layer.tier is Tier.DEVICE]
    assert len(staying) == found.tiers[Tier.DEVICE].layers == 5 - IN_FLIGHT
    assert found.tiers[Tier.DEVICE].nbytes == len(staying) * STAGED_NBYTES
    assert found.tiers[Tier.DEVICE].layers + found.tiers[Tier.DISK].layers == LAYERS
    assert found.limit_nbytes == int(limit * GIB)
    assert found.lent_nbytes <= found.peak_nbytes <= found.limit_nbytes


def test_copies_that_are_kept_are_on_the_device() -> None:
    model = managed()
    keeper = residencies(model)[0]
    keeper.keeps_staged = True
    model(X)
    found = report(model).layers[0]
    assert (found.tier, found.dtype, found.nbytes) == (Tier.DEVICE, "float32", STAGED_NBYTES)
    assert (found.hits, found.misses) == (1, 0)  # made before it was called
    assert found.waited_s > 0
    model(X)
    assert report(model).layers[0].hits == 2
    assert report(model).layers[0].moved_nbytes == found.moved_nbytes


def test_reading_weights_that_are_resident_is_not_counted() -> None:
    model = managed(PREPARING)
    model(X)
    reset_counters(model)
    for _ in range(3):
        model(X)
    total = report(model).total
    assert (total.hits, total.waits, total.misses, total.waited_s, total.moved_nbytes) == (0, 0, 0, 0.0, 0)


def test_the_order_is_that_of_the_calls() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(WIDTH))
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.never = nn.Linear(WIDTH, WIDTH)
            self.beside = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self.layers):
                x = layer(x)
            return self.beside(x) * self.gate  # type: ignore[no-any-return]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Backwards()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model: Any = Outer()
    faces = {nn.Linear: AutoWrappedLinear, Backwards: AutoWrappedNonRecurseModule}
    enable_vram_management(model, faces, DISK, None, CountingSource(model.state_dict()))
    model(X)
    found = report(model)
    names = [layer.name for layer in found.layers]
    assert names == ["inner", "inner.layers.2", "inner.never", "inner.layers.1", "inner.layers.0"]
    assert found.unmanaged_nbytes == 2 * WIDTH * 4


def test_layers_without_weights_are_not_layers() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    faces = {nn.Linear: AutoWrappedLinear, nn.ReLU: AutoWrappedModule}
    enable_vram_management(model, faces, DISK, None, CountingSource(model.state_dict()))
    assert [layer.name for layer in report(model).layers] == ["0"]


def test_counts_begin_anew_and_are_a_copys_own() -> None:
    model = managed()
    model(X)
    twin = copy.deepcopy(model)
    assert report(twin).total.misses == 0
    twin(X)
    assert report(model).total.misses == LAYERS
    assert report(twin).total.misses == LAYERS
    settle(model)
    reset_counters(model)
    assert report(model).total.misses == 0
    assert report(model).peak_nbytes == report(model).lent_nbytes


def test_the_dictionary_is_for_json() -> None:
    model = managed(PREPARING, 1e-6)
    model(X)
    as_dict = report(model).to_dict()
    again = json.loads(json.dumps(as_dict))
    assert again == as_dict
    assert again["device"] == "cpu"
    assert again["total"]["misses"] == LAYERS
    assert sum(again["tiers"][tier]["layers"] for tier in again["tiers"]) == LAYERS
    assert [layer["name"] for layer in again["layers"]] == [str(i) for i in range(LAYERS)]
    assert again["layers"][0]["state"] in ("onload", "preparing")


def test_the_text_has_sums_and_the_longest_waits() -> None:
    model = managed()
    model(X)
    found = report(model)
    text = str(found)
    assert f"{LAYERS} layers compute on cpu" in text
    assert "no limit" in text
    assert f"disk: {LAYERS} layers" in text
    assert "device:" not in text  # no layer there
    assert all(f"{i} (disk)" in text for i in range(LAYERS))
    longest = max(found.layers, key=lambda layer: layer.waited_s)
    short = found.table(top=1)
    assert f"{longest.name} (disk)" in short
    assert "... and 5 more that were waited for" in short
    assert short.count("(disk)") == 1
    assert max(map(len, text.splitlines())) <= 110


def test_without_managed_layers_there_is_nothing_to_report() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no managed layers; call enable_vram_management on it"):
        report(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module; got str"):
        report("model")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_transfers_have_labels_where_a_profiler_runs() -> None:
    model = managed(PREPARING)
    model(X)
    model[0].offload()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(X)
    labels = [event.key for event in profiler.key_averages() if event.key.startswith("offload_layers")]
    assert labels == ["offload_layers: fetch 0"]  # the others are resident
