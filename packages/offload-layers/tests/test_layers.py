"""Managed models compute what the plain model computes, in every configuration and state."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    ConfigError,
    IllegalTransitionError,
    LoRAHotLoadMixin,
    State,
    enable_vram_management,
)
from offload_layers.testing import CountingSource, assert_invariants, residencies, with_own_budget
from torch import Tensor, nn

Config = dict[str, object]
ModuleMap = dict[type[nn.Module], type[nn.Module]]
Make = Callable[[], nn.Module]
GIB = 1024**3


@pytest.fixture
def managed(
    vram_config: Config, module_map: ModuleMap, make_model: Make, make_skeleton: Make, plain: nn.Module
) -> Callable[..., nn.Module]:
    def make(limit: float | None = None) -> nn.Module:
        if vram_config["offload_device"] == "disk":
            source = CountingSource(plain.cpu().state_dict())
            plain.to(vram_config["computation_device"])
            return enable_vram_management(make_skeleton(), module_map, vram_config, limit, source)
        model = make_model()
        model.rest.to(vram_config["computation_device"])
        model.root = nn.Parameter(model.root.to(vram_config["computation_device"]), requires_grad=False)
        return enable_vram_management(model, module_map, vram_config, limit)

    return make


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AutoTorchModule)]


@pytest.mark.parametrize("limit", [None, 0, 2000 / GIB, 1.0], ids=["no limit", "zero", "2000 bytes", "1 GiB"])
def test_outputs_are_those_of_the_plain_model(
    managed: Callable[..., nn.Module], plain: nn.Module, x: Tensor, limit: float | None
) -> None:
    model = managed(limit)
    expected = plain(x)
    for action in ("nothing", "onload", "nothing", "offload", "preparing", "onload", "offload"):
        for layer in layers(model):
            getattr(layer, action, lambda: None)()
        assert torch.equal(model(x), expected), action
        assert_invariants(model)


def test_only_layers_that_fit_under_the_limit_stay(
    make_skeleton: Make,
    plain: nn.Module,
    module_map: ModuleMap,
    device: torch.device,
    make_config: Callable[..., Config],
    x: Tensor,
) -> None:
    on_device = (torch.float32, device)
    source = CountingSource(plain.cpu().state_dict())
    model = enable_vram_management(
        make_skeleton(), module_map, make_config("disk", "disk", on_device, on_device), 1.0, source
    )
    budget = residencies(model)[0].budget
    before = budget.statistics()
    limit = before.lent_nbytes + 9_000
    for layer in layers(model):
        layer._owner().limit = limit if device.type == "cpu" else None
    for _ in range(2):  # until all layers were called nobody stays
        model(x)
    after = budget.statistics()
    prepared = [r for r in residencies(model) if r.state is State.PREPARING]
    if device.type == "cpu":
        largest = max(r.computation_nbytes for r in residencies(model))
        assert 0 < len(prepared) < len(residencies(model))
        assert after.lent_nbytes + largest <= limit
    del model, prepared
    reads = len(source.reads)
    assert reads > 0


def test_a_managed_layer_stays_what_it_was(managed: Callable[..., nn.Module], plain: nn.Module) -> None:
    model = managed()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert repr(model) == repr(plain)
    for module, its_plain in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(module, type(its_plain))


def test_state_dict_has_the_real_values(managed: Callable[..., nn.Module], plain: nn.Module) -> None:
    for name, tensor in managed().state_dict().items():
        assert torch.equal(tensor.cpu(), plain.state_dict()[name].cpu()), name


def test_weights_read_from_outside_are_ready_to_compute(
    managed: Callable[..., nn.Module], plain: nn.Module, device: torch.device
) -> None:
    weight = managed(0).blocks[0].up.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.device.type == device.type
    assert torch.equal(weight.cpu(), plain.blocks[0].up.weight.cpu())


def test_faces(managed: Callable[..., nn.Module], device: torch.device) -> None:
    block = managed().blocks[1]
    assert isinstance(block, AutoWrappedNonRecurseModule)
    assert isinstance(block.norm, AutoWrappedModule)
    assert not isinstance(block.norm, AutoWrappedNonRecurseModule)
    assert isinstance(block.up, AutoWrappedLinear)
    assert isinstance(block.up, nn.Linear)
    assert isinstance(block.up, LoRAHotLoadMixin)
    assert not isinstance(block.attention.out_proj, AutoTorchModule)  # a part of the attention's layer
    assert block.up.name == "blocks.1.up"
    assert block.up.param_name("weight") == "blocks.1.up.weight"
    assert block.up.module is block.up
    assert block.up.in_features == 16
    assert block.up.computation_dtype is torch.float32
    assert block.up.computation_device.type == block.up.computation_device_type == device.type
    weight, bias = block.up.computation()
    assert weight.shape == (32, 16)
    assert bias.shape == (32,)
    assert block.norm.computation() is block.norm


def test_states_follow_the_calls(managed: Callable[..., nn.Module]) -> None:
    layer = managed().blocks[0].up
    assert layer.state is State.OFFLOAD
    for action, state in [
        ("offload", State.OFFLOAD),
        ("onload", State.ONLOAD),
        ("onload", State.ONLOAD),
        ("preparing", State.PREPARING),
        ("onload", State.PREPARING),
        ("offload", State.OFFLOAD),
        ("preparing", State.PREPARING),
    ]:
        getattr(layer, action)()
        assert layer.state is state, action
    residency = layer._owner()
    residency.move_to(State.ONLOAD)
    assert layer.state is State.ONLOAD
    layer.offload()
    with pytest.raises(IllegalTransitionError):
        residency.move_to(State.PREPARING)


def test_offload_frees_every_copy(managed: Callable[..., nn.Module], x: Tensor) -> None:
    model = managed()
    at_rest = {id(p) for p in model.parameters()}
    model(x)
    copies = [
        weakref.ref(tensor)
        for module in model.modules()
        for tensor in [*module._parameters.values(), module.__dict__.get("weight")]
        if tensor is not None and id(tensor) not in at_rest
    ]
    for layer in layers(model):
        layer.offload()
    assert [ref() for ref in copies if ref() is not None] == []
    assert {id(p) for p in model.parameters()} == at_rest


def test_changing_the_limit_while_running(
    managed: Callable[..., nn.Module], plain: nn.Module, x: Tensor
) -> None:
    model = managed(0)
    assert torch.equal(model(x), plain(x))
    for layer in layers(model):
        assert layer.vram_limit == 0
        layer.vram_limit = None
    assert torch.equal(model(x), plain(x))
    called = [layer for layer in layers(model) if not layer.name.endswith("read")]
    assert all(layer.state is State.PREPARING or layer._owner().resident for layer in called)


def test_sending_all_layers_to_another_device(
    managed: Callable[..., nn.Module], plain: nn.Module, x: Tensor
) -> None:
    model = managed()
    before = [layer.offload_device for layer in layers(model)]
    for layer in layers(model):
        layer.offload_device = "cpu"
        layer.onload_device = "cpu"
        layer.preparing_device = "cpu"
        layer.computation_device = "cpu"
    model.cpu()
    assert torch.equal(model(x.cpu()), plain.cpu()(x.cpu()))
    for layer, device in zip(layers(model), before, strict=True):
        assert layer.offload_device == ("disk" if device == "disk" else torch.device("cpu"))
        assert layer.computation_device == torch.device("cpu")
    assert_invariants(model)


def test_fp8_storage_rounds_once_and_keeps_buffers(
    make_model: Make,
    module_map: ModuleMap,
    make_config: Callable[..., Config],
    x: Tensor,
    device: torch.device,
) -> None:
    stored, computing = torch.float8_e4m3fn, torch.float32
    model = make_model().to(device)
    oracle = copy.deepcopy(model)
    for name, module in oracle.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and name not in ("", "rest"):
                parameter.data = parameter.data.to(stored).to(computing)
    fp8 = make_config((stored, "cpu"), (stored, "cpu"), (stored, device), (computing, device))
    model = enable_vram_management(model, module_map, fp8)
    for _ in range(2):
        assert torch.equal(model(x), oracle(x))
    assert model.blocks[0].up._parameters["weight"].dtype is stored
    assert model.blocks[0].up.weight.dtype is computing
    assert model.blocks[0].norm.shift.dtype is torch.float32


def test_a_whole_model_in_the_map_is_one_layer(
    make_skeleton: Make, plain: nn.Module, vram_config: Config, x: Tensor, device: torch.device
) -> None:
    source = CountingSource(plain.cpu().state_dict())
    plain.to(device)
    skeleton = make_skeleton()
    model = enable_vram_management(skeleton, {type(skeleton): AutoWrappedModule}, vram_config, 0, source)
    assert model is skeleton
    assert model.vram_management_enabled
    for action in ("onload", "offload", "onload"):
        getattr(model, action)()
        assert torch.equal(model(x), plain(x))
    assert len(layers(model)) == 1
    assert_invariants(model)


def test_weights_on_disk_are_read_for_each_forward_and_not_kept(
    make_skeleton: Make, plain: nn.Module, module_map: ModuleMap, disk_config: Config, x: Tensor
) -> None:
    source = CountingSource(plain.cpu().state_dict())
    model = enable_vram_management(make_skeleton(), module_map, disk_config, 0, source)
    model(x)
    source.reads.clear()
    model(x)
    managed_names = [w.name for r in residencies(model) for w in r.weights]
    assert sorted(source.reads) == sorted(managed_names)
    assert all(w.registered.is_meta for r in residencies(model) for w in r.weights)


def test_a_source_that_fails_leaves_the_model_as_it_was(
    make_skeleton: Make,
    plain: nn.Module,
    module_map: ModuleMap,
    vram_config: Config,
    x: Tensor,
    device: torch.device,
) -> None:
    source = CountingSource(plain.cpu().state_dict())
    plain.to(device)
    model = enable_vram_management(make_skeleton(), module_map, vram_config, 0, source)
    if vram_config["offload_device"] != "disk":
        return  # nothing is read after wrapping
    source.failing = {"blocks.1.down.weight"}
    for _ in range(2):
        with pytest.raises(OSError, match=r"blocks\.1\.down\.weight: the disk is gone"):
            model(x)
        assert_invariants(model)
    source.failing = set()
    assert torch.equal(model(x), plain(x))


def test_an_exception_in_forward_gives_everything_back(managed: Callable[..., nn.Module], x: Tensor) -> None:
    model = managed(0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.blocks[0].up(x[..., :3])
    assert_invariants(model)


def test_a_layer_may_call_itself(disk_config: Config) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.0), requires_grad=False)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            inner = self(x, again=False) if again else x
            return inner * self.weight

    config = {**disk_config, "computation_device": "cpu"}
    source = CountingSource({"weight": torch.tensor(3.0)})
    layer = AutoWrappedModule(Twice(), **config, disk_map=source)
    assert layer(torch.tensor(2.0)) == 18.0
    assert source.reads == ["weight"]
    assert_invariants(layer)


def test_during_forward_the_parameters_are_those_of_the_plain_layer() -> None:
    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert [(p.dtype, p.device) for p in self.parameters()] == [(torch.float32, x.device)] * 2
            return super().forward(x.to(next(self.parameters()).dtype))

    stored = {f"{role}_dtype": torch.float8_e4m3fn for role in ("offload", "onload", "preparing")}
    layer = AutoWrappedLinear(Asks(4, 4), **stored, computation_dtype=torch.float32, computation_device="cpu")
    layer(torch.randn(2, 4))
    assert {p.dtype for p in layer.parameters()} == {torch.float8_e4m3fn}
    assert_invariants(layer)


def test_state_written_in_forward_survives(disk_config: Config) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(4).train()
    config = {**disk_config, "computation_device": "cpu"}
    stored = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    layer = AutoWrappedModule(copy.deepcopy(plain), **config, disk_map=stored)
    for _ in range(3):
        x = torch.randn(8, 4)
        assert torch.equal(layer(x), plain(x))
        layer.offload()
    assert torch.equal(layer.running_mean, plain.running_mean)
    assert layer.num_batches_tracked == 3
    assert stored["num_batches_tracked"] == 0


def test_in_place_changes_of_a_copy_are_not_lost(managed: Callable[..., nn.Module]) -> None:
    layer = managed().blocks[0].up
    layer.preparing()
    layer.weight.add_(1)
    changed = layer.weight.clone()
    layer.offload()
    assert torch.equal(layer.weight, changed)
    assert torch.equal(layer.state_dict()["weight"].cpu(), changed.cpu())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: AutoTorchModule(nn.Linear(2, 2), **c), "AutoTorchModule is a base class"),
        (
            lambda c: AutoWrappedLinear(nn.Conv1d(2, 2, 1), **c),
            "wraps nn.Linear; got Conv1d",
        ),
        (lambda c: AutoWrappedModule("x", **c), "AutoWrappedModule wraps a torch.nn.Module; got str"),
        (lambda c: AutoWrappedLinear(nn.Linear(2, 2), **c, onlaod=1), "got an unknown argument 'onlaod'"),
        (
            lambda c: AutoWrappedLinear(nn.Linear(2, 2), **c, vram_limit="8"),
            "must be a number of GiB",
        ),
        (
            lambda c: AutoWrappedLinear(AutoWrappedLinear(nn.Linear(2, 2), **c), **c, name="a.b"),
            'layer "a.b" of class Linear is managed already',
        ),
        (
            lambda c: AutoWrappedLinear(nn.Linear(2, 2), **{**c, "offload_device": "disk"}),
            'parameter "weight" is to be kept on disk, but there is no disk map',
        ),
        (
            lambda c: AutoWrappedModule(nn.LazyLinear(2), **c),
            'parameter "weight" of layer "" has no shape yet',
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_layers_that_make_no_sense_are_refused(make: Callable[[Config], object], message: str) -> None:
    config: Config = {"computation_device": "cpu", "computation_dtype": torch.float32}
    with pytest.raises(ConfigError, match=message):
        make(config)


def test_arguments_for_quantized_layers_are_ignored_by_others() -> None:
    AutoWrappedLinear(nn.Linear(2, 2), computation_device="cpu", quantize=None, metadata={})


def test_what_is_left_of_a_model_leaves_the_budget_when_asked(
    managed: Callable[..., nn.Module], x: Tensor
) -> None:
    model = managed()
    model(x)
    left = residencies(model)
    budget = left[0].budget
    before = budget.statistics().lent_nbytes
    held = sum(residency.leased_nbytes for residency in left if residency.state is State.PREPARING)
    del model
    assert all(residency.try_demote() for residency in left)
    assert budget.statistics().lent_nbytes <= before - held
    assert sum(residency.leased_nbytes for residency in left) == 0


def test_a_model_that_nobody_holds_is_freed_at_once(managed: Callable[..., nn.Module], x: Tensor) -> None:
    model = managed()
    model(x)
    layer = weakref.ref(model.blocks[0].up)
    weight = weakref.ref(model.blocks[0].up.weight)
    gc.disable()
    try:
        del model
        assert layer() is None
        assert weight() is None
    finally:
        gc.enable()


class Casting(nn.Module):
    """Reads the dtype of a weight before it calls the layer, as some text encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x.to(self.down.weight.dtype))  # type: ignore[no-any-return]


