"""One call: all modules with parameters are managed, within the memory that was given, and given back."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    ConfigError,
    MissingTensorError,
    Offloaded,
    Rates,
    ShapeMismatchError,
    State,
    disable_vram_management,
    offload,
    plan,
    reset_counters,
)
from offload_layers._budget import budget_of
from offload_layers._find import find_layers
from offload_layers._manage import nbytes_on
from offload_layers.testing import CountingSource, FakeDevice, assert_invariants, residencies, with_own_budget
from torch import Tensor, nn

WIDTH = 32


class Attention(nn.Module):
    """Own parameters, a child that its parent reads, and a buffer of a module without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.inner = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.rotary = Rotary()

    def forward(self, x: Tensor) -> Tensor:
        x = self.rotary(x) * self.scale
        return self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(float(WIDTH)) / WIDTH, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table.cos()


def block() -> nn.Module:
    up, down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
    return nn.Sequential(nn.LayerNorm(WIDTH), up, nn.GELU(), down)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.rand(WIDTH))
        self.embedding = nn.Embedding(50, WIDTH)
        self.attention = Attention()
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
            )
            for _ in range(3)
        )
        self.batch = nn.BatchNorm1d(5)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.attention(self.embedding(ids) + self.token)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.lstm(self.batch(self.norm(x)))[0])  # type: ignore[no-any-return]


IDS = torch.arange(10).view(2, 5)


def plain() -> Net:
    torch.manual_seed(0)
    net = Net()
    nn.init.uniform_(net.batch.running_mean)  # a persistent buffer
    return net.eval().requires_grad_(False)


def skeleton() -> Net:
    net = plain()
    nn.init.zeros_(net.batch.running_mean)
    ties: dict[nn.Parameter, nn.Parameter] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                meta = ties.setdefault(parameter, nn.Parameter(parameter.to("meta"), requires_grad=False))
                module._parameters[name] = meta
    net.lstm._flat_weights = [getattr(net.lstm, name) for name in net.lstm._flat_weights_names]
    return net


def checkpoint() -> CountingSource:
    return CountingSource(plain().state_dict())


def least() -> int:
    """Return what the largest layer takes, with what the model itself holds around it."""
    net = plain()
    return net.token.nbytes + sum(p.nbytes for p in net.lstm.parameters())


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_parameter_belongs_to_one_layer() -> None:
    net = plain()
    faces = {found.name: found.face for found in find_layers(net)}
    assert faces[""] is AutoWrappedNonRecurseModule
    assert faces["attention"] is AutoWrappedNonRecurseModule
    assert faces["attention.inner"] is AutoWrappedModule
    assert faces["norm"] is AutoWrappedModule  # with its parametrization
    assert faces["blocks.0.1"] is AutoWrappedLinear
    assert faces["lstm"] is AutoWrappedModule
    assert "attention.rotary" not in faces
    owned = [id(p) for found in find_layers(net) for p in found.parameters()]
    assert set(owned) == {id(p) for p in net.parameters()}
    assert len(owned) == len(set(owned)) + 1  # the tied one, by both


@pytest.mark.parametrize(("ram", "trims"), [("1GB", 1), (40_000, 0)], ids=["in memory", "on disk"])
def test_a_source_gives_back_memory_once_nothing_is_left_to_be_read(ram: str | int, trims: int) -> None:
    class Trimmed(CountingSource):
        trims = 0

        def trim(self) -> None:
            self.trims += 1

    state = plain().state_dict()
    del state["head.weight"]  # tied: the source is extended by that name
    source = Trimmed(state)
    handle = offload(skeleton(), device="cpu", ram=ram, source=source)
    assert source.trims == trims
    assert torch.equal(handle(IDS), plain()(IDS))


@pytest.mark.parametrize("ram", ["1GB", 120_000, 40_000])
def test_results_are_those_of_the_plain_model(ram: str | int) -> None:
    handle = offload(skeleton(), device="cpu", ram=ram, source=checkpoint())
    for _ in range(3):
        assert torch.equal(handle(IDS), plain()(IDS))
        assert torch.equal(handle.model(IDS), plain()(IDS))
    assert_invariants(handle.model)
    handle.offload()
    assert torch.equal(handle(IDS), plain()(IDS))


