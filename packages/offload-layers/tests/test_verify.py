"""The self-check: silent where all is right, in every configuration; and it names the layer that is not."""

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    ConfigError,
    OffloadLayersError,
    VerificationError,
    enable_vram_management,
    verify,
)
from offload_layers._twin import Twin
from offload_layers.testing import CountingSource, FakeDevice, assert_invariants, residencies, with_own_budget
from torch import Tensor, nn

WIDTH = 16
RESTING = ("offload", "onload", "preparing")
DISK: dict[str, Any] = {
    **{f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")},
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}
PREPARING = DISK | {"preparing_dtype": torch.float32, "preparing_device": "cpu"}
HOST = {f"{role}_{what}": v for role in RESTING for what, v in (("dtype", torch.float32), ("device", "cpu"))}
X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


class Lying(CountingSource):
    """A source that gives wrong values once for each name in ``lies``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.state_dict())
        self.lies: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        if name in self.lies:
            self.lies.remove(name)
            tensor.view(-1)[0] += 1
        return tensor


def one(layer: nn.Module, config: dict[str, Any] = DISK, face: Any = AutoWrappedModule) -> Any:
    """A model of one managed layer, whose source lies when it is told to."""
    model = nn.Sequential(layer)
    return enable_vram_management(model, {type(layer): face}, config, None, Lying(model))


def test_all_is_right_in_every_configuration(
    make_model: Callable[[], Any],
    make_skeleton: Callable[[], Any],
    module_map: Any,
    vram_config: dict[str, object],
    plain: Any,
    x: Tensor,
) -> None:
    source = CountingSource(make_model().state_dict())
    model = enable_vram_management(make_skeleton(), module_map, vram_config, None, source).to(x.device)
    for _ in range(3):
        found = verify(model, x)
        assert found.is_equal
        assert found.differences == ()
        assert found.layers_checked == 10  # in each block norm, up, down, attention and the block itself
        assert found.unchecked == ("blocks.0.read", "blocks.1.read")  # their parents read them
        assert_invariants(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    "name",
    ["blocks.1.up.weight", "blocks.0.down.weight", "blocks.1.norm.weight", "blocks.0.attention.in_proj_bias"],
)
@pytest.mark.parametrize("warm", [False, True])
def test_a_corrupted_layer_is_found_by_name(
    make_model: Callable[[], Any], module_map: Any, disk_config: Any, x: Tensor, name: str, warm: bool
) -> None:
    source = Lying(make_model())
    model = enable_vram_management(make_model(), module_map, disk_config, 0, source).to(x.device)
    if warm:  # the reader is the one to be lied to
        model(x)
        residencies(model)[0].schedule.prefetcher.settle()  # type: ignore[union-attr]
        residencies(model)[0].schedule.forget()  # type: ignore[union-attr]
    source.lies = {name}
    found = verify(model, x)
    assert [difference.name for difference in found.differences] == [name.rpartition(".")[0]]
    assert found.differences[0].max_abs > 0
    assert found.differences[0].shape[:2] == (2, 3)
    assert not found.is_equal
    assert verify(model, x).is_equal


def test_a_corrupted_weight_beside_managed_children_is_found(
    make_model: Callable[[], Any], module_map: Any, disk_config: Any, x: Tensor
) -> None:
    source = Lying(make_model())
    model = enable_vram_management(make_model(), module_map, disk_config, 0, source).to(x.device)
    source.lies = {"blocks.1.gate"}
    found = verify(model, x)
    assert [(d.name, d.max_abs, d.shape) for d in found.differences] == [
        ("blocks.1.gate", pytest.approx(1.0, rel=1e-6), (WIDTH,))
    ]
    assert found.layers_checked == 10


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gate


class Peeking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beside = Beside()

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x * self.beside.gate)  # type: ignore[no-any-return]


def test_a_corrupted_weight_that_is_read_from_outside_is_found() -> None:
    source = Lying(Peeking())
    faces: Any = {Beside: AutoWrappedNonRecurseModule, nn.Linear: AutoWrappedLinear}
    model = enable_vram_management(Peeking(), faces, DISK, None, source)
    source.lies = {"beside.gate"}
    assert [difference.name for difference in verify(model, X).differences] == ["beside.gate"]
    assert verify(model, X).is_equal


def test_a_corrupted_resident_is_found() -> None:
    model = one(nn.Linear(WIDTH, WIDTH), PREPARING)
    model(X)
    assert verify(model, X).is_equal
    model[0].weight.data[0, 0] += 1  # which torch does not count
    assert [difference.name for difference in verify(model, X).differences] == ["0"]


def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeDevice().installed() as device:
        model = one(nn.Linear(WIDTH, WIDTH))
        model(X)
        monkeypatch.setattr(device, "wait", lambda mark: None)
        found = verify(model, X)
    assert [(d.name, d.max_abs) for d in found.differences] == [("0", float("inf"))]


class Remembering(nn.Module):
    """Writes to everything that a module can have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(WIDTH), persistent=False)
        self.norm = nn.BatchNorm1d(3)
        self.history: list[float] = []
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.history.append(float(x.sum()))
        self.last = x[0, 0].clone()
        return self.norm(x) * self.weight * self.calls + len(self.history)  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", [DISK, PREPARING, HOST | {"computation_device": "cpu"}])