def test_weights_that_are_read_before_the_call_are_no_second_forward(x: Tensor) -> None:
    blocks = nn.Sequential(*(Casting() for _ in range(20)))
    before, nbytes = copy.deepcopy(blocks), sum(p.nbytes for p in blocks.parameters())
    config = {f"{role}_{what}": "disk" for role in ("offload", "onload") for what in ("dtype", "device")}
    config |= {f"{role}_device": "cpu" for role in ("preparing", "computation")}
    config |= {f"{role}_dtype": torch.float32 for role in ("preparing", "computation")}
    source = CountingSource(blocks.state_dict())
    model = enable_vram_management(blocks, {nn.Linear: AutoWrappedLinear}, config, nbytes / 2 / GIB, source)
    with_own_budget(model)
    x, reads = torch.randn(2, 4), []
    for _ in range(4):
        source.reads.clear()
        assert torch.equal(model(x), before(x))
        reads.append(len(source.reads))
    assert reads[0] <= 2 * 40 + 2  # each layer once, a weight and a bias
    assert reads[2] < reads[0]
    assert sum(residency.resident for residency in residencies(model)) >= 15


def test_a_limit_that_is_lowered_is_obeyed_at_once(x: Tensor) -> None:
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    config = {f"{role}_{what}": "disk" for role in ("offload", "onload") for what in ("dtype", "device")}
    config |= {f"{role}_device": "cpu" for role in ("preparing", "computation")}
    config |= {f"{role}_dtype": torch.float32 for role in ("preparing", "computation")}
    source = CountingSource(model.state_dict())
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config, 1.0, source)
    budget = with_own_budget(model)
    model(torch.randn(2, 4))
    assert budget.statistics().residents == 5
    for layer in model:
        layer.vram_limit = 4 * 80 / GIB
    assert budget.statistics().lent_nbytes <= 2 * 80  # two pass
    for layer in model:
        layer.vram_limit = 0
    assert budget.statistics().lent_nbytes == 0