def test_as_much_stays_as_fits() -> None:
    source = checkpoint()
    handle = offload(skeleton(), device="cpu", ram="1GB", source=source)
    handle(IDS)
    source.reads.clear()
    handle(IDS)
    assert source.reads == []
    assert all(r.state is State.PREPARING for r in residencies(handle.model))
    small = offload(skeleton(), device="cpu", ram=least(), source=checkpoint())
    small(IDS)
    assert sum(r.leased_nbytes for r in residencies(small.model)) <= least()


def test_without_a_source_weights_stay_in_memory() -> None:
    net = plain()
    weight = net.blocks[0][1].weight
    handle = offload(net, device="cpu", ram="1GB")
    assert torch.equal(handle(IDS), plain()(IDS))
    assert net.blocks[0][1].weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("ram", range(24_000, 48_000, 4000))
@pytest.mark.parametrize("in_source", [0, 3, 6])
@pytest.mark.parametrize("storage_dtype", [None, torch.float16, torch.float8_e4m3fn], ids=str)
def test_what_rests_and_what_is_copied_are_in_the_given_memory(
    ram: int, in_source: int, storage_dtype: torch.dtype | None
) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    source = CountingSource({k: v for k, v in model.state_dict().items() if int(k[0]) < in_source})
    try:
        offload(model, device="cpu", ram=ram, source=source, dtype=torch.float32, storage_dtype=storage_dtype)
    except ConfigError:
        assert ram < 6 * (WIDTH + 1) * WIDTH * 4  # the whole model would fit
        return
    held: list[int] = []

    def count(*_: object) -> None:
        layers = residencies(model)
        homes = [home for layer in layers for home in layer._tiers.homes if not home.is_meta]
        held.append(sum(home.nbytes for home in homes) + sum(layer.leased_nbytes for layer in layers))

    for layer in model:
        layer.register_forward_pre_hook(count)
        layer.register_forward_hook(count)
    for _ in range(3):
        model(torch.zeros(1, WIDTH))
    assert max(held) <= ram


