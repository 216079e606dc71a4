"""Every way of loading gives the plain model: outputs are compared bit by bit."""

import copy
import gc

import pytest
import torch
from diffsynth_core_vram import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    enable_vram_management,
    load_model,
    load_state_dict,
    skip_model_initialization,
)
from torch import nn

FP8 = torch.float8_e4m3fn
GIB = 1024**3


@pytest.fixture
def plain(case):
    """The model as torch alone builds it."""
    return case.build()


@pytest.fixture
def file(plain, save, tmp_path):
    """Its checkpoint."""
    return save(plain, tmp_path / "model.safetensors")


def settings(offload, onload, preparing, computation):
    """Return a ``vram_config``; each argument is ``"disk"`` or a pair of dtype and device."""
    roles = {"offload": offload, "onload": onload, "preparing": preparing, "computation": computation}
    config = {}
    for role, where in roles.items():
        config[f"{role}_dtype"], config[f"{role}_device"] = ("disk", "disk") if where == "disk" else where
    return config


def with_dtype(model, dtype):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def nbytes(model):
    return sum(p.numel() * p.itemsize for p in model.parameters())


def assert_equal(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected), (
        f"largest difference {(found.float() - expected.float()).abs().max()}"
    )


def test_skipped_initialization_then_load_state_dict(case, plain, file, device):
    with skip_model_initialization():
        model = case.model_class(**case.config)
    state = load_state_dict(str(file), device="cpu")
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for name in missing:  # names of tied parameters, which torch alone does not load
        model.get_parameter(name)
        owner, _, attribute = name.rpartition(".")
        same = next(n for n, p in parameters.items() if p is parameters[name] and n in state)
        setattr(model.get_submodule(owner), attribute, model.get_parameter(same))
    assert_equal(case.call(model.eval().to(device), device), case.call(plain.to(device), device))


def test_plain(case, plain, file, device):
    model = load_model(case.model_class, str(file), case.config, torch_dtype=None, device=device)
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert_equal(case.call(model, device), case.call(plain.to(device), device))


def test_plain_in_another_dtype(case, plain, file, device):
    model = load_model(case.model_class, str(file), case.config, torch_dtype=torch.float64, device=device)
    expected = plain.to(device, torch.float64)
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, expected.state_dict()[name])


def test_ties_stay_ties(case, plain, file):
    def ties(model):
        groups = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), set()).add(name)
        return sorted(map(sorted, groups.values()))

    assert ties(load_model(case.model_class, str(file), case.config)) == ties(plain)


@pytest.mark.parametrize("vram_limit", [None, 0], ids=["unlimited", "nothing stays"])
def test_cpu_offload(case, plain, file, device, module_map, vram_limit):
    host, compute = (case.dtype, "cpu"), (case.dtype, device)
    config = settings(host, host, compute, compute)
    model = load_model(
        case.model_class,
        str(file),
        case.config,
        module_map=module_map,
        vram_config=config,
        vram_limit=vram_limit,
    )
    expected = case.call(plain.to(device), device)
    for _ in range(2):
        assert_equal(case.call(model, device), expected)


def round_trip(plain, managed, dtype):
    """Do to *plain* what storing the weights of the managed layers in eight bits does."""
    for name, module in managed.named_modules():
        if isinstance(module, AutoTorchModule):
            recurse = not name or isinstance(module, (AutoWrappedModule, nn.Linear))
            for parameter in plain.get_submodule(name).parameters(recurse=recurse):
                parameter.data = parameter.data.to(FP8).to(dtype)
    return plain


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_fp8_storage(case, plain, file, device, module_map, offload):
    stored = (FP8, "cpu") if offload == "cpu" else "disk"
    config = settings(stored, stored, (FP8, device), (case.dtype, device))
    model = load_model(
        case.model_class,
        str(file),
        case.config,
        module_map=module_map,
        vram_config=config,
        vram_limit=None,
    )
    before = case.call(plain.to(device), device)
    expected = case.call(round_trip(plain, model, case.dtype), device)
    assert not torch.equal(before, expected)
    for _ in range(2):
        assert_equal(case.call(model, device), expected)