def staying_from_disk() -> tuple[Any, CountingSource]:
    """Return a model of which all stays, and its source."""
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    config = {f"{role}_{what}": "disk" for role in ("offload", "onload") for what in ("dtype", "device")}
    config |= {f"{role}_device": "cpu" for role in ("preparing", "computation")}
    config |= {f"{role}_dtype": torch.float32 for role in ("preparing", "computation")}
    source = CountingSource(model.state_dict())
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config, None, source)
    model(torch.randn(2, 4))
    return model, source


@pytest.mark.parametrize("change", ["in place", "through data", "one value through data"])
def test_what_is_changed_in_a_layer_that_stays_is_kept(change: str) -> None:
    model, source = staying_from_disk()
    assert all(residency.resident for residency in residencies(model))
    wanted = {name: source[name].clone() for name in source}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if change == "in place":
                parameter += 1
                wanted[name] += 1
            elif change == "through data":
                parameter.data += 1
                wanted[name] += 1
            else:
                parameter.data.view(-1)[3] = 0.5
                wanted[name].view(-1)[3] = 0.5
    for state in (model.state_dict(), copy.deepcopy(model).state_dict()):
        assert all(torch.equal(state[name], values) for name, values in wanted.items())
    for layer in model:
        layer.offload()
    assert all(torch.equal(model.state_dict()[name], values) for name, values in wanted.items())
    assert_invariants(model)