def test_what_is_fetched_ahead_is_used_where_gradients_are_recorded() -> None:
    """Weights on disk get none, so that the copies are the same."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    one = WIDTH * (WIDTH + 1) * 4
    source = CountingSource(model.state_dict())
    handle = offload(model, device="cpu", ram=3 * one, source=source)
    for layer in model:  # what a reader has not begun is done by the layer itself
        settle = layer._owner().schedule.prefetcher.settle
        layer.register_forward_pre_hook(lambda *_, settle=settle: settle())
    x = torch.zeros(1, WIDTH, requires_grad=True)
    with torch.enable_grad():
        for _ in range(3):
            model(x)
        source.reads.clear()
        reset_counters(model)
        model(x).sum().backward()
    handle.offload()  # what was fetched for the next forward is dropped
    report = handle.report().report
    assert report.peak_nbytes <= 3 * one
    assert len(source.reads) < 2 * len(source)
    assert report.total.hits + report.total.waits > 0
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_in_memory_need_no_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_layers._offload.available_ram", lambda: 1000)
    held = (
        sum(p.nbytes for layer in find_layers(plain()) for p in layer.parameters())
        - plain().head.weight.nbytes
    )
    rates = Rates(1e9, 1e9, 1e9, 1e9)
    assert offload(plain(), device="cpu").plan.ram == held + 800
    assert plan(plain(), device="cpu", rates=rates).ram == held + 800
    assert plan(skeleton(), device="cpu", rates=rates, ram="1MB").ram == 1_000_000
    with pytest.raises(ConfigError, match="but ram is 800 B"):
        plan(skeleton(), device="cpu", rates=rates, source=checkpoint())


def test_another_dtype_to_compute_in() -> None:
    net, oracle = skeleton(), plain()
    handle = offload(net.blocks, device="cpu", ram="1GB", source=_part("blocks."), dtype=torch.float64)
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    assert torch.equal(handle.model[0](x), oracle.blocks[0].double()(x))
    small = offload(skeleton().blocks, device="cpu", ram=9000, source=_part("blocks."), dtype=torch.bfloat16)
    assert torch.equal(small.model[1](x.bfloat16()), plain().blocks[1].bfloat16()(x.bfloat16()))


def _part(prefix: str) -> CountingSource:
    tensors = plain().state_dict()
    return CountingSource({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def test_given_back_plain() -> None:
    net = skeleton()
    with offload(net, device="cpu", ram="40kB", source=checkpoint()) as handle:
        assert isinstance(net.head, AutoTorchModule)
        assert repr(handle) == "<Offloaded Net: 17 layers on cpu>"
        handle(IDS)
    assert type(net.head) is nn.Linear
    assert type(net) is Net
    assert net.head.weight is net.embedding.weight
    assert torch.equal(net(IDS), plain()(IDS))
    assert torch.equal(copy.deepcopy(net)(IDS), plain()(IDS))
    assert repr(handle) == "<Offloaded Net: given back>"
    with pytest.raises(ConfigError, match="Net was given back"):
        handle.offload()
    assert handle.remove() is net


def under_one_name() -> CountingSource:
    """Return a checkpoint that has the embedding, which is the head as well, once."""
    return CountingSource({name: t for name, t in plain().state_dict().items() if name != "head.weight"})


@pytest.mark.parametrize("less", [0, 1])
def test_what_layers_share_takes_memory_once(less: int) -> None:
    net = plain()
    nbytes = sum(p.nbytes for p in net.parameters())
    handle = offload(skeleton(), device="cpu", ram=nbytes - less, source=under_one_name())
    budget = with_own_budget(handle.model)
    for _ in range(3):
        assert torch.equal(handle(IDS), net(IDS))
    layers = residencies(handle.model)
    assert all(layer.resident for layer in layers) == (not less)
    assert budget.statistics().peak_nbytes <= handle.plan.peak_device_nbytes <= nbytes - less
    handle.offload()
    assert_invariants(handle.model, budget)


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_copy_that_layers_share_is_paid_for_until_the_last_one_leaves(first: str) -> None:
    handle = offload(skeleton(), device="cpu", ram="1GB", source=under_one_name())
    budget = with_own_budget(handle.model)
    handle(IDS)
    layers = {layer.name: layer for layer in residencies(handle.model)}
    nbytes, everything = plain().head.weight.nbytes, budget.statistics().lent_nbytes
    assert everything == sum(p.nbytes for p in handle.model.parameters())
    assert layers[first].try_demote()
    assert budget.statistics().lent_nbytes == everything
    assert_invariants(handle.model, budget)
    for name in {"embedding", "head"} - {first}:
        assert layers[name].try_demote()
    assert budget.statistics().lent_nbytes == everything - nbytes
    assert_invariants(handle.model, budget)
    assert torch.equal(handle(IDS), plain()(IDS))
    assert budget.statistics().lent_nbytes == everything


def test_another_amount_while_it_runs() -> None:
    handle = offload(skeleton(), device="cpu", ram="1GB", source=checkpoint())
    handle(IDS)
    handle.set_vram(least())
    handle.offload()
    assert torch.equal(handle(IDS), plain()(IDS))
    assert sum(r.leased_nbytes for r in residencies(handle.model)) <= least()
    handle.set_vram("1GB")
    handle(IDS)
    assert all(r.state is State.PREPARING for r in residencies(handle.model))


def test_two_models_share_one_memory() -> None:
    first = offload(skeleton(), device="cpu", ram=90_000, source=checkpoint())
    second = offload(skeleton(), device="cpu", ram=90_000, source=checkpoint())
    for handle in (first, second, first):
        assert torch.equal(handle(IDS), plain()(IDS))
    held = [sum(r.leased_nbytes for r in residencies(h.model)) for h in (first, second)]
    assert sum(held) <= 90_000
    first.offload()
    for _ in range(2):
        second(IDS)
    assert sum(r.leased_nbytes for r in residencies(first.model)) == 0
    assert sum(r.leased_nbytes for r in residencies(second.model)) >= held[1]


@pytest.mark.parametrize("ram", [40_000, 60_000, 80_000, 100_000])
def test_models_in_turns_stay_under_their_limit(ram: int) -> None:
    """What one has fetched ahead for its next forward makes room while the other computes."""
    handles = [offload(skeleton(), device="cpu", ram=ram, source=checkpoint()) for _ in range(2)]
    reset_counters(handles[0].model)
    for _ in range(4):
        for handle in handles:
            assert torch.equal(handle(IDS), plain()(IDS))
    assert handles[0].report().report.peak_nbytes <= ram


def test_copies_are_ahead_on_a_device_with_a_bus() -> None:
    with FakeDevice(bytes_per_s=1e6).installed() as device:
        handle = offload(skeleton(), device="cpu", ram=100_000, source=checkpoint())
        for _ in range(3):
            assert torch.equal(handle(IDS), plain()(IDS))
        assert device.peak_nbytes <= 100_000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"ram": 100},
            ConfigError,
            '"lstm" with the layers around it needs 33.9 kB on cpu while it computes, but ram is 100 B. Give',
        ),
        ({"ram": "1G"}, ConfigError, "ram='1G' has the unknown unit"),
        ({"dtype": "bf16"}, ConfigError, "dtype must be a torch.dtype or None; got 'bf16'"),
        ({"device": "disk"}, ConfigError, "'disk' is no device"),
        ({"storage_dtype": torch.float8_e4m3fn}, ConfigError, "needs a dtype to compute in"),
        ({"source": None}, MissingTensorError, 'parameter "token" has no values'),
        ({"source": {}}, MissingTensorError, 'the disk map has no tensor "token"'),
    ],
    ids=["too little", "unit", "dtype", "device", "storage", "no source", "empty source"],
)
def test_refused_with_nothing_changed(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = skeleton()
    before = {name: id(parameter) for name, parameter in net.named_parameters()}
    with pytest.raises(error, match=message):
        offload(net, **{"device": "cpu", "ram": "1GB", "source": checkpoint()} | arguments)
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == before
    assert not any(isinstance(module, AutoTorchModule) for module in net.modules())


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.rotary = nn.Linear(4, 4), nn.BatchNorm1d(4), Rotary()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))  # type: ignore[no-any-return]


def test_a_buffer_of_another_shape_is_refused() -> None:
    model, state = Normalised(), Normalised().state_dict()
    state["norm.running_mean"] = torch.zeros(7)
    with pytest.raises(ShapeMismatchError, match=r'tensor "norm\.running_mean" has shape \(7,\)'):
        offload(model, device="cpu", ram="1MB", source=state)
    assert type(model.layer) is nn.Linear
    assert model.norm.running_mean.shape == (4,)


@pytest.mark.parametrize(
    "missing", ["norm.running_mean", "rotary.table"], ids=["persistent", "not persistent"]
)
def test_a_buffer_without_values_is_refused(missing: str) -> None:
    model, state = Normalised(), Normalised().state_dict()
    name, _, key = missing.partition(".")
    buffers = getattr(model, name)._buffers
    buffers[key] = buffers[key].to("meta")
    state.pop(missing, None)
    with pytest.raises(MissingTensorError, match=f'buffer "{missing}" has no values, and no source gives'):
        offload(model, device="cpu", ram="1MB", source=state)
    assert type(model.layer) is nn.Linear


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = skeleton()
    before = {name: id(parameter) for name, parameter in net.named_parameters()}
    source = checkpoint()

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr("offload_layers._offload.load_unmanaged", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        offload(net, device="cpu", ram="1GB", source=source)
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == before
    assert type(net) is Net
    assert not [name for name in source.reads if name.endswith(("weight", "bias"))]


def test_weights_that_cannot_be_brought_to_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, source = skeleton(), checkpoint()
    net.__class__ = Library
    before = {name: id(parameter) for name, parameter in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def onload(handle: Offloaded) -> None:
        for layer in handle._managed():
            layer.preparing()
        raise OSError("the disk is gone")

    monkeypatch.setattr(Offloaded, "onload", onload)
    with pytest.raises(OSError, match="the disk is gone"):
        offload(net, device="cpu", ram="1GB", source=source)
    monkeypatch.undo()
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == before
    assert all(buffers[name] is buffer for name, buffer in net.named_buffers())
    assert type(net) is Library
    assert type(net.head) is nn.Linear
    gc.collect()
    assert torch.equal(offload(net, device="cpu", ram="1GB", source=source)(IDS), plain()(IDS))


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_may_give_the_model_back(register: str) -> None:
    oracle = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model, x = copy.deepcopy(oracle), torch.rand(1, 4)
    handle = offload(model, device="cpu", ram="1kB", source=oracle.state_dict())
    for layer in model:
        getattr(layer, register)(lambda *_: handle.remove() and None)
    assert torch.equal(model(x), oracle(x))
    assert [type(layer) for layer in model] == [nn.Linear, nn.LayerNorm, nn.Linear]


@pytest.mark.parametrize("name", ["token", "lstm.weight_ih_l0", "batch.running_mean"])
def test_what_is_no_tensor_is_refused(name: str) -> None:
    source: Any = dict(checkpoint().items())
    source[name] = {"values": source[name]}
    with pytest.raises(MissingTensorError, match=f'gives a dict for "{name}", where a tensor is needed'):
        offload(skeleton(), device="cpu", ram="1GB", source=source)(IDS)


def test_the_weights_that_a_model_has_on_a_device() -> None:
    tied = nn.Linear(10, 10, device="meta")
    tied.more = tied.weight
    assert nbytes_on(tied, torch.device("meta")) == 440
    assert nbytes_on(tied, torch.device("cpu")) == 0


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_managed_models_are_refused() -> None:
    handle = offload(skeleton(), device="cpu", ram="1GB", source=checkpoint())
    assert isinstance(handle, Offloaded)
    with pytest.raises(ConfigError, match='layer "" of Net is managed already; give it back first'):
        offload(handle.model, device="cpu", ram="1GB")
    with pytest.raises(ConfigError, match="Identity has no parameters to manage"):
        offload(nn.Identity(), device="cpu", ram="1GB")
    with pytest.raises(ConfigError, match=r'parameter "0\.weight" has no shape yet; run the model once'):
        offload(nn.Sequential(nn.LazyLinear(2)), device="cpu")
    with pytest.raises(ConfigError, match=r"offload manages a torch\.nn\.Module; got int"):
        offload(3, device="cpu")  # type: ignore[arg-type]


class Library(Net):
    """As the models of diffusers and transformers, it tells its device by a parameter."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def test_the_model_says_where_it_computes() -> None:
    net, oracle = skeleton(), plain()
    net.norm = oracle.norm = nn.Identity()  # type: ignore[assignment]  # torch pickles no parametrizations
    net.__class__ = Library
    handle = offload(net, device="cpu", ram="40kB", source=checkpoint())
    assert next(net.parameters()).is_meta
    assert handle.model.device == torch.device("cpu")
    assert isinstance(net, Library)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(IDS), oracle(IDS))
    restored = pickle.loads(pickle.dumps(net))
    assert type(restored) is Library
    assert torch.equal(restored(IDS), oracle(IDS))
    assert torch.equal(net(IDS), oracle(IDS))
    assert handle.remove() is net
    assert type(net) is Library
    assert torch.equal(net(IDS), oracle(IDS))


