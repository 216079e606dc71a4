"""What a managed module keeps of being an ordinary module: loading, saving, copying, assigning, hooks."""

import copy
import gc
import io
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    ConfigError,
    enable_vram_management,
)
from offload_layers.testing import CountingSource, assert_invariants, residencies
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Config = dict[str, object]
RESTING = ("offload", "onload", "preparing")
CPU: Config = {"computation_device": "cpu", "computation_dtype": torch.float32}
DISK: Config = {
    **{
        f"{role}_{what}": "disk"
        for role in ("offload", "onload", "preparing")
        for what in ("dtype", "device")
    },
    **CPU,
}
HOST_FP64: Config = {  # weights at rest in another dtype, so that every read needs a transfer
    **{f"{role}_dtype": torch.float64 for role in RESTING},
    **CPU,
}


def wrap(module: nn.Module, config: Config, face: type[AutoTorchModule] = AutoWrappedModule) -> Any:
    """Manage a copy of *module*, whose weights are on disk only if the configuration says so."""
    module = copy.deepcopy(module)
    if config is not DISK:
        return face(module, **config)
    source = CountingSource(module.state_dict())
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return face(module, **config, disk_map=source)


@pytest.fixture(params=[CPU, DISK, HOST_FP64], ids=["resident", "disk", "host in float64"])
def config(request: pytest.FixtureRequest) -> Config:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


X = torch.arange(8.0).view(2, 4)


def test_load_state_dict(linear: nn.Linear, config: Config) -> None:
    other = nn.Linear(4, 3).state_dict()
    for assign in (False, True):
        layer = wrap(linear, config)
        layer(X)
        assert layer.load_state_dict(other, assign=assign) == ([], [])
        assert torch.equal(layer(X), nn.functional.linear(X, other["weight"], other["bias"]))
        assert torch.equal(layer.state_dict()["weight"].float(), other["weight"])
        assert_invariants(layer)


def test_load_state_dict_in_part(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear, config)
    bias = torch.ones(3)
    assert layer.load_state_dict({"bias": bias}, strict=False).missing_keys == ["weight"]
    assert torch.equal(layer(X), nn.functional.linear(X, linear.weight, bias))


def test_load_state_dict_of_a_wrong_shape_changes_nothing(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear, config)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, strict=False)
    assert torch.equal(layer.weight, linear.weight)
    assert_invariants(layer)


def test_assigning_a_parameter(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear, config)
    weight = nn.Parameter(torch.ones(3, 4))
    layer.weight = weight
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(X), nn.functional.linear(X, weight, linear.bias))
    with pytest.raises(ConfigError, match='parameter "weight" is managed and cannot be None'):
        layer.weight = None
    assert_invariants(layer)


def test_deleting_a_parameter(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear, config)
    del layer.bias
    assert not hasattr(layer, "bias")
    layer.bias = None
    assert torch.equal(layer(X), nn.functional.linear(X, linear.weight))
    assert list(layer.state_dict()) == ["weight"]
    assert_invariants(layer)


def test_deepcopy_is_managed_and_independent(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear, config, AutoWrappedLinear)
    layer(X)
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer)
    twin.weight = nn.Parameter(torch.zeros(3, 4))
    assert torch.equal(layer(X), linear(X))
    assert torch.equal(twin(X), linear.bias.expand(2, 3))
    assert_invariants(nn.ModuleList([layer, twin]))


def test_pickle_gives_the_plain_module_with_its_values(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear, config)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is nn.Linear
    assert torch.equal(again.weight.float(), linear.weight)
    assert again.weight.requires_grad
    assert torch.equal(layer(X), linear(X))


def test_torch_save_of_the_state_dict(linear: nn.Linear, config: Config) -> None:
    file = io.BytesIO()
    torch.save(wrap(linear, config).state_dict(), file)
    file.seek(0)
    assert torch.equal(torch.load(file)["weight"].float(), linear.weight)