def test_what_leaves_in_inference_mode_can_be_trained_afterwards() -> None:
    model, _ = staying_from_disk()
    with torch.no_grad():
        model[0].weight.add_(1)
    with torch.inference_mode():
        for layer in model:
            layer.offload()
    assert not any(parameter.is_inference() for parameter in model.parameters())
    with torch.enable_grad():
        model(torch.randn(2, 4)).sum().backward()
    model.load_state_dict(model.state_dict())


def test_what_was_fetched_ahead_for_layers_that_stay_is_dropped() -> None:
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    config = {f"{role}_{what}": "disk" for role in ("offload", "onload") for what in ("dtype", "device")}
    config |= {f"{role}_device": "cpu" for role in ("preparing", "computation")}
    config |= {f"{role}_dtype": torch.float32 for role in ("preparing", "computation")}
    source = CountingSource(model.state_dict())
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config, 4 * 80 / GIB, source)
    budget = with_own_budget(model)
    for _ in range(2):
        model(torch.randn(2, 4))
    for layer in model:
        layer.vram_limit = None
    for _ in range(2):
        model(torch.randn(2, 4))
    assert budget.statistics().lent_nbytes == 8 * 80


def test_a_single_layer_obeys_a_lowered_limit() -> None:
    linear = nn.Linear(4, 4)
    config: Any = {f"{role}_{what}": "disk" for role in ("offload", "onload") for what in ("dtype", "device")}
    config |= {f"{role}_device": "cpu" for role in ("preparing", "computation")}
    config |= {f"{role}_dtype": torch.float32 for role in ("preparing", "computation")}
    layer = AutoWrappedLinear(linear, **config, disk_map=dict(linear.state_dict()))
    layer(torch.randn(2, 4))
    assert layer.state is State.PREPARING
    layer.vram_limit = 0
    assert layer.state is State.ONLOAD