def test_a_model_that_cannot_be_given_back_there_is_managed_as_before() -> None:
    net = skeleton()
    net.__class__ = Library
    handle = offload(net, device="cpu", ram="40kB", source=checkpoint())
    with pytest.raises(ConfigError, match="device 'nowhere' is no device"):
        handle.remove("nowhere")
    assert net.device == torch.device("cpu")  # type: ignore[comparison-overlap]
    assert torch.equal(handle(IDS), plain()(IDS))
    assert type(handle.remove("cpu")) is Library


def test_a_source_that_fails_while_a_model_is_given_back() -> None:
    net, source = skeleton(), checkpoint()
    net.__class__ = Library
    handle = offload(net, device="cpu", ram="40kB", source=source)
    source.failing.add("token")
    with pytest.raises(OSError, match="the disk is gone"):
        handle.remove()
    assert net.device == torch.device("cpu")  # type: ignore[comparison-overlap]
    source.failing.clear()
    assert torch.equal(handle.remove()(IDS), plain()(IDS))
    assert type(net) is Library


def test_a_copy_of_the_handle_is_of_a_copy_of_the_model() -> None:
    handle = offload(Normalised(), device="cpu", ram="1MB", source=Normalised().state_dict())
    twin = copy.deepcopy(handle)
    handle.remove()
    twin.set_vram(200)
    twin.offload()
    twin.onload()
    assert [layer.vram_limit for layer in twin.model.modules() if isinstance(layer, AutoTorchModule)] == [
        200 / 2**30,
        200 / 2**30,
    ]
    assert twin.report().report.limit_nbytes == 200
    twin.remove()