@pytest.mark.parametrize("room", ["none", "half", "all"])
def test_dynamic_limit(case, plain, file, device, module_map, room):
    gc.collect()  # layers of earlier models count in the budget of the device for as long as they live
    # at rest in eight bits, so that staying ready to compute costs memory where the device is the CPU, too
    stored, compute = (FP8, "cpu"), (case.dtype, device)
    largest = max(nbytes(module) for module in plain.modules() if not next(module.children(), None))
    limit = {"none": 0, "half": largest + nbytes(plain) // 2, "all": largest + 2 * nbytes(plain)}[room]
    model = load_model(
        case.model_class,
        str(file),
        case.config,
        module_map=module_map,
        vram_config=settings(stored, stored, compute, compute),
        vram_limit=limit / GIB,
    )
    expected = case.call(round_trip(plain, model, case.dtype).to(device), device)
    for _ in range(2):
        assert_equal(case.call(model, device), expected)
    states = [module.state.name for module in model.modules() if isinstance(module, AutoTorchModule)]
    if room == "none":
        assert "PREPARING" not in states
    elif device.type == "cpu":  # on others, what else is on the device counts
        assert "PREPARING" in states
        assert ("ONLOAD" in states) == (room == "half")  # in OFFLOAD are layers that the model does not call


@pytest.mark.parametrize("vram_limit", [0, None], ids=["disk", "disk and preparing"])
def test_disk_offload(case, plain, file, device, module_map, vram_limit):
    compute = (case.dtype, device)
    model = load_model(
        case.model_class,
        str(file),
        case.config,
        module_map=module_map,
        vram_config=settings("disk", "disk", compute, compute),
        vram_limit=vram_limit,
    )
    expected = case.call(plain.to(device), device)
    assert all(
        p.is_meta
        for m in model.modules()
        if isinstance(m, AutoTorchModule)
        for p in m.parameters(recurse=False)
    )
    for _ in range(2):
        assert_equal(case.call(model, device), expected)
    for name, tensor in plain.state_dict().items():
        assert_equal(model.state_dict()[name].cpu(), tensor.cpu())


def test_disk_offload_of_some_layers(case, plain, file, device):
    """The documented map: linear layers only; everything else is simply loaded."""
    compute = (case.dtype, device)
    model = load_model(
        case.model_class,
        str(file),
        case.config,
        module_map={nn.Linear: AutoWrappedLinear},
        vram_config=settings("disk", "disk", compute, compute),
        vram_limit=0,
    )
    assert_equal(case.call(model, device), case.call(plain.to(device), device))


def test_whole_model_as_one_layer(case, plain, file, device):
    compute = (case.dtype, device)
    model = load_model(
        case.model_class,
        str(file),
        case.config,
        module_map={case.model_class: AutoWrappedModule},
        vram_config=settings("disk", "disk", compute, compute),
        vram_limit=None,
    )
    assert_equal(case.call(model, device), case.call(plain.to(device), device))
    model.offload()
    assert all(p.is_meta for p in model.parameters())


def test_management_after_loading(case, plain, file, device, module_map):
    model = load_model(case.model_class, str(file), case.config, torch_dtype=None, device="cpu")
    host, compute = (case.dtype, "cpu"), (case.dtype, device)
    config = settings(host, host, compute, compute)
    assert enable_vram_management(model, module_map, vram_config=config, vram_limit=0) is model
    assert_equal(case.call(model, device), case.call(plain.to(device), device))


@pytest.mark.parametrize("kind", ["shards", "index", "folder", "pickle"])
def test_other_kinds_of_files(case, plain, device, module_map, tmp_path, kind):
    if kind == "pickle":
        path = tmp_path / "model.bin"
        torch.save(plain.state_dict(), path)
    else:
        plain.save_pretrained(tmp_path, max_shard_size=f"{nbytes(plain) // 3000}KB")
        (index,) = tmp_path.glob("*.index.json")
        shards = sorted(str(shard) for shard in tmp_path.glob("*.safetensors"))
        assert len(shards) > 1
        path = {"shards": shards, "index": str(index), "folder": str(tmp_path)}[kind]
    compute = (case.dtype, device)
    model = load_model(
        case.model_class,
        path,
        case.config,
        module_map=module_map,
        vram_config=settings("disk", "disk", compute, compute),
    )
    assert_equal(case.call(model, device), case.call(plain.to(device), device))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_file_in_another_dtype(case, plain, save, tmp_path, device, module_map, offload):
    """Published checkpoints are often in single precision, and computed with in half."""
    wide = with_dtype(copy.deepcopy(plain), torch.float64)
    file = save(wide, tmp_path / "model.safetensors")
    stored, compute = (case.dtype, "cpu") if offload == "cpu" else "disk", (case.dtype, device)
    model = load_model(
        case.model_class,
        str(file),
        case.config,
        module_map=module_map,
        vram_config=settings(stored, stored, compute, compute),
        vram_limit=0,
    )
    assert_equal(case.call(model, device), case.call(plain.to(device), device))
