"""Quantized layers through the protocol of DiffSynth's ``QuantizeConfig``."""

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedQuantizedModule,
    ConfigError,
    LoRAHotLoadMixin,
    MissingTensorError,
    State,
    disable_vram_management,
    enable_vram_management,
)
from offload_layers._packed import nbytes
from offload_layers.testing import CountingSource, assert_invariants, residencies
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

BF16 = torch.bfloat16


class Int8Linear(nn.Linear):
    """Weights in int8, a float32 scale per row, which is a buffer, and now and then a scale of inputs."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(  # type: ignore[assignment]
            torch.zeros(out_features, in_features, dtype=torch.int8), requires_grad=False
        )
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=BF16), requires_grad=False) if bias else None
        self.register_buffer("scale", torch.ones(out_features, 1))
        self.register_buffer("input_scale", None)
        self.register_buffer("eps", torch.tensor(0.0), persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        new = cls(linear.in_features, linear.out_features, linear.bias is not None)
        new.scale = linear.weight.detach().abs().amax(1, keepdim=True).float() / 127
        new.weight.data.copy_((linear.weight.detach() / new.scale).round())
        if linear.bias is not None:
            new.bias.data.copy_(linear.bias.detach())
        return new

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.input_scale is None and prefix + "input_scale" in state_dict:
            self.input_scale = torch.empty(())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.dtype == torch.int8
        assert self.scale.dtype == torch.float32
        if self.input_scale is not None:
            x = x * self.input_scale
        weight = (self.weight * self.scale).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight, bias)


class Quantize:
    """As the protocol demands; in its checkpoints a weight is flat, under a name of its own."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, str]] = []

    def is_quantized_linear(self, module: nn.Module) -> bool:
        return isinstance(module, Int8Linear)

    def build_quantized_shell(self, module: Any, compute_dtype: torch.dtype, layer_name: str) -> Int8Linear:
        return Int8Linear(module.in_features, module.out_features, module.bias is not None).to("meta")

    def unflatten_state_dict(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
        self.metadata.append(metadata)
        rebuilt = {}
        for name, tensor in tensors.items():
            if name.endswith(".packed"):
                rows = tensors[name.replace(".packed", ".scale")].shape[0]
                rebuilt[name.replace(".packed", ".weight")] = tensor.view(rows, -1)
            else:
                rebuilt[name] = tensor
        return rebuilt

    @staticmethod
    def flatten(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = {}
        for name, tensor in state.items():
            if tensor.dtype == torch.int8:
                flat[name.replace(".weight", ".packed")] = tensor.flatten()
            else:
                flat[name] = tensor
        return flat


class Model(nn.Module):
    """Quantized layers, plain ones, and a quantized one inside a layer of the map."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(16), make(16, 24))
        self.mid = nn.Linear(24, 16)
        self.out = make(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.mid(self.inner(x))))  # type: ignore[no-any-return]


def make_plain() -> Model:
    torch.manual_seed(0)
    model = Model(lambda i, o: Int8Linear.of(nn.Linear(i, o))).to(BF16).eval().requires_grad_(False)
    for layer in (model.inner[1], model.out):  # `.to` above has cast the scales
        layer.scale = torch.rand(layer.out_features, 1) / 100
    return model


def make_skeleton() -> Model:
    model = make_plain()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        if isinstance(module, Int8Linear):
            module.scale = module.scale.to("meta")
    return model


@pytest.fixture
def plain() -> Model:
    return make_plain()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(BF16)


def settings(offload: str, onload: str, preparing: str) -> dict[str, object]:
    config: dict[str, object] = {"computation_dtype": BF16, "computation_device": "cpu"}
    for role, where in {"offload": offload, "onload": onload, "preparing": preparing}.items():
        config[f"{role}_device"] = where
        config[f"{role}_dtype"] = "disk" if where == "disk" else BF16
    return config


CONFIGURATIONS = {
    "host": settings("cpu", "cpu", "cpu"),
    "fp8": settings("cpu", "cpu", "cpu")
    | {f"{role}_dtype": torch.float8_e4m3fn for role in ("offload", "onload", "preparing")},
    "disk": settings("disk", "disk", "disk"),
    "disk, preparing": settings("disk", "disk", "cpu"),
    "disk, onload": settings("disk", "cpu", "cpu"),
}
MAP = {nn.Linear: AutoWrappedLinear, nn.Sequential: AutoWrappedModule}


def manage(config: str, **more: Any) -> tuple[Model, CountingSource | None, Quantize]:
    quantize = Quantize()
    if not config.startswith("disk"):
        model = make_plain()
        enable_vram_management(model, MAP, CONFIGURATIONS[config], quantize=quantize, **more)
        return model, None, quantize
    source = CountingSource(Quantize.flatten(make_plain().state_dict()))
    model = make_skeleton()
    more = {"metadata": {"format": "pt"}} | more
    enable_vram_management(model, MAP, CONFIGURATIONS[config], disk_map=source, quantize=quantize, **more)
    return model, source, quantize


@pytest.mark.parametrize("vram_limit", [None, 0])
@pytest.mark.parametrize("config", [c for c in CONFIGURATIONS if c != "fp8"])
def test_results_are_those_of_the_plain_model(
    config: str, vram_limit: float | None, plain: Model, x: Tensor
) -> None:
    model, _, quantize = manage(config, vram_limit=vram_limit)
    for _ in range(3):
        assert torch.equal(model(x), plain(x))
        for layer in residencies(model):
            layer.offload()
        assert_invariants(model)
    assert all(metadata == {"format": "pt"} for metadata in quantize.metadata)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_nothing_is_ever_converted(config: str, plain: Model, x: Tensor) -> None:
    model, _, _ = manage(config)
    for state in ("onload", "preparing", "offload"):
        getattr(model.out, state)()
        assert model.out.weight.dtype == torch.int8
        assert torch.equal(model.out.weight, plain.out.weight)
        assert torch.equal(model.out.scale, plain.out.scale)
        assert torch.equal(model.out.bias, plain.out.bias)
        assert model.out.computation_dtype == BF16
    model(x)
    for name, tensor in plain.state_dict().items():
        if name.startswith(("out", "inner.1")):
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_what_the_layer_is(config: str) -> None:
    model, _, quantize = manage(config)
    for layer in (model.out, model.inner[1]):
        for cls in (AutoWrappedQuantizedModule, AutoTorchModule, LoRAHotLoadMixin, nn.Linear, Int8Linear):
            assert isinstance(layer, cls)
        assert not isinstance(layer, AutoWrappedLinear)
        assert quantize.is_quantized_linear(layer)
        assert layer.module is layer.computation_module() is layer.computation() is layer
    assert model.out.in_features == 16
    assert model.inner[1].name == "inner.1"
    assert isinstance(model.mid, AutoWrappedLinear)
    assert len(residencies(model)) == 4


def test_on_disk_nothing_is_held_and_each_tensor_is_read_once_a_forward(x: Tensor) -> None:
    model, source, _ = manage("disk", vram_limit=0)
    assert source is not None
    layer = model.out
    assert all(tensor.is_meta for tensor in (*layer.parameters(), layer._buffers["scale"]))
    source.reads.clear()
    layer(x)
    assert sorted(source.reads) == ["out.bias", "out.packed", "out.scale"]
    assert all(tensor.is_meta for tensor in (*layer.parameters(), layer._buffers["scale"]))


def test_the_bytes_of_packed_weights_are_borrowed(x: Tensor) -> None:
    model, source, _ = manage("disk, preparing")
    assert source is not None
    (residency,) = (r for r in residencies(model) if r.name == "out")
    before = residency.budget.statistics().lent_nbytes
    model.out(x)
    held = sum(nbytes(t) for t in (model.out.weight, model.out.bias, model.out.scale))
    assert residency.state is State.PREPARING
    assert residency.leased_nbytes == held == 16 * 8 + 2 * 8 + 4 * 8
    assert residency.budget.statistics().lent_nbytes == before + held


def test_a_value_that_only_the_checkpoint_has_is_used(plain: Model, x: Tensor) -> None:
    plain.out.input_scale = torch.tensor(0.5)
    source = Quantize.flatten(plain.state_dict())
    skeleton = make_skeleton()
    enable_vram_management(
        skeleton, MAP, CONFIGURATIONS["disk"], vram_limit=0, disk_map=source, quantize=Quantize()
    )
    assert torch.equal(skeleton(x), plain(x))


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_adapters(config: str, x: Tensor) -> None:
    layer = manage(config)[0].out
    base = layer(x)
    a, b = torch.randn(2, 16), torch.randn(8, 2)
    layer.lora_A_weights.append(a)
    layer.lora_B_weights.append(b)
    assert torch.equal(layer(x), base + x @ a.T.to(BF16) @ b.T.to(BF16))
    layer.lora_A_weights.clear()
    layer.lora_B_weights.clear()
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_gradients_flow_to_the_input(config: str, plain: Model, x: Tensor) -> None:
    with torch.enable_grad():
        y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain.out(y).sum().backward()
        manage(config)[0].out(z).sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, z.grad)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_copies_and_pickles(config: str, plain: Model, x: Tensor) -> None:
    layer = manage(config)[0].out
    expected = plain.out(x)
    twin = copy.deepcopy(layer)
    assert isinstance(twin, AutoWrappedQuantizedModule)
    assert torch.equal(twin(x), expected)
    stored = io.BytesIO()
    pickle.dump(layer, stored)
    back = pickle.loads(stored.getvalue())
    assert type(back) is Int8Linear
    assert torch.equal(back(x), expected)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_loading_and_assigning(config: str, x: Tensor) -> None:
    layer = manage(config)[0].out
    other = Int8Linear.of(nn.Linear(16, 8)).to(BF16)
    layer.load_state_dict(other.state_dict())
    other.scale = other.scale.float()
    layer.scale = other.scale.clone()
    assert torch.equal(layer(x), other(x))
    other.scale = layer.scale = torch.rand(8, 1)
    assert torch.equal(layer(x), other(x))
    assert "scale" in layer.state_dict()


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_the_plain_model_comes_back(config: str, plain: Model, x: Tensor) -> None:
    model, _, _ = manage(config)
    expected = model(x)
    disable_vram_management(model)
    assert type(model.out) is Int8Linear
    assert list(model.out.state_dict()) == list(plain.out.state_dict())
    assert torch.equal(model.out.scale, plain.out.scale)
    if config != "fp8":
        assert torch.equal(model(x), expected)


def test_a_checkpoint_without_the_layer() -> None:
    source = {n: t for n, t in Quantize.flatten(make_plain().state_dict()).items() if not n.startswith("out")}
    message = (
        '^the disk map has no tensor under "out.", which quantized layer "out" needs. Pass the checkpoint '
        "of this model.$"
    )
    with pytest.raises(MissingTensorError, match=message):
        enable_vram_management(
            make_skeleton(), MAP, CONFIGURATIONS["disk"], disk_map=source, quantize=Quantize()
        )


def test_a_checkpoint_without_one_tensor_of_the_layer(x: Tensor) -> None:
    source = Quantize.flatten(make_plain().state_dict())
    del source["out.bias"]
    skeleton = make_skeleton()
    enable_vram_management(skeleton, MAP, CONFIGURATIONS["disk"], disk_map=source, quantize=Quantize())
    with pytest.raises(
        MissingTensorError, match=r'^quantized layer "out" cannot be made from the disk map: (?s:.)*"bias"'
    ):
        skeleton.out(x)


def test_a_source_that_fails_leaves_the_layer_as_it_was(plain: Model, x: Tensor) -> None:
    model, source, _ = manage("disk", vram_limit=0)
    assert source is not None
    source.failing = {"out.scale"}
    with pytest.raises(OSError, match="the disk is gone"):
        model.out(x)
    source.failing = set()
    assert torch.equal(model(x), plain(x))
    assert_invariants(model)


def test_without_a_config_the_checkpoint_has_the_layers_own_tensors(plain: Model, x: Tensor) -> None:
    layer = Int8Linear(16, 8).to("meta")
    layer.eps = torch.tensor(0.0)
    source = {f"l.{name}": tensor for name, tensor in plain.out.state_dict().items()}
    AutoWrappedQuantizedModule(layer, **CONFIGURATIONS["disk"], name="l", disk_map=source)
    assert torch.equal(layer(x), plain.out(x))


def test_other_modules_are_refused() -> None:
    message = (
        "^AutoWrappedQuantizedModule wraps quantized layers that are nn.Linear by inheritance; got Conv1d. "
        "Use AutoWrappedModule without dtypes$"
    )
    with pytest.raises(ConfigError, match=message):
        AutoWrappedQuantizedModule(nn.Conv1d(1, 1, 1), computation_device="cpu")


def test_objects_that_cannot_tell_are_refused() -> None:
    message = (
        r"^quantize must be None or an object with a method is_quantized_linear\(module\), as DiffSynth's "
        "QuantizeConfig; got 'int8'$"
    )
    with pytest.raises(ConfigError, match=message):
        enable_vram_management(make_plain(), MAP, CONFIGURATIONS["host"], quantize="int8")


def test_tensor_subclasses_keep_their_class_and_their_parts(x: Tensor) -> None:
    class TwoLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.weight, TwoTensor)
            return nn.functional.linear(x, (self.weight.a - self.weight.b).to(x.dtype), self.bias)

    linear = TwoLinear(16, 8, dtype=BF16)
    linear.weight = nn.Parameter(TwoTensor(torch.randn(8, 16), torch.randn(8, 16)), requires_grad=False)
    expected = linear(x)
    assert nbytes(linear.weight) == 2 * 8 * 16 * 4
    AutoWrappedQuantizedModule(linear, **CONFIGURATIONS["fp8"])
    assert torch.equal(linear(x), expected)
    linear.preparing()
    assert torch.equal(linear(x), expected)
    linear.offload()
    assert torch.equal(linear(x), expected)


class Hanging(nn.Parameter):
    """A parameter with state beside it which its ``to`` moves in place, as some libraries do."""

    def to(self, device: torch.device) -> "Hanging":  # type: ignore[override]
        self.state["device"] = str(device)
        new = self.data.to(device).as_subclass(Hanging)
        new.state = self.state
        return new


def test_what_hangs_on_a_parameter_is_not_torn_from_it() -> None:
    from offload_layers._packed import moved

    original = torch.randn(3).as_subclass(Hanging)
    original.state = {"device": "cpu"}
    there = moved(original, torch.device("meta"))
    assert type(there) is Hanging
    assert there.state == {"device": "meta"}
    assert original.state == {"device": "cpu"}
