"""Views of memory that a source has mapped are kept between computations, and renewed for each."""

import copy
import gc
import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, enable_vram_management
from offload_layers._budget import budget_of
from offload_layers.testing import CountingSource, assert_invariants, residencies, with_own_budget
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, LAYERS = 8, 3
NBYTES = WIDTH * (WIDTH + 1) * 4
CPU = torch.device("cpu")


class MappedSource(CountingSource):
    """Gives its own tensors, can be told beforehand, and renews what it has given."""

    def __init__(self, tensors: Mapping[str, Tensor], *, lasts: bool = True) -> None:
        super().__init__(tensors)
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.lasts = lasts
        self.failure: Exception | None = None
        self.asked: list[str] = []
        self.renewed: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        super().__getitem__(name)
        return self.tensors[name].detach()

    def info(self, name: str) -> Tensor:
        return self.tensors[name]  # has dtype and shape

    def prefetch(self, names: Iterable[str]) -> None:
        self.asked += names

    def renew(self, names: Iterable[str]) -> bool:
        if self.failure is not None:
            raise self.failure
        self.renewed += names
        return self.lasts


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def on_disk(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for role in ("offload", "onload", "preparing"):
        config |= {f"{role}_dtype": "disk", f"{role}_device": "disk"}
    return config | {"computation_dtype": dtype, "computation_device": "cpu"}


def manage(source: Mapping[str, Tensor], **options: Any) -> Any:
    config = on_disk(options.pop("dtype", torch.float32))
    return enable_vram_management(
        plain(), {nn.Linear: AutoWrappedLinear}, config, options.pop("vram_limit", None), source
    )


@pytest.fixture(autouse=True)
def _every_layer_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copies are kept because they are small."""
    monkeypatch.setattr("offload_layers._schedule.KEPT_NBYTES", -1)


@pytest.fixture
def source() -> MappedSource:
    return MappedSource(plain().state_dict())


@pytest.fixture
def model(source: MappedSource) -> Any:
    model = manage(source)
    with torch.no_grad():
        for _ in range(2):
            model(X)
    source.reads.clear()
    return model


X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def used(model: Any) -> list[Tensor]:
    """Return the weights that the layers compute with."""
    seen: list[Tensor] = []
    for residency in residencies(model):
        residency.enter()
        seen += [weight.held for weight in residency.weights]
        residency.leave()
    return seen


def test_views_are_made_once_and_renewed_for_each_computation(model: Any, source: MappedSource) -> None:
    first = used(model)
    source.renewed.clear()
    source.asked.clear()
    assert torch.equal(model(X), plain()(X))
    assert source.reads == []
    assert sorted(source.renewed) == sorted(source)
    assert set(source.asked) == set(source)  # as if they were read each time: pages may have gone
    assert all(a is b for a, b in zip(first, used(model), strict=True))
    assert_invariants(model)


def read_by_the_first_layer(model: Any, source: CountingSource) -> list[str]:
    """Return what has been read when the first layer of a forward has computed, each as often as it was."""
    found: list[list[str]] = []
    handle = model[0].register_forward_hook(lambda *_: found.append(list(source.reads)))
    assert torch.equal(model(X), plain()(X))
    handle.remove()
    return found[0]


def test_all_views_are_made_before_there_are_many_activations(source: MappedSource) -> None:
    model = manage(source)
    assert sorted(read_by_the_first_layer(model, source)) == sorted(source)
    assert sorted(source.reads) == sorted(source)  # and none again
    assert_invariants(model)


def test_what_will_be_no_view_is_not_read_beforehand() -> None:
    own = ["0.bias", "0.weight"]
    source = MappedSource(plain().state_dict(), lasts=False)
    assert sorted(read_by_the_first_layer(manage(source), source)) == own
    source = MappedSource(plain().state_dict())
    model = manage(source)
    model[1].computation_dtype = torch.float64
    model[2].load_state_dict(plain()[2].state_dict())  # from now on in memory
    with pytest.raises(RuntimeError, match="dtype"):
        model(X)
    assert sorted(source.reads) == sorted([*own, "1.bias", "1.weight"])


def test_small_copies_are_kept_before_there_are_many_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_layers._schedule.KEPT_NBYTES", 1 << 20)
    monkeypatch.setattr("offload_layers._schedule.KEPT_SHARE", 1.0)
    source = CountingSource(plain().state_dict())
    model = manage(source, vram_limit=10 * NBYTES / 2**30)
    assert sorted(read_by_the_first_layer(model, source)) == sorted(source)
    source.failing |= set(source)
    assert torch.equal(model(X), plain()(X))
    assert_invariants(model)


def test_copies_for_which_there_is_no_room_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_layers._schedule.KEPT_NBYTES", 1 << 20)
    monkeypatch.setattr("offload_layers._schedule.KEPT_SHARE", 1.0)
    source = CountingSource(plain().state_dict())
    model = manage(source, vram_limit=2 * NBYTES / 2**30)  # two pass through, and nothing is to stay
    assert sorted(read_by_the_first_layer(model, source)) == ["0.bias", "0.weight"]
    assert_invariants(model)


def test_a_view_that_cannot_be_made_yet_fails_only_its_own_layer(source: MappedSource) -> None:
    model = manage(source)
    source.failing.add("2.weight")
    assert model[0](X).shape == X.shape
    with pytest.raises(OSError, match=r"2\.weight: the disk is gone"):
        model(X)
    source.failing.clear()
    assert torch.equal(model(X), plain()(X))
    assert_invariants(model)


def test_what_is_kept_is_not_borrowed(source: MappedSource) -> None:
    model = manage(source, vram_limit=2.5 * NBYTES / 2**30)
    for _ in range(3):
        model(X)
    assert [layer.leased_nbytes for layer in residencies(model)] == LAYERS * [0]
    during: list[int] = []
    for layer in model:
        layer.register_forward_hook(
            lambda *_: during.append(sum(r.leased_nbytes for r in residencies(model)))
        )
    model(X)
    assert max(during) <= 2.5 * NBYTES
    assert source.reads != []


@pytest.mark.parametrize("options", [{"lasts": False}, {"dtype": torch.bfloat16}], ids=str)
def test_what_may_not_be_kept_is_read_each_time(options: dict[str, Any]) -> None:
    dtype = options.pop("dtype", torch.float32)
    source = MappedSource(plain().state_dict(), **options)
    model = manage(source, dtype=dtype)
    x = X.to(dtype)
    for _ in range(3):
        source.reads.clear()
        assert torch.equal(model(x), plain().to(dtype)(x))
        assert sorted(source.reads) == sorted(source)


def test_a_source_that_cannot_renew_is_read_each_time() -> None:
    class Asked(CountingSource):
        def prefetch(self, names: Iterable[str]) -> None: ...

    source = Asked(plain().state_dict())
    model = manage(source)
    for _ in range(3):
        source.reads.clear()
        model(X)
        assert sorted(source.reads) == sorted(source)


def test_a_source_may_end_what_it_has_lent(model: Any, source: MappedSource) -> None:
    source.lasts = False
    for name in source:
        source.tensors[name] = source.tensors[name] + 1
    expected = plain()
    expected.load_state_dict(source.tensors)
    assert torch.equal(model(X), expected(X))
    assert sorted(source.reads) == sorted(source)


def test_a_source_that_finds_its_file_changed_fails_the_forward(model: Any, source: MappedSource) -> None:
    source.failure = RuntimeError("the file has changed")
    with pytest.raises(RuntimeError, match="the file has changed"):
        model(X)
    assert_invariants(model)
    assert sum(layer.leased_nbytes for layer in residencies(model)) == 0
    source.failure = None
    assert torch.equal(model(X), plain()(X))


def test_what_is_written_during_a_computation_is_kept(model: Any, source: MappedSource) -> None:
    residency = residencies(model)[1]
    residency.enter()
    residency.weights[1].held.add_(1)
    residency.leave()
    expected = plain()
    expected[1].bias.add_(1)
    for _ in range(2):
        assert torch.equal(model(X), expected(X))
    assert torch.equal(model.state_dict()["1.bias"], expected[1].bias)
    assert "1.bias" not in source.reads


def test_another_source_is_read(model: Any) -> None:
    torch.manual_seed(1)
    other = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    for residency in residencies(model):
        residency.source = MappedSource(other.state_dict())
    for _ in range(2):
        assert torch.equal(model(X), other(X))


def test_another_computation_is_fetched_for(model: Any, source: MappedSource) -> None:
    budget = budget_of(CPU)
    for layer in model:
        layer.computation_dtype = torch.float64
    budget.reset_peak()
    x = X.double()
    for _ in range(2):
        assert torch.equal(model(x), plain().double()(x))
    assert budget.statistics().peak_nbytes >= 2 * NBYTES
    for layer in model:
        layer.computation_dtype = torch.float32
    assert torch.equal(model(X), plain()(X))


def test_new_values_are_used(model: Any) -> None:
    expected = plain()
    for network in (model, expected):
        network[0].weight = nn.Parameter(torch.eye(WIDTH))
        network[1].load_state_dict({"weight": torch.ones(WIDTH, WIDTH), "bias": torch.zeros(WIDTH)})
    for _ in range(2):
        assert torch.equal(model(X), expected(X))


def test_gradients_are_wanted_as_the_model_says_now(model: Any) -> None:
    assert all(weight.requires_grad for weight in used(model))
    model.requires_grad_(False)
    assert not any(weight.requires_grad for weight in used(model))
    model.requires_grad_(True)
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        model(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(weight.grad is None for weight in used(model))


def test_offload_forgets_them(model: Any, source: MappedSource) -> None:
    views = [weakref.ref(view) for view in used(model[0])]
    model[0].offload()
    gc.collect()
    assert not any(view() is not None for view in views)
    model(X)
    assert sorted(source.reads) == ["0.bias", "0.weight"]


def test_a_copy_of_the_model_has_views_of_its_own(model: Any) -> None:
    twin = copy.deepcopy(model)
    twin(X)
    assert not any(a is b for a, b in zip(used(model), used(twin), strict=True))
    assert torch.equal(twin(X), model(X))


def test_a_tied_weight_is_renewed_under_the_name_that_the_source_has() -> None:
    def tied() -> nn.Sequential:
        model = plain()
        model[2].weight = model[0].weight
        return model

    state = tied().state_dict()
    del state["2.weight"]
    source = MappedSource(state)
    model: Any = enable_vram_management(tied(), {nn.Linear: AutoWrappedLinear}, on_disk(), None, source)
    for _ in range(3):
        assert torch.equal(model(X), tied()(X))
    assert set(source.renewed) == set(state)
    source.reads.clear()
    model(X)
    assert source.reads == []


def test_what_one_layer_writes_to_a_tied_weight_the_other_computes_with() -> None:
    def tied() -> nn.Sequential:
        model = plain()
        model[2].weight = model[0].weight
        return model

    source = MappedSource(tied().state_dict())
    model: Any = enable_vram_management(tied(), {nn.Linear: AutoWrappedLinear}, on_disk(), None, source)
    expected = tied()
    for _ in range(2):
        assert torch.equal(model(X), expected(X))
    first = residencies(model)[0]
    first.enter()
    first.weights[0].held.data = torch.eye(WIDTH)
    first.leave()
    with torch.no_grad():
        expected[0].weight.copy_(torch.eye(WIDTH))
    assert torch.equal(model(X), expected(X))


def test_a_weight_may_be_deleted(model: Any) -> None:
    expected = plain()
    for network in (model, expected):
        del network[1].bias
        network[1].bias = None
    assert torch.equal(model(X), expected(X))


# -- layers that stay ---------------------------------------------------------------------------------


class ReadableSource(MappedSource):
    """One that gives copies as well."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.copies = CountingSource(tensors)

    def owned(self) -> CountingSource:
        return self.copies


def deep(layers: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


def staying(source: Mapping[str, Tensor], *, room: float, **settings: Any) -> Any:
    """Manage a model of eight layers such that *room* of them stay or pass, in books of its own."""
    config = on_disk() | {"preparing_dtype": torch.float32, "preparing_device": "cpu"} | settings
    model = enable_vram_management(
        deep(), {nn.Linear: AutoWrappedLinear}, config, room * NBYTES / 1024**3, source
    )
    with_own_budget(model)
    return model


def lent(model: nn.Module, source: MappedSource) -> list[bool]:
    """Tell for each weight of the layers that stay whether it lies in memory of the source."""
    theirs = {tensor.data_ptr() for tensor in source.tensors.values()}
    layers = [residency for residency in residencies(model) if residency.resident]
    return [weight.held.data_ptr() in theirs for residency in layers for weight in residency.weights]


def test_layers_that_stay_while_others_pass_have_memory_of_their_own() -> None:
    source, x = ReadableSource(deep().state_dict()), torch.randn(2, WIDTH)
    model = staying(source, room=5)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), deep()(x))
    assert lent(model, source) == 6 * [False]
    assert len(source.copies.reads) >= 6
    assert_invariants(model, residencies(model)[0].budget)
    with torch.no_grad():
        for residency in residencies(model):
            if residency.resident:
                residency.weights[0].held.zero_()
    assert all(torch.equal(values, source.tensors[name]) for name, values in deep().state_dict().items())


