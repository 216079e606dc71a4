"""Copies beside the computation, on a device whose clock is only counted."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedModule, BudgetExceededError, State, enable_vram_management
from offload_layers._budget import Budget
from offload_layers._placement import GIB
from offload_layers.testing import CountingSource, FakeDevice, assert_invariants, with_own_budget
from torch import Tensor, nn

LAYERS = 12
NBYTES = 4 * 1000
COPY_S = 1.0
RESTING = ("offload", "onload", "preparing")
DISK: dict[str, Any] = {
    **{f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")},
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}
PREPARING = DISK | {"preparing_dtype": torch.float32, "preparing_device": "cpu"}
X = torch.ones(4, 1000)


class Layer(nn.Module):
    """Takes so many seconds of the device, and *also* bytes of its memory while it runs."""

    def __init__(self, device: FakeDevice, seconds: float, also: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1000) + 0.5, requires_grad=False)
        self.device, self.seconds, self.also = [device], seconds, also
        self.before: list[Callable[[], None]] = []

    def forward(self, x: Tensor) -> Tensor:
        for settle in self.before:  # a reader that is slower than this process would make time differ
            settle()
        self.device[0].compute(self.seconds)
        activations = self.device[0].upload(torch.zeros(self.also)) if self.also else x
        return x * self.weight + activations.sum() * 0


def plain(device: FakeDevice, seconds: list[float], also: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(device, s, also) for s in seconds))


class Filling(CountingSource):
    """A source that also writes into memory which it is given."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.filled: list[str] = []

    def read_into(self, name: str, out: Tensor) -> None:
        if name in self.failing:
            out.fill_(float("nan"))
            raise OSError(f"{name}: the disk is gone")
        out.copy_(self._tensors[name])
        self.filled.append(name)


def managed(
    device: FakeDevice,
    seconds: list[float],
    config: dict[str, Any],
    limit: float | None,
    also: int = 0,
    source: CountingSource | None = None,
) -> Any:
    model = plain(device, seconds, also)
    source = source or CountingSource(model.state_dict())
    enable_vram_management(model, {Layer: AutoWrappedModule}, config, limit, source)
    with_own_budget(model)
    for layer in model:
        layer.before.append(layer._owner().schedule.prefetcher.settle)
    return model


def expected(seconds: list[float]) -> Tensor:
    return plain(FakeDevice(), seconds)(X)  # type: ignore[no-any-return]


def limit_for(nbytes: int) -> float:
    return nbytes / GIB


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with FakeDevice(bytes_per_s=NBYTES / COPY_S).installed() as device:
        yield device


def seconds_of_a_forward(device: FakeDevice, model: Any) -> float:
    before = device.elapsed_s
    for _ in range(4):
        assert torch.equal(model(X), expected([layer.seconds for layer in model]))
    return (device.elapsed_s - before) / 4


def test_copies_hide_behind_computation(device: FakeDevice) -> None:
    seconds = [COPY_S] * LAYERS
    model = managed(device, seconds, DISK, None)
    model(X)
    assert seconds_of_a_forward(device, model) < 1.15 * sum(seconds)  # one after the other: 2.0


def test_where_the_bus_is_slower_it_alone_decides(device: FakeDevice) -> None:
    model = managed(device, [COPY_S / 4] * LAYERS, DISK, None)
    model(X)
    assert seconds_of_a_forward(device, model) < 1.1 * LAYERS * COPY_S  # one after the other: 1.25


def test_no_more_than_three_layers_are_on_the_device(device: FakeDevice) -> None:
    model = managed(device, [COPY_S] * LAYERS, DISK, None)
    for _ in range(4):
        model(X)
    assert device.peak_nbytes <= 3 * NBYTES


def test_twenty_forwards_leave_nothing_behind(device: FakeDevice) -> None:
    model = managed(device, [COPY_S] * LAYERS, DISK, None)
    used = []
    for _ in range(20):
        model(X)
        model[0]._owner().schedule.prefetcher.settle()
        used.append(device.used_nbytes)
    assert max(used) == min(used[1:]) <= 2 * NBYTES