def test_hooks_stay(linear: nn.Linear, config: Config) -> None:
    calls: list[str] = []
    module = copy.deepcopy(linear)
    module.register_forward_hook(lambda *_: calls.append("before wrapping"))
    layer = wrap(module, config)
    layer.register_forward_pre_hook(lambda *_: calls.append("after wrapping"))
    layer(X)
    assert calls == ["after wrapping", "before wrapping"]


def test_keyword_arguments_reach_the_forward(linear: nn.Linear, config: Config) -> None:
    assert torch.equal(wrap(linear, config, AutoWrappedLinear)(input=X), linear(X))


def test_a_subclass_keeps_its_own_forward(config: Config) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * nn.functional.linear(x, self.weight)

    module = Scaled(4, 3)
    assert torch.equal(wrap(module, config, AutoWrappedLinear)(X), module(X))


def test_attributes_of_the_module_win(config: Config) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.name = "mine"
            self.module = nn.Linear(2, 2)
            self.anything = [1]

        @property
        def state(self) -> str:
            return "own"

    layer = wrap(Named(), config)
    assert layer.name == "mine"
    assert layer.state == "own"
    assert isinstance(layer.module, nn.Linear)
    assert layer.module.in_features == 2
    assert layer.anything == [1]


def test_requires_grad_reaches_the_weights(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear.requires_grad_(False), config)
    assert not layer.weight.requires_grad
    layer.requires_grad_(True)
    with torch.no_grad():
        assert layer.weight.requires_grad
    layer.preparing()
    with torch.no_grad():
        assert layer.weight.requires_grad


@pytest.mark.parametrize("config", [CPU, HOST_FP64], ids=["resident", "host in float64"])
def test_gradients_reach_weights_in_memory(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear, config)
    with torch.enable_grad():
        layer(X).sum().backward()
        linear(X).sum().backward()
    assert torch.allclose(next(layer.parameters()).grad.float(), linear.weight.grad)


def test_gradients_flow_through_weights_on_disk(linear: nn.Linear) -> None:
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch.enable_grad():
        wrap(linear, DISK)(x).sum().backward()
        linear(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_inference_mode_leaves_nothing_behind(linear: nn.Linear, config: Config) -> None:
    layer = wrap(linear, config)
    with torch.inference_mode():
        layer.preparing()
        layer(X)
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        layer(x).sum().backward()
    assert x.grad is not None
    layer.offload()


def test_to_moves_nothing_and_says_so(linear: nn.Linear, caplog: pytest.LogCaptureFixture) -> None:
    from offload_layers import _managed

    _managed._warn_of_cast.cache_clear()
    layer = wrap(linear, DISK)
    with caplog.at_level(logging.WARNING):
        layer.to("cpu").eval().train()
        assert caplog.text == ""
        layer.half()
    assert "a change of dtype has no effect on managed layers: they compute in cpu float32" in caplog.text
    assert torch.equal(layer(X), linear(X))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase], config: Config) -> None:
    torch.manual_seed(0)
    module = kind(4, 3, num_layers=2)
    layer = wrap(module, config)
    for model in (layer, copy.deepcopy(layer)):
        assert torch.equal(model(X)[0], module(X)[0])
    if config is not HOST_FP64:
        assert torch.equal(pickle.loads(pickle.dumps(layer))(X)[0], module(X)[0])
    assert_invariants(layer)


def test_recurrent_layers_drop_what_they_have_computed_with() -> None:
    layer = wrap(nn.LSTM(4, 3), DISK)
    layer(X)
    gc.collect()
    assert [reference() for reference in layer._flat_weight_refs] == [None] * 4


def test_multihead_attention(config: Config) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2).eval()
    layer = wrap(module, config)
    assert torch.equal(layer(X, X, X)[0], module(X, X, X)[0])
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(X, X, X)[0], module(X, X, X)[0])
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor.float(), module.state_dict()[name])
    twin.out_proj.bias = nn.Parameter(torch.ones(4))
    assert not torch.equal(twin(X, X, X)[0], module(X, X, X)[0])
    assert torch.equal(layer(X, X, X)[0], module(X, X, X)[0])


