"""Managing a whole model: what the map covers, what it does not, and what is refused."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    ConfigError,
    MissingTensorError,
    OffloadLayersError,
    ShapeMismatchError,
    disable_vram_management,
    enable_vram_management,
    enable_vram_management_recursively,
    fill_vram_config,
)
from offload_layers.testing import CountingSource
from torch import Tensor, nn

Config = dict[str, object]
ModuleMap = dict[type[nn.Module], type[nn.Module]]
Make = Callable[[], nn.Module]
WIDTH = 16


def manage(model: nn.Module, module_map: ModuleMap, config: Config, source: Any, **kwargs: Any) -> Any:
    return enable_vram_management(model, module_map, config, 0, source, **kwargs)


class Table(nn.Module):
    """What has a buffer and no parameter, as positions of rotary embeddings have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.arange(float(WIDTH)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.values


def test_buffers_that_the_map_does_not_cover_are_where_the_layers_compute(
    make_config: Any, device: torch.device
) -> None:
    plain = nn.Sequential(Table(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    model, x = copy.deepcopy(plain), torch.randn(3, WIDTH, device=device)
    host, there = (torch.float32, "cpu"), (torch.float32, device)
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, make_config(host, host, host, there), 0)
    assert torch.equal(model(x), plain.to(device)(x))


def test_parameters_and_buffers_that_the_map_does_not_cover_are_loaded(
    make_skeleton: Make, plain: nn.Module, disk_config: Config, x: Tensor, device: torch.device
) -> None:
    source = CountingSource(plain.cpu().state_dict())
    model = manage(make_skeleton(), {nn.MultiheadAttention: AutoWrappedModule}, disk_config, source)
    model.to(device)  # buffers of unmanaged modules are the caller's
    assert torch.equal(model(x), plain.to(device)(x))


def test_eight_bit_floats_in_the_file_are_computable_where_nothing_manages_them(
    make_skeleton: Make, plain: nn.Module, module_map: ModuleMap, disk_config: Config, x: Tensor
) -> None:
    tensors = {name: t.cpu() for name, t in plain.state_dict().items()}
    tensors["root"] = tensors["root"].to(torch.float8_e4m3fn)
    model = manage(make_skeleton(), module_map, disk_config, CountingSource(tensors))
    assert model.root.dtype is torch.float32
    assert torch.isfinite(model(x)).all()


def test_a_parameter_tied_across_layers_is_found_under_either_name(disk_config: Config) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.last.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))  # type: ignore[no-any-return]

    plain = Tied()
    config = {**disk_config, "computation_device": "cpu"}
    x = torch.randn(2, 4)
    for stored in ("first.weight", "last.weight"):
        source = CountingSource({stored: plain.first.weight})
        skeleton = Tied()
        skeleton.first.weight = skeleton.last.weight = nn.Parameter(torch.empty(4, 4, device="meta"), False)
        model = manage(skeleton, {nn.Linear: AutoWrappedLinear}, config, source)
        assert torch.equal(model(x), plain(x))


def test_one_module_under_two_names(disk_config: Config) -> None:
    config = {**disk_config, "computation_device": "cpu"}
    shared = nn.Linear(4, 4)
    plain = nn.Sequential(shared, nn.ReLU(), shared)
    model = manage(
        copy.deepcopy(plain), {nn.Linear: AutoWrappedLinear}, config, CountingSource(plain.state_dict())
    )
    assert model[0] is model[2]
    x = torch.randn(2, 4)
    assert torch.equal(model(x), plain(x))


def test_the_first_entry_that_fits_counts() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Special(2, 2))
    module_map: ModuleMap = {Special: AutoWrappedModule, nn.Linear: AutoWrappedLinear}
    enable_vram_management(model, module_map, {"computation_device": "cpu"})
    assert [isinstance(layer, AutoWrappedLinear) for layer in model] == [True, False]