def test_state_is_written_once(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, plain = one(Remembering(), config), Remembering()
    for calls in (1, 2):
        assert verify(model, X).is_equal
        plain(X)
        layer = model[0]
        assert (int(layer.calls), layer.count, layer.history) == (calls, calls, plain.history)
        for name, buffer in plain.named_buffers():
            assert torch.equal(layer.get_buffer(name), buffer), name
    assert torch.equal(model(X), plain(X))


def test_random_numbers_are_the_same_and_drawn_once() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.5, batch_first=True)
    model = one(layer)
    torch.manual_seed(5)
    model(X)
    after_a_call = torch.get_rng_state()
    torch.manual_seed(5)
    found = verify(model, X)
    assert found.is_equal
    assert torch.equal(torch.get_rng_state(), after_a_call)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_count(merged: bool) -> None:
    model = one(nn.Linear(WIDTH, WIDTH), face=AutoWrappedLinear)
    model[0].add_lora(torch.randn(2, WIDTH), torch.randn(WIDTH, 2), 0.5)
    if merged:
        model[0].merge_lora()
        model[0].add_lora(torch.randn(2, WIDTH), torch.randn(WIDTH, 2))
    source = model[0]._owner().source
    assert verify(model, X).is_equal
    while not isinstance(source, Lying):
        source = source.plain
    source.lies = {"0.weight"}
    assert [difference.name for difference in verify(model, X).differences] == ["0"]


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "roles",
    [
        {"offload": FP8},
        {"offload": torch.float32, "onload": FP8},
        {"offload": torch.float32, "onload": torch.bfloat16, "preparing": FP8},
        {"offload": FP8, "computation": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("climbed", [False, True])
def test_what_is_rounded_on_the_way_is_rounded_in_the_twin(roles: dict[str, Any], climbed: bool) -> None:
    dtypes = {"offload": torch.float32, "computation": torch.float32} | roles
    dtypes = {"onload": dtypes["offload"]} | dtypes
    dtypes = {"preparing": dtypes["onload"]} | dtypes
    config = {f"{role}_dtype": dtype for role, dtype in dtypes.items()}
    config |= {f"{role}_device": "cpu" for role in dtypes}
    model = one(nn.Linear(WIDTH, WIDTH), config, AutoWrappedLinear)
    if climbed:
        model[0].onload()
        model[0].preparing()
    assert verify(model, X.to(dtypes["computation"])).is_equal


def test_a_linear_layer_in_eight_bits() -> None:
    config = DISK | {"computation_dtype": FP8}
    try:
        model = one(nn.Linear(WIDTH, WIDTH), config, AutoWrappedLinear)
    except ConfigError as error:
        pytest.skip(str(error))
    model[0].add_lora(torch.randn(2, WIDTH), torch.randn(WIDTH, 2))
    x = X.bfloat16()
    assert verify(model, x).is_equal
    model[0]._owner().source.lies = {"0.bias"}
    assert not verify(model, x).is_equal


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(WIDTH, 8, num_layers=2, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    "batch norm": lambda: nn.BatchNorm1d(3),
    "tied": Tied,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("config", [DISK, PREPARING], ids=["disk", "resident"])
def test_all_kinds_of_layers(kind: str, gradients: bool, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = one(LAYERS[kind](), config)
    layer = model[0]
    inputs = (X, X, X) if kind == "attention" else (X,)
    source = layer._owner().source
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            assert verify(Calling(layer), *inputs).is_equal
        if config is DISK:
            name = next(weight.name for weight in layer._owner().weights)
            source.lies = {name}
            assert not verify(Calling(layer), *inputs).is_equal


class Int8Linear(nn.Linear):
    """A quantized layer, whose scale is a buffer."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.weight = nn.Parameter(
            torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8), requires_grad=False
        )
        self.register_buffer("scale", torch.rand(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Quantize:
    @staticmethod
    def is_quantized_linear(module: nn.Module) -> bool:
        return isinstance(module, Int8Linear)


class Around(nn.Module):
    """A layer with a layer inside that is managed for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight = Int8Linear(), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.weight  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", [DISK, PREPARING, HOST | {"computation_device": "cpu"}])
def test_a_quantized_layer_inside_of_a_layer(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Around(), Int8Linear())
    source = Lying(model)
    enable_vram_management(model, {Around: AutoWrappedModule}, config, None, source, quantize=Quantize())
    model[0].inner.add_lora(torch.randn(2, WIDTH), torch.randn(WIDTH, 2))
    for _ in range(2):
        found = verify(model, X)
        assert found.differences == ()
        assert found.layers_checked == 3
    if config is DISK:
        source.lies = {"0.inner.scale"}
        assert [d.name for d in verify(model, X).differences][:1] == ["0.inner"]
        source.lies = {"1.weight"}
        assert [d.name for d in verify(model, X).differences] == ["1"]


class Calling(nn.Module):
    """Passes everything on, as ``nn.Sequential`` cannot."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize(
    "context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
)
def test_under_the_same_modes(context: Callable[[], Any], check_runs) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True).eval()
    with context():
        check_runs(layer, X)
    model = one(layer)
    with context():
        assert verify(model, X).is_equal


class InPlace(nn.Module):
    """Changes its inputs, and looks whether they are one; gives a nest of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, *, also: dict[str, list[Tensor]]) -> dict[str, Any]:
        x.mul_(self.weight)
        other = also["them"][0]
        other.add_(1)
        return {"a": x, "b": [other.clone(), (x is other, "text", None)]}


def test_inputs_and_outputs_of_any_form() -> None:
    model = Calling(one(InPlace())[0])
    for also in (X.clone(), None):
        x = X.clone()
        found = verify(model, x, also={"them": [x if also is None else also]})
        assert found.is_equal
        expected = X * model.layer.weight + (1 if also is None else 0)
        assert torch.equal(x, expected)  # the model's own inputs are changed once


def test_hooks_are_called_once_and_may_change_the_output() -> None:
    model = one(nn.Linear(WIDTH, WIDTH))
    calls = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(module)
        return output + 1

    model[0].register_forward_hook(hook)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert verify(model, X).is_equal
    assert calls == [model[0]]


def test_a_layer_that_is_called_twice_is_one_layer() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    model: Any = nn.Sequential(layer, nn.ReLU(), layer)
    source = Lying(model)
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    assert verify(model, X).layers_checked == 1
    source.lies = {"0.weight"}
    assert len(verify(model, X).differences) == 1


def test_what_cannot_be_compared_is_said() -> None:
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, DISK, None, Lying(model))
    forward = model[1].forward
    model[1].forward = lambda x: forward(x)
    found = verify(model, X)
    assert found.is_equal
    assert (found.layers_checked, found.unchecked) == (1, ("1",))
    assert str(found) == "1 layers are as the plain ones, to the last bit\nnot compared, 1: 1"


def test_a_layer_that_only_runs_managed() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + len(self.state.name)  # type: ignore[union-attr,arg-type,operator]

    model = one(Odd(WIDTH, WIDTH))
    with pytest.raises(OffloadLayersError, match=r'layer "0" runs managed, but not plain: .*state'):
        verify(model, X)
    assert "forward" not in model[0].__dict__


def test_a_verification_is_neither_true_nor_false() -> None:
    model = one(nn.Linear(WIDTH, WIDTH))
    found = verify(model, X)
    with pytest.raises(TypeError, match="neither true nor false; ask for its is_equal"):
        assert found
    found.raise_if_different()
    model[0]._owner().source.lies = {"0.weight"}
    found = verify(model, X)
    with pytest.raises(VerificationError, match=r"of 1 layers, these are not .*\n0 \(2, 3, 16\) differs"):
        found.raise_if_different()


def test_nothing_compared_is_not_equal() -> None:
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, DISK, None, Lying(model))
    model.forward = lambda x: x
    found = verify(model, X)
    assert not found.is_equal
    assert str(found) == "no layer was compared\nnot compared, 1: 0"
    with pytest.raises(VerificationError):
        found.raise_if_different()
    with pytest.raises(ConfigError, match="has no managed layers"):
        verify(nn.Linear(2, 2), X)


def test_one_twin_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, DISK, None, Lying(model))
    budget = with_own_budget(model)
    model(X)
    model(X)
    residencies(model)[0].schedule.forget()  # type: ignore[union-attr]
    budget.reset_peak()
    model(X)
    usual = budget.statistics().peak_nbytes
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = []
    run = Twin.__call__

    def watched(self: Twin, *args: Any, **kwargs: Any) -> Any:
        out = run(self, *args, **kwargs)
        alive.add(self._twins[self._module].weight)  # type: ignore[arg-type]
        most.append(len(alive))
        return out

    monkeypatch.setattr(Twin, "__call__", watched)
    with no_collection():
        assert verify(model, X).is_equal
    assert most == [1] * 6
    assert len(alive) == 0
    assert budget.statistics().peak_nbytes <= usual + (WIDTH + 1) * WIDTH * 4
    residencies(model)[0].schedule.forget()  # type: ignore[union-attr]
    assert budget.statistics().lent_nbytes == 0


@contextmanager
def no_collection() -> Iterator[None]:
    """Let nothing be freed that is not freed by itself."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_what_a_layer_can_reach_is_not_copied() -> None:
    class Child(nn.Linear):
        parent: list[nn.Module]

        def forward(self, x: Tensor) -> Tensor:
            assert self.parent[0].is_the_real_one is marker
            return super().forward(x)

    marker = random.Random()
    child = Child(WIDTH, WIDTH)
    model: Any = nn.Sequential(child)
    child.parent = [model]
    model.is_the_real_one = marker
    enable_vram_management(model, {Child: AutoWrappedModule}, DISK, None, Lying(model))
    assert verify(model, X).is_equal