def test_weight_norm_and_parametrizations(config: Config) -> None:
    torch.manual_seed(0)
    module = parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    x = torch.randn(1, 2, 5)
    layer = wrap(module, config)
    assert torch.equal(layer(x), module(x))
    assert list(layer.state_dict()) == list(module.state_dict())


def test_parametrizing_a_managed_layer(linear: nn.Linear, config: Config) -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = wrap(linear, config)
    parametrize.register_parametrization(layer, "weight", Double())
    assert torch.equal(layer(X), nn.functional.linear(X, 2 * linear.weight, linear.bias))


def test_tied_parameters_inside_a_layer_are_read_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            assert self.a.weight is self.b.weight
            return self.b(self.a(x))  # type: ignore[no-any-return]

    module = Tied()
    layer = AutoWrappedModule(module, **DISK, disk_map=(source := CountingSource(module.state_dict())))
    layer(X)
    assert sorted(source.reads) == ["a.bias", "a.weight", "b.bias"]


def test_scripted_modules_are_refused_and_nothing_changes(linear: nn.Linear) -> None:
    module = nn.Sequential(linear, nn.Linear(3, 2))
    before = [type(m) for m in module.modules()]

    class Final(nn.Module):
        def __init_subclass__(cls) -> None:
            raise TypeError("Final is final")

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    module.append(Final())
    with pytest.raises(ConfigError, match=r"Final cannot be managed: .*Final is final"):
        AutoWrappedModule(module, **HOST_FP64)
    assert [type(m) for m in module.modules()][:-1] == before
    assert torch.equal(module[0](X), linear(X))


@pytest.mark.slow
def test_two_threads_run_one_model(
    make_model: Callable[[], nn.Module], module_map: dict[type[nn.Module], type[nn.Module]], x: Tensor
) -> None:
    if x.device.type != "cpu":
        pytest.skip("the point is the books, not the device")
    plain = make_model()
    source = CountingSource(plain.state_dict())
    model = enable_vram_management(make_model(), module_map, DISK, 0, source)
    expected = plain(x)
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.no_grad():
            wrong.extend(number for _ in range(20) if not torch.equal(model(x), expected))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_invariants(model)
    assert all(r.budget.statistics().lent_nbytes >= 0 for r in residencies(model))


def test_changes_of_a_view_that_the_source_gave_are_kept(linear: nn.Linear) -> None:
    source = {f"0.{name}": tensor.clone() for name, tensor in linear.state_dict().items()}
    pristine = {name: tensor.clone() for name, tensor in source.items()}
    model = nn.Sequential(copy.deepcopy(linear), nn.Linear(3, 3))
    source |= {f"1.{name}": tensor.clone() for name, tensor in model[1].state_dict().items()}
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    model[0].weight.data.add_(1)
    model[1](torch.zeros(3))
    source.update(pristine)  # as a mapping of a file that is renewed
    assert torch.equal(model[0].weight, linear.weight + 1)
    assert torch.equal(model[0].bias, linear.bias)


@pytest.mark.parametrize("change", ["add_", "data.add_", "data =", "data +="])
def test_changes_of_a_weight_in_place_are_kept_wherever_it_is(
    linear: nn.Linear, config: Config, change: str
) -> None:
    model = nn.Sequential(copy.deepcopy(linear), nn.Linear(3, 3))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config, None, tensors)
    for _ in range(2):
        weight = model[0].weight
        if change == "add_":
            weight.add_(1)
        elif change == "data.add_":
            weight.data.add_(1)
        elif change == "data +=":
            weight.data += 1
        else:
            weight.data = weight.data + 1
        del weight
        model[1](torch.zeros(3))
    expected = linear.weight + 2
    assert torch.equal(model[0].weight, expected)
    assert torch.equal(model.state_dict()["0.weight"].float(), expected)
    for layer in model:
        layer.offload()
    assert torch.equal(model[0](X), nn.functional.linear(X, expected, linear.bias))
    assert_invariants(model)