def test_a_layer_class_from_elsewhere_may_replace_the_module() -> None:
    class Elsewhere(nn.Module):
        def __init__(self, module: nn.Module, name: str, **kwargs: object) -> None:
            super().__init__()
            self.inner, self.name, self.kwargs = module, name, kwargs

    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    enable_vram_management(model, {nn.Linear: Elsewhere}, {"computation_device": "cpu"}, 3.0, extra=1)
    assert isinstance(model[0][0], Elsewhere)
    assert model[0][0].name == "0.0"
    assert model[0][0].kwargs == {
        "computation_device": "cpu",
        "vram_limit": 3.0,
        "disk_map": None,
        "extra": 1,
    }


def test_the_recursive_function_takes_a_prefix() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    enable_vram_management_recursively(
        model, {nn.Linear: AutoWrappedLinear}, {"computation_device": "cpu"}, name_prefix="unet.mid"
    )
    assert model[0].name == "unet.mid.0"


def test_fill_vram_config_makes_all_but_offload_the_computation(disk_config: Config) -> None:
    filled = fill_vram_config(nn.Linear(2, 2), disk_config)
    assert filled["offload_device"] == "disk"
    assert filled["onload_device"] == filled["preparing_device"] == disk_config["computation_device"]
    assert filled["onload_dtype"] == filled["preparing_dtype"] == disk_config["computation_dtype"]