def test_a_model_that_was_given_back_past_its_handle() -> None:
    handle = offload(Normalised(), device="cpu", ram="1MB")
    disable_vram_management(handle.model)
    with pytest.raises(ConfigError, match="Normalised was given back"):
        handle.report()
    assert handle.remove() is handle.model


@pytest.mark.parametrize("ram", ["1GB", 120_000, 40_000])
def test_the_handle_checks_itself(ram: str | int) -> None:
    source = checkpoint()
    handle = offload(skeleton(), device="cpu", ram=ram, source=source)
    for _ in range(2):
        found = handle.verify(IDS)
        assert found.is_equal, found
        assert found.unchecked == ()
    handle.remove()
    with pytest.raises(ConfigError, match="Net was given back"):
        handle.verify(IDS)


def test_nothing_is_left_of_a_model_that_is_gone() -> None:
    """Not even of a layer whose class was made for it alone, as torch does to parametrize it."""
    books = budget_of(torch.device("cpu"))
    gc.collect()
    before = books.statistics().lent_nbytes
    handle = offload(skeleton(), device="cpu", ram=40_000, source=checkpoint())
    handle(IDS)
    layers = [weakref.ref(module) for module in handle.model.modules()]
    del handle
    gc.collect()
    assert [layer() for layer in layers if layer() is not None] == []
    assert books.statistics().lent_nbytes == before