def test_residents_are_spread_over_the_forward(device: FakeDevice) -> None:
    seconds = [COPY_S / 2] * LAYERS  # the bus can bring every second layer in time
    model = managed(device, seconds, PREPARING, None)
    limit = limit_for((LAYERS // 2 + 2) * NBYTES)
    for layer in model:
        layer.vram_limit = limit
    for _ in range(3):
        model(X)
    stays = [layer.state is State.PREPARING for layer in model]
    assert sum(stays) == LAYERS // 2
    runs = "".join("#" if stay else "." for stay in stays)
    assert "..." not in runs + runs
    assert seconds_of_a_forward(device, model) < 1.25 * sum(seconds)  # who came first stays: 1.5


def test_room_is_looked_for_once_a_round(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all else around a layer that does not stay."""
    model = managed(device, [COPY_S] * LAYERS, PREPARING, limit_for((LAYERS // 2 + 2) * NBYTES))
    for _ in range(3):
        model(X)
    looked: list[int] = []
    room = Budget.room
    monkeypatch.setattr(Budget, "room", lambda *args, **kw: looked.append(0) or room(*args, **kw))
    for _ in range(5):
        model(X)
    assert 4 <= len(looked) <= 6
    limit = limit_for((LAYERS // 2 + 4) * NBYTES)
    for layer in model:
        layer.vram_limit = limit
    for _ in range(2):
        model(X)
    assert sum(layer.state is State.PREPARING for layer in model) == LAYERS // 2 + 2


def test_the_limit_is_a_ceiling_for_the_weights(device: FakeDevice) -> None:
    for layers in (3, 5, 9):
        model = managed(device, [COPY_S] * LAYERS, PREPARING, None)
        limit = limit_for(layers * NBYTES)
        for layer in model:
            layer.vram_limit = limit
        device.peak_nbytes = device.used_nbytes
        before = device.used_nbytes
        for _ in range(4):
            assert torch.equal(model(X), expected([COPY_S] * LAYERS))
        assert device.peak_nbytes - before <= layers * NBYTES
        del model


def test_a_smaller_limit_is_obeyed_at_once(device: FakeDevice) -> None:
    model = managed(device, [COPY_S] * LAYERS, PREPARING, None)
    model(X)
    assert all(layer.state is State.PREPARING for layer in model)
    limit = limit_for((LAYERS - 8) * NBYTES)
    for layer in model:
        layer.vram_limit = limit
    model[0].offload()
    model(X)
    assert device.used_nbytes <= (LAYERS - 8) * NBYTES


def test_full_memory_makes_residents_leave() -> None:
    seconds = [COPY_S] * LAYERS
    with FakeDevice(nbytes=6 * NBYTES, bytes_per_s=NBYTES / COPY_S).installed() as device:
        model = managed(device, seconds, PREPARING, None, also=500)
        for _ in range(3):
            assert torch.equal(model(X), expected(seconds))
        assert device.peak_nbytes <= 6 * NBYTES


@pytest.mark.parametrize("config", [PREPARING, DISK], ids=["preparing", "disk"])
def test_the_limit_is_kept_with_what_computations_take(device: FakeDevice, config: dict[str, Any]) -> None:
    seconds = [COPY_S] * LAYERS
    limit = 9 * NBYTES
    model = managed(device, seconds, config, limit_for(limit), also=3 * 1000)
    model(X)
    device.peak_nbytes = device.used_nbytes
    for _ in range(3):
        assert torch.equal(model(X), expected(seconds))
    residents = [layer._owner().resident for layer in model].count(True)
    assert residents == (4 if config is PREPARING else 0)  # nine, but for two that pass and for three beside
    assert device.peak_nbytes <= limit


def test_where_not_all_can_stay_the_limit_is_kept_in_the_first_forward_too(device: FakeDevice) -> None:
    seconds = [COPY_S] * LAYERS
    limit = 9 * NBYTES
    model = managed(device, seconds, PREPARING, limit_for(limit))
    model[LAYERS - 1].also = 5 * 1000  # the last layer is the first to tell
    residents = []
    for _ in range(3):
        assert torch.equal(model(X), expected(seconds))
        residents.append([layer._owner().resident for layer in model].count(True))
    assert residents == [0, 2, 2]  # nine, but for two that pass and for five beside
    assert device.peak_nbytes <= limit


def test_what_is_known_beforehand_counts_from_the_first_forward_on(device: FakeDevice) -> None:
    seconds = [COPY_S] * LAYERS
    limit = LAYERS * NBYTES
    peaks = []
    for known in (0, 5 * NBYTES):
        model = managed(device, seconds, PREPARING, limit_for(limit))
        model[LAYERS - 1].also = 5 * 1000
        model[0]._owner().schedule.beside.nbytes = known
        before = device.peak_nbytes = device.used_nbytes
        assert torch.equal(model(X), expected(seconds))
        peaks.append(device.peak_nbytes - before)
        del model
    assert peaks[0] > limit  # the last layer is the first to tell
    assert peaks[1] <= limit


def test_what_was_on_the_device_earlier_hides_nothing_and_is_not_learned(device: FakeDevice) -> None:
    seconds = [COPY_S] * LAYERS
    limit = 9 * NBYTES
    device.peak_nbytes = 100 * NBYTES  # of a model that is gone
    model = managed(device, seconds, PREPARING, limit_for(limit), also=3 * 1000)
    taken = 0

    def look() -> None:
        nonlocal taken
        taken = max(taken, device.used_nbytes)

    for layer in model:
        layer.before.append(look)
    for _ in range(4):
        device.others_nbytes += 1  # a driver's word on others is never the same
        assert torch.equal(model(X), expected(seconds))
    assert [layer._owner().resident for layer in model].count(True) == 3  # one byte less than room for four
    assert taken + 3 * NBYTES <= limit


def test_room_that_others_had_for_a_while_comes_back(device: FakeDevice) -> None:
    model = managed(device, [COPY_S] * LAYERS, PREPARING, limit_for(9 * NBYTES))
    residents = []
    for others in (0, 0, 5, 5, 0, 0):
        device.others_nbytes = others * NBYTES
        model(X)
        residents.append([layer._owner().resident for layer in model].count(True))
    assert residents[1] == residents[-1] == 7
    assert residents[3] == 2


@pytest.mark.parametrize("moment", ["begin", "end"])
def test_a_driver_that_fails_leaves_no_layer_in_use(device: FakeDevice, moment: str) -> None:
    model = managed(device, [COPY_S] * LAYERS, DISK, limit_for(9 * NBYTES))
    model(X)
    layer = model[3]

    def fail(*_: object) -> None:
        raise RuntimeError("the driver is gone")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layer._owner().schedule.beside, moment, fail)
        with pytest.raises(RuntimeError, match="the driver is gone"):
            layer(X)
    layer._owner().schedule.forget()
    assert_invariants(model, layer._owner().budget)
    assert torch.equal(model(X), expected([COPY_S] * LAYERS))


def test_a_device_that_is_smaller_than_the_limit_does_not_make_layers_come_and_go(
    device: FakeDevice,
) -> None:
    device.nbytes = 8 * NBYTES
    model = managed(device, [COPY_S] * LAYERS, PREPARING, limit_for(10 * NBYTES))
    for _ in range(4):
        assert torch.equal(model(X), expected([COPY_S] * LAYERS))
    before = device.copied_nbytes
    for _ in range(5):
        assert torch.equal(model(X), expected([COPY_S] * LAYERS))
    assert device.copied_nbytes - before < 5 * LAYERS * NBYTES  # fewer than if nobody stayed


def test_a_larger_computation_makes_residents_leave_at_once(device: FakeDevice) -> None:
    seconds = [COPY_S] * LAYERS
    model = managed(device, seconds, PREPARING, limit_for(LAYERS * NBYTES + 2 * NBYTES))
    model(X)
    assert all(layer._owner().resident for layer in model)
    model[3].also = 4 * 1000
    model[3].offload()  # otherwise nothing of the engine runs: whoever is resident is called directly
    model(X)
    assert [layer._owner().resident for layer in model].count(True) <= LAYERS - 4
    device.peak_nbytes = device.used_nbytes
    for _ in range(2):
        assert torch.equal(model(X), expected(seconds))
    assert device.peak_nbytes <= LAYERS * NBYTES + 2 * NBYTES


def two(device: FakeDevice, config: dict[str, Any], layers: int) -> tuple[Any, Any]:
    """Return two models that share the room for so many layers."""
    limit, seconds = limit_for(layers * NBYTES), [COPY_S] * LAYERS
    first, second = (managed(device, seconds, config, limit) for _ in range(2))
    with_own_budget(first, second)
    return first, second


@pytest.mark.parametrize("layers", [13, 14, 15, 15.5])
def test_models_in_turns_do_not_make_each_other_leave_for_ever(device: FakeDevice, layers: float) -> None:
    first, second = (managed(device, [COPY_S] * 8, PREPARING, limit_for(int(layers * NBYTES))) for _ in "ab")
    with_own_budget(first, second)
    copied = []
    for _ in range(20):
        before = device.copied_nbytes
        assert torch.equal(first(X), expected([COPY_S] * 8))
        assert torch.equal(second(X), expected([COPY_S] * 8))
        copied.append((device.copied_nbytes - before) // NBYTES)
    assert max(copied[10:]) <= 16 - int(layers) + 3, copied  # two must find room to pass, and one tells


def test_a_model_that_was_never_called_makes_room(device: FakeDevice) -> None:
    first, second = two(device, PREPARING, 10)
    for layer in first:
        layer.preparing()
    assert any(resident(first))
    for _ in range(4):
        assert torch.equal(second(X), expected([COPY_S] * LAYERS))
    assert not any(resident(first))
    assert any(resident(second))


def resident(model: Any) -> list[bool]:
    return [layer._owner().resident for layer in model]


def test_a_model_whose_turn_is_over_does_not_keep_another_one_from_fetching_ahead(device: FakeDevice) -> None:
    first, second = two(device, DISK, 3)
    for model in (first, second):
        for _ in range(3):
            model(X)
        assert seconds_of_a_forward(device, model) < 1.15 * LAYERS * COPY_S
    assert device.peak_nbytes <= 3 * NBYTES


def test_residents_of_a_model_whose_turn_is_over_leave(device: FakeDevice) -> None:
    first, second = two(device, PREPARING, 8)
    for _ in range(3):
        first(X)
    stayed = sum(resident(first))
    assert stayed
    second(X)
    assert sum(resident(first)) == stayed  # it may be a turn of one forward
    for _ in range(2):
        second(X)
    assert sum(resident(second)) == stayed
    assert not any(resident(first))
    assert torch.equal(first(X), expected([COPY_S] * LAYERS))
    assert device.peak_nbytes <= 8 * NBYTES


def test_models_that_take_turns_in_each_step_keep_what_they_have(device: FakeDevice) -> None:
    first, second = two(device, PREPARING, 8)
    for _ in range(2):
        first(X)
    stayed = resident(first)
    for _ in range(4):
        second(X)
        first(X)
    assert resident(first) == stayed


def test_idle_models_leave_no_more_than_is_needed(device: FakeDevice) -> None:
    first, second = two(device, PREPARING, LAYERS + LAYERS // 2 + 6)
    for _ in range(3):
        first(X)
    assert all(resident(first))
    for layer in list(second)[LAYERS // 2 :]:
        layer.offload()
    half = second[: LAYERS // 2]
    for _ in range(3):
        half(X)
    assert all(resident(half))
    assert any(resident(first))


def test_memory_that_is_too_small_for_one_layer() -> None:
    with FakeDevice(nbytes=NBYTES - 1).installed() as device:
        model = managed(device, [COPY_S], DISK, None)
        with pytest.raises(BudgetExceededError, match=r'bringing the weights of layer "0".*4000 bytes asked'):
            model(X)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_weights_are_read_to_where_they_cross_from(device: FakeDevice, stored: torch.dtype) -> None:
    seconds = [COPY_S] * LAYERS
    model = plain(device, seconds)
    source = Filling({name: tensor.to(stored) for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: tensor.float() for name, tensor in source.items()})
    right = model(X)
    model = managed(device, seconds, DISK, None, source=source)
    source.reads.clear()
    assert torch.equal(model(X), right)
    assert source.filled == []  # in which dtype the source gives a weight is not known before it did
    before = device.copied_nbytes
    for _ in range(2):
        assert torch.equal(model(X), right)
    model[0]._owner().schedule.prefetcher.settle()  # it is ahead already: in the next forward
    assert source.filled[: 2 * LAYERS] == [f"{i}.weight" for i in range(LAYERS)] * 2
    assert source.reads == [f"{i}.weight" for i in range(LAYERS)]
    # as they are stored, not as they are computed with
    assert device.copied_nbytes - before == len(source.filled) * 1000 * stored.itemsize


def test_a_disk_that_fails_while_it_fills(device: FakeDevice) -> None:
    seconds = [COPY_S] * LAYERS
    source = Filling(plain(device, seconds).state_dict())
    model = managed(device, seconds, DISK, None, source=source)
    model(X)
    source.failing.add("5.weight")
    with pytest.raises(OSError, match=r"5\.weight: the disk is gone"):
        model(X)
    source.failing.clear()
    assert torch.equal(model(X), expected(seconds))


def test_tied_weights_are_filled_under_the_name_that_is_stored(device: FakeDevice) -> None:
    seconds = [COPY_S] * LAYERS
    model = plain(device, seconds)
    model[3].weight = model[1].weight
    stored = model.state_dict()
    del stored["3.weight"]
    source = Filling(stored)
    right = model(X)
    enable_vram_management(model, {Layer: AutoWrappedModule}, DISK, None, source)
    for _ in range(3):
        assert torch.equal(model(X), right)
    assert "3.weight" not in source.filled
    assert "1.weight" in source.filled