@pytest.mark.parametrize("room", [8, 100, float("inf")], ids=["just enough", "more", "no limit"])
def test_a_model_that_stays_as_a_whole_is_views(room: float) -> None:
    source, x = ReadableSource(deep().state_dict()), torch.randn(2, WIDTH)
    model = staying(source, room=room)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), deep()(x))
    assert lent(model, source) == 16 * [True]
    assert not source.copies.reads


def test_a_source_that_gives_no_copies_lends_to_layers_that_stay_too() -> None:
    source = MappedSource(deep().state_dict())
    model = staying(source, room=5)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, WIDTH))
    assert lent(model, source)
    assert all(lent(model, source))


def test_all_that_stay_come_before_anyone_computes() -> None:
    source, x = ReadableSource(deep().state_dict()), torch.randn(2, WIDTH)
    model = staying(source, room=5)
    came: list[list[int]] = []
    for layer in model:
        layer.register_forward_hook(lambda *_: came[-1].append(len(source.copies.reads)))
    with torch.no_grad():
        for _ in range(3):
            came.append([])
            assert torch.equal(model(x), deep()(x))
    assert came == [8 * [0], 8 * [6], 8 * [6]]  # weights and biases of three layers, and two pass


def test_a_layer_that_cannot_be_read_to_stay_passes(caplog: pytest.LogCaptureFixture) -> None:
    source, x = ReadableSource(deep().state_dict()), torch.randn(2, WIDTH)
    model = staying(source, room=5)
    source.copies.failing.update(f"{index}.weight" for index in range(8))
    with torch.no_grad():
        model(x)
        with caplog.at_level(logging.WARNING, "offload_layers.transfer"):
            assert torch.equal(model(x), deep()(x))
        assert not lent(model, source)
        assert "could not be brought to stay, and passes" in caplog.text
        assert ".weight: the disk is gone" in caplog.text
        assert_invariants(model, residencies(model)[0].budget)
        source.copies.failing.clear()
        assert torch.equal(model(x), deep()(x))
    assert lent(model, source) == 6 * [False]
    assert_invariants(model, residencies(model)[0].budget)


def test_a_second_run_within_the_backward_pass_is_no_second_forward() -> None:
    source = ReadableSource(deep().state_dict())
    model = staying(source, room=5)
    model[0].add_lora(torch.randn(2, WIDTH, requires_grad=True), torch.zeros(WIDTH, 2, requires_grad=True))
    with torch.enable_grad():
        for forward in range(3):
            x = torch.randn(2, WIDTH, requires_grad=True)
            y = x
            for layer in model:
                y = checkpoint(layer, y, use_reentrant=False)
            before = [residency.resident for residency in residencies(model)]
            y.sum().backward()
            assert [residency.resident for residency in residencies(model)] == before
            assert any(before) == (forward > 0)
            assert x.grad is not None