def test_prediction_beside_fact() -> None:
    rates = Rates(disk_bytes_per_s=1e9, bus_bytes_per_s=1e9, memory_bytes_per_s=1e9, flops=1e9)
    handle = offload(skeleton(), device="cpu", ram="100kB", source=checkpoint(), rows=10, rates=rates)
    assert "none was run through the handle yet" in str(handle.report())
    reset_counters(handle.model)  # the peak is that of all models since the process began
    for _ in range(3):
        handle(IDS)
    fact = handle.report()
    assert fact.report.peak_nbytes <= 100_000
    prediction = fact.plan.predict()
    assert prediction is not None
    assert fact.forward_s is not None
    assert fact.forward_s > 0
    assert fact.report.limit_nbytes == 100_000
    text = str(fact)
    assert f"predicted {prediction.total_s:.3g} s, the last one took {fact.forward_s:.3g} s" in text
    assert fact.report.peak_nbytes <= fact.plan.peak_device_nbytes
    assert "peak on cpu: predicted 100 kB, was " in text
    assert fact.to_dict()["plan"]["prediction"]["total_s"] == prediction.total_s
    more = fact.with_rows(1000).plan.predict()
    assert more is not None
    assert more.total_s > prediction.total_s
    handle.remove()
    with pytest.raises(ConfigError, match="Net was given back"):
        handle.report()