def test_a_map_that_covers_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        enable_vram_management(
            nn.Sequential(nn.ReLU()), {nn.Linear: AutoWrappedLinear}, {"computation_device": "cpu"}
        )
    assert "Sequential has no module of the classes in module_map (Linear)" in caplog.text


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_giving_the_model_back(
    make_skeleton: Make,
    plain: nn.Module,
    module_map: ModuleMap,
    vram_config: Config,
    x: Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    source = CountingSource(plain.cpu().state_dict())
    model = manage(make_skeleton(), module_map, vram_config, source)
    model(x)
    assert disable_vram_management(model, device, dtype) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    for module, its_plain in zip(model.modules(), plain.modules(), strict=True):
        assert module.__dict__.keys() <= its_plain.__dict__.keys()
    if dtype is None:
        assert torch.equal(model(x), plain.to(device)(x))
    for name, parameter in model.named_parameters():
        assert parameter.device.type == device.type, name
        assert parameter.dtype is (dtype or torch.float32) or name in ("root", "rest.weight", "rest.bias")
    assert not hasattr(model, "vram_management_enabled")
    enable_vram_management(model, module_map, {"computation_device": device})


def test_recurrent_layers_can_be_given_back(disk_config: Config) -> None:
    config = {**disk_config, "computation_device": "cpu"}
    plain = nn.LSTM(4, 3)
    model = nn.Sequential(copy.deepcopy(plain))
    manage(model, {nn.LSTM: AutoWrappedModule}, config, {f"0.{n}": t for n, t in plain.state_dict().items()})
    disable_vram_management(model)
    x = torch.randn(2, 4)
    assert torch.equal(model[0](x)[0], plain(x)[0])
    model.double()
    model[0](x.double())


def refused(
    model: nn.Module, error: type[OffloadLayersError], message: str, *args: Any, **kwargs: Any
) -> None:
    """Assert that enabling management raises *error* and leaves *model* as it was."""
    before = [(n, type(m), dict(m._parameters)) for n, m in model.named_modules()]
    with pytest.raises(error) as caught:
        enable_vram_management(model, *args, **kwargs)
    assert message in str(caught.value)
    after = [(n, type(m), dict(m._parameters)) for n, m in model.named_modules()]
    assert [(n, c) for n, c, _ in after] == [(n, c) for n, c, _ in before]
    for (_, _, p), (_, _, q) in zip(before, after, strict=True):
        assert p.keys() == q.keys()
        assert all(p[name] is q[name] for name in p)
    assert not hasattr(model, "vram_management_enabled")


def test_a_tensor_that_the_source_lacks(
    make_skeleton: Make, plain: nn.Module, module_map: ModuleMap, disk_config: Config
) -> None:
    tensors = plain.cpu().state_dict()
    tensors["blocks.1.upp.weight"] = tensors.pop("blocks.1.up.weight")
    message = (
        'the disk map has no tensor "blocks.1.up.weight", which a parameter of shape (32, 16) needs. '
        "Closest: blocks.1.upp.weight"
    )
    refused(make_skeleton(), MissingTensorError, message, module_map, disk_config, 0, tensors)
    with pytest.raises(KeyError):
        manage(make_skeleton(), module_map, disk_config, tensors)


def test_a_tensor_of_another_shape(
    make_skeleton: Make, plain: nn.Module, module_map: ModuleMap, disk_config: Config, x: Tensor
) -> None:
    class Describing(CountingSource):
        def info(self, name: str) -> Tensor:
            return self._tensors[name]

    tensors = plain.cpu().state_dict()
    tensors["blocks.0.gate"] = torch.zeros(17)
    message = 'tensor "blocks.0.gate" has shape (17,) in the disk map, but (16,) in the model'
    refused(make_skeleton(), ShapeMismatchError, message, module_map, disk_config, 0, Describing(tensors))
    model = manage(make_skeleton(), module_map, disk_config, CountingSource(tensors))
    with pytest.raises(ShapeMismatchError, match=r"blocks\.0\.gate"):
        model(x)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vram_config": {"onlaod_device": "cpu"}}, "unknown key 'onlaod_device'"),
        ({"vram_config": "disk"}, "vram_config must be a dict"),
        ({"vram_config": {}}, "computation_device is missing"),
        ({"vram_limit": "8"}, "vram_limit must be a number of GiB or None (no limit); got '8'"),
        ({"module_map": [nn.Linear]}, "module_map must map module classes to layer classes; got [<class"),
        (
            {"module_map": {"Linear": AutoWrappedLinear}},
            "module_map must map module classes to layer classes",
        ),
        ({"disk_map": 7}, "disk_map must map names to tensors; got int"),
        ({"quantize": object()}, "quantize must be None or an object with a method is_quantized_linear"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments = {"module_map": {nn.Linear: AutoWrappedLinear}, "vram_config": {"computation_device": "cpu"}}
    refused(nn.Sequential(nn.Linear(2, 2)), ConfigError, message, **(arguments | changed))


def test_managing_twice_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    module_map: ModuleMap = {nn.Linear: AutoWrappedLinear}
    enable_vram_management(model, module_map, {"computation_device": "cpu"})
    with pytest.raises(ConfigError, match='layer "0" of Sequential is managed already'):
        enable_vram_management(model, module_map, {"computation_device": "cpu"})
    assert isinstance(model[0], AutoTorchModule)


class Trimmed(CountingSource):
    """A source that keeps memory for its next read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.trims: list[int] = []  # how many tensors had been read each time

    def trim(self) -> None:
        self.trims.append(len(self.reads))


def test_a_source_that_has_given_everything_gives_back_its_memory() -> None:
    in_memory = {"offload_dtype": torch.bfloat16, "computation_dtype": torch.float32}
    config = {"offload_device": "cpu", "computation_device": "cpu", **in_memory}
    for model, name in (
        (nn.Sequential(nn.Linear(4, 4)), "0."),  # managed layer by layer
        (nn.Linear(4, 4), ""),  # managed as a whole
    ):
        source = Trimmed({name + key: value for key, value in nn.Linear(4, 4).state_dict().items()})
        manage(model.to("meta"), {nn.Linear: AutoWrappedLinear}, config, source)
        assert source.trims == [2]


def test_a_source_that_is_read_in_each_forward_keeps_its_memory(disk_config: Config) -> None:
    source = Trimmed({f"0.{key}": value for key, value in nn.Linear(4, 4).state_dict().items()})
    model = nn.Sequential(nn.Linear(4, 4)).to("meta")
    config = {**disk_config, "computation_device": "cpu"}
    manage(model, {nn.Linear: AutoWrappedLinear}, config, source)(torch.randn(2, 4))
    assert source.trims == []


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"manages a torch\.nn\.Module; got dict"):
        enable_vram_management({}, {}, {})  # type: ignore[arg-type]
