"""``load_model`` on small models: what is loaded, and what is refused."""

import threading
from collections.abc import Mapping

import pytest
import torch
from diffsynth_core_vram import (
    AutoWrappedLinear,
    AutoWrappedModule,
    CheckpointMismatchError,
    load_model,
    skip_model_initialization,
)
from diffsynth_core_vram._rehearse import rehearse
from safetensors.torch import save_file
from torch import nn

FP8 = torch.float8_e4m3fn


class Net(nn.Module):
    """Something of everything: a tie, a parameter in the root, persistent and other buffers, integers."""

    def __init__(self, width=8, words=5):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(width))
        self.steps = nn.Parameter(torch.tensor([2**24 + 1]), requires_grad=False)
        self.register_buffer("offset", torch.zeros(width))
        self.register_buffer("table", torch.linspace(0, 1, width), persistent=False)

    def forward(self, x):  # (batch,)
        return self.head(self.norm(self.embed(x) * self.scale + self.offset + self.table))


@pytest.fixture
def plain():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.scale.normal_()
        model.offset.normal_()
        model.norm.running_mean.normal_()
    return model


@pytest.fixture
def state(plain):
    """The checkpoint, with the tied parameter under its first name only."""
    return {name: tensor.clone() for name, tensor in plain.state_dict().items() if name != "head.weight"}


@pytest.fixture
def file(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def everywhere(where, dtype=torch.float32):
    """Return a ``vram_config`` that keeps weights at *where* and computes on the CPU."""
    at_rest = ("disk", "disk") if where == "disk" else (dtype, where)
    config = {"computation_dtype": torch.float32, "computation_device": "cpu"}
    for role in ("offload", "onload", "preparing"):
        config[f"{role}_dtype"], config[f"{role}_device"] = at_rest
    return config


LAYERS = {nn.Linear: AutoWrappedLinear, nn.Embedding: AutoWrappedModule, nn.BatchNorm1d: AutoWrappedModule}
X = torch.arange(5)


# -- what is loaded -------------------------------------------------------------------------------------


def test_plain(plain, file):
    model = load_model(Net, file, torch_dtype=None)
    assert type(model) is Net
    assert not model.training
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model(X), plain(X))


def test_model_loaded_in_a_block_keeps_its_weights(plain, file):
    with skip_model_initialization():
        model = load_model(Net, file, torch_dtype=None)
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_managed_model_loaded_in_a_block_has_its_weights_there_and_afterwards(plain, file, where):
    with skip_model_initialization():
        model = load_model(Net, file, module_map=LAYERS, vram_config=everywhere(where))
        inside = model(X)
    assert torch.equal(inside, plain(X))
    assert torch.equal(model(X), plain(X))


def test_configuration_is_passed_on():
    model = load_model(
        nn.Linear, "", {"in_features": 2, "out_features": 3}, state_dict=nn.Linear(2, 3).state_dict()
    )
    assert (model.in_features, model.out_features) == (2, 3)


def test_dtype_is_for_floating_point_only(file):
    model = load_model(Net, file, torch_dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    integers = {"steps": torch.int64, "norm.num_batches_tracked": torch.int64}
    assert dtypes == {name: integers.get(name, torch.bfloat16) for name in dtypes}
    assert model.steps.item() == 2**24 + 1


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.phase = nn.Parameter(torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("stored", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("computed", torch.polar(torch.ones(3), torch.arange(3.0)), persistent=False)
        self.register_buffer("table", torch.ones(3), persistent=False)


def test_complex_tensors_stay_complex(recwarn):
    plain = Complex()
    model = load_model(Complex, "", state_dict=plain.state_dict())
    for name in ("phase", "stored", "computed"):
        assert torch.equal(getattr(model, name), getattr(plain, name)), name
    assert isinstance(model.phase, nn.Parameter)
    assert model.linear.weight.dtype == model.table.dtype == torch.bfloat16
    assert not recwarn.list


def test_gradient_flags_and_ties_are_those_of_the_class(file):
    model = load_model(Net, file)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.requires_grad
    assert not model.steps.requires_grad


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_tied_parameter_may_be_saved_under_either_name(plain, state, kept):
    state[kept] = state.pop("embed.weight")
    assert torch.equal(load_model(Net, "", torch_dtype=None, state_dict=state)(X), plain(X))


def test_tied_parameter_saved_twice(plain, state):
    state["head.weight"] = state["embed.weight"].clone()
    model = load_model(Net, "", torch_dtype=None, state_dict=state)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_tied_parameter_of_managed_layers_is_in_memory_once(file, dtype):
    model = load_model(Net, file, module_map=LAYERS, vram_config=everywhere("cpu", dtype), vram_limit=0)
    held = [module._parameters["weight"] for module in (model.embed, model.head)]
    assert held[0].dtype == held[1].dtype == dtype
    assert held[0].data_ptr() == held[1].data_ptr()


def test_tied_parameter_saved_with_two_values(state):
    state["head.weight"] = state["embed.weight"] + 1
    message = (
        'Net ties "embed.weight" and "head.weight", but the checkpoint has different values for them. Build '
        "the model without the tie (often tie_word_embeddings=False), or drop one with a "
        "state_dict_converter=."
    )
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(Net, "", state_dict=state)
    assert str(caught.value) == message


def test_state_dict_is_used_instead_of_files(plain, state):
    before = dict(state)
    model = load_model(Net, "there is no such file", torch_dtype=None, state_dict=state)
    assert torch.equal(model(X), plain(X))
    assert state.keys() == before.keys()
    assert all(state[name] is before[name] for name in before)


@pytest.mark.parametrize("stored", [torch.tensor(7.0), torch.tensor([7.0])])
def test_tied_scalar_stays_tied(stored):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ParameterList([torch.tensor(2.0)])
            self.b = nn.ParameterList(self.a)

    model = load_model(Tied, "", state_dict={"a.0": stored})
    assert model.a[0] is model.b[0]
    assert model.a[0].shape == ()
    assert model.a[0].item() == 7


@pytest.mark.parametrize("where", [None, "cpu", "disk"])
def test_converter(plain, state, tmp_path, where):
    save_file(
        {f"model.{name}": t for name, t in state.items()} | {"extra": torch.ones(1)},
        tmp_path / "model.safetensors",
    )

    def without_prefix(checkpoint):
        return {name[len("model.") :]: checkpoint[name] for name in checkpoint if name != "extra"}

    managed = {} if where is None else {"module_map": LAYERS, "vram_config": everywhere(where)}
    path = str(tmp_path / "model.safetensors")
    model = load_model(Net, path, torch_dtype=None, state_dict_converter=without_prefix, **managed)
    assert torch.equal(model(X), plain(X))


def test_converter_that_computes(plain, state, tmp_path):
    halves = state.pop("scale").chunk(2)
    save_file(
        state | {"scale.0": halves[0].clone(), "scale.1": halves[1].clone()}, tmp_path / "model.safetensors"
    )

    def joined(checkpoint):
        rest = {name: checkpoint[name] for name in checkpoint if not name.startswith("scale.")}
        return rest | {"scale": torch.cat([checkpoint["scale.0"], checkpoint["scale.1"]])}

    path = str(tmp_path / "model.safetensors")
    on_disk = {"module_map": LAYERS, "vram_config": everywhere("disk")}
    for managed in ({}, {"module_map": LAYERS, "vram_config": everywhere("cpu")}, on_disk):
        model = load_model(Net, path, torch_dtype=None, state_dict_converter=joined, **managed)
        for _ in range(2):
            assert torch.equal(model(X), plain(X))


def test_wrapped_pickle(plain, state, tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save({"state_dict": state}, path)
    options = {"torch_dtype": None, "state_dict_converter": lambda checkpoint: dict(checkpoint)}
    for given in (
        {"torch_dtype": None},
        options,
        options | {"use_disk_map": True, "state_dict_converter": lambda checkpoint: checkpoint["state_dict"]},
        {"module_map": LAYERS, "vram_config": everywhere("disk")},
    ):
        assert torch.equal(load_model(Net, path, **given)(X), plain(X))


def test_converter_of_a_state_dict(plain, state):
    renamed = {f"model.{name}": tensor for name, tensor in state.items()}
    model = load_model(
        Net,
        "",
        torch_dtype=None,
        state_dict=renamed,
        state_dict_converter=lambda checkpoint: {name[6:]: checkpoint[name] for name in checkpoint},
    )
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("vram_limit", [None, 0])
@pytest.mark.parametrize("module_map", [LAYERS, {Net: AutoWrappedModule}], ids=["layers", "whole"])
def test_managed(plain, file, where, vram_limit, module_map):
    model = load_model(Net, file, module_map=module_map, vram_config=everywhere(where), vram_limit=vram_limit)
    assert not model.training
    assert model.vram_management_enabled
    for _ in range(2):
        assert torch.equal(model(X), plain(X))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_managed_in_eight_bits(plain, file):
    model = load_model(Net, file, module_map=LAYERS, vram_config=everywhere("cpu", FP8), vram_limit=0)
    assert model.head._parameters["weight"].dtype == FP8
    with torch.no_grad():
        for parameter in (plain.embed.weight, plain.norm.weight, plain.norm.bias):
            parameter.copy_(parameter.to(FP8))
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_parameters_outside_layers_compute_in_the_dtype_of_the_layers(plain, file, where):
    half = {"computation_dtype": torch.bfloat16, "preparing_dtype": torch.bfloat16, "preparing_device": "cpu"}
    config = everywhere(where, torch.bfloat16) | half
    model = load_model(Net, file, module_map=LAYERS, vram_config=config, vram_limit=0)
    assert model.scale.dtype == torch.bfloat16
    assert model.steps.dtype == torch.int64
    assert torch.equal(model.scale, plain.scale.to(torch.bfloat16))


@pytest.mark.slow
def test_modules_that_rename_their_entries_are_heard(tmp_path):
    def weight_normed():
        return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))

    plain = weight_normed()
    old = {
        "bias": plain.bias.detach(),
        "weight_g": plain.parametrizations.weight.original0.detach(),
        "weight_v": plain.parametrizations.weight.original1.detach(),
    }
    model = load_model(weight_normed, "", torch_dtype=None, state_dict=old)
    x = torch.randn(4, 3)
    assert torch.equal(model(x), plain(x))


# -- modules that have a say in what they load -----------------------------------------------------------


class Folding(nn.Module):
    """Folds a scale into its weight once that is loaded, and counts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.register_buffer("gain", torch.ones(1), persistent=False)
        self.is_folded = False
        self.register_load_state_dict_post_hook(lambda module, keys: self.fold())

    def fold(self):
        if not self.is_folded:
            self.linear.weight.data.mul_(4)
            self.is_folded = True

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.gain *= 3
        if f"{prefix}old" in state_dict:
            state_dict[f"{prefix}linear.weight"] = state_dict.pop(f"{prefix}old")
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize("name", ["linear.weight", "old"])
def test_hooks_run_once_on_weights_that_are_there(name):
    model = load_model(Folding, "", torch_dtype=None, state_dict={name: torch.eye(2)})
    assert torch.equal(model.linear.weight, 4 * torch.eye(2))
    assert model.gain.item() == 3


class Held(nn.Module):
    """Its entries in a checkpoint are those of another time."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3, bias=False)
        self.register_buffer("steps", torch.zeros(3))
        self.plain = torch.ones(3) * torch.ones(1, requires_grad=True)  # deepcopy refuses it


class Renaming(Held):
    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(
            lambda module, state, *_: state.update(steps=state.pop("old") * module.plain.detach())
        )


class Transposing(Held):
    def _load_from_state_dict(self, state_dict, *args):
        state_dict["linear.weight"] = state_dict["linear.weight"].T
        super()._load_from_state_dict(state_dict, *args)


class ByVersion(Held):
    def _load_from_state_dict(self, state_dict, *args):
        if state_dict.pop("version").item() == 1:
            state_dict["linear.weight"] = state_dict["linear.weight"].T
        super()._load_from_state_dict(state_dict, *args)


class Locked(Renaming):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()  # which deepcopy refuses


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.ParameterList()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in [name for name in state_dict if name.startswith("rows.")]:
            self.rows.append(nn.Parameter(torch.zeros(state_dict[name].shape)))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Headless(nn.Module):
    """Took its head away: torch lets checkpoints have one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.head = nn.Linear(3, 3)
        self.head = None


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(3)


HELD = {"linear.weight": torch.arange(6.0).view(3, 2), "steps": torch.arange(3.0)}
TRANSPOSED = HELD | {"linear.weight": torch.arange(6.0).view(2, 3)}
LINEAR = {f"linear.{name}": tensor for name, tensor in nn.Linear(2, 3).state_dict().items()}


@pytest.mark.parametrize(
    ("model_class", "state"),
    [
        (Renaming, {"linear.weight": HELD["linear.weight"], "old": torch.arange(3.0)}),
        (Locked, {"linear.weight": HELD["linear.weight"], "old": torch.arange(3.0)}),
        (Transposing, TRANSPOSED),
        (ByVersion, TRANSPOSED | {"version": torch.tensor(1)}),
        (Growing, {"rows.0": torch.ones(2), "rows.1": torch.ones(3)}),
        (Headless, LINEAR | {"head.weight": torch.ones(3, 3)}),
        (Lazy, LINEAR),
    ],
)
def test_what_modules_accept_is_not_refused(model_class, state):
    expected = model_class()
    expected.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    model = load_model(model_class, "", torch_dtype=None, state_dict=state)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_misfits_of_a_model_with_hooks_are_reported():
    state = {"linear.weight": torch.ones(2, 9), "old": torch.ones(3), "odd": torch.ones(1)}
    with pytest.raises(CheckpointMismatchError, match=r'1 unexpected: "odd"') as caught:
        load_model(Renaming, "", state_dict=state)
    assert caught.value.mismatched == ["linear.weight"]
    assert caught.value.missing == []


def test_misfits_of_a_model_that_cannot_be_copied_are_reported():
    class Plain(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.lock = threading.Lock()

    state = {"weight": torch.ones(3, 3), "bais": torch.ones(3)}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(Plain, "", state_dict=state)
    found = caught.value
    assert (found.missing, found.unexpected, found.mismatched) == (["bias"], ["bais"], ["weight"])


def test_check_copies_no_tensor():
    model = Net()
    model.plain, model.more = torch.ones(2), [nn.Parameter(torch.ones(2))]
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append(module))
    seen = []
    copied, missing, unexpected = rehearse(model, {"odd": None})
    assert (len(missing), unexpected) == (9, ["odd"])
    assert seen == []  # what a hook encloses is copied, too
    assert copied.head.weight is copied.embed.weight
    for tensor in (*copied.parameters(), *copied.buffers(), copied.plain, *copied.more):
        assert tensor.is_meta or tensor is copied.norm.num_batches_tracked  # which BatchNorm sets itself
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), model.plain))


# -- extra state, and what is no tensor -----------------------------------------------------------------


class WithExtra(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.extra, self.calls = None, 0

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.calls += 1
        self.extra = state.item() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("extra", [{"scale": 3}, torch.tensor(7)], ids=["dict", "tensor"])
@pytest.mark.parametrize("converter", [None, dict])
def test_extra_state(tmp_path, extra, converter):
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2).state_dict() | {"_extra_state": extra}, path)
    model = load_model(WithExtra, str(path), state_dict_converter=converter)
    assert model.extra == ({"scale": 3} if isinstance(extra, dict) else 7)
    assert model.calls == 1


def test_misfits_beside_extra_state(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(2, 2), "_extra_state": torch.tensor(7)}, path)
    with pytest.raises(CheckpointMismatchError, match='1 missing: "bias"'):
        load_model(WithExtra, str(path))


def test_what_is_no_tensor_is_a_misfit(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": [1], "bias": torch.ones(2), "epoch": 3, "optimizer": {"a": torch.ones(1)}}, path)
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(nn.Linear, str(path), {"in_features": 2, "out_features": 2})
    assert str(caught.value).splitlines()[1:] == [
        '    2 unexpected: "epoch", "optimizer"',
        '    1 of another shape: "weight" (no tensor, but (2, 2) in the model)',
        "    Pass the config= of this checkpoint, or a state_dict_converter= that renames or drops tensors.",
    ]


# -- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, "cpu", "disk"])
def test_misfits_are_reported_together(state, where, tmp_path):
    state["model.norm.weight"] = state.pop("norm.weight")
    state["scael"] = state.pop("scale")
    state["table"] = torch.zeros(8)
    state["offset"] = torch.zeros(9)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    managed = {} if where is None else {"module_map": LAYERS, "vram_config": everywhere(where)}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(Net, str(path), **managed)
    assert str(caught.value).splitlines()[0] == "the checkpoint does not fit Net; it has 10 tensors:"
    assert sorted(str(caught.value).splitlines()[1:]) == sorted(
        [
            '    2 missing: "scale" (is it "scael"?), "norm.weight" (is it "model.norm.weight"?)',
            '    3 unexpected: "model.norm.weight" (is it "norm.weight"?), "scael" (is it "scale"?), "table" '
            "(the model computes it itself)",
            '    1 of another shape: "offset" ((9,), but (8,) in the model)',
            "    Pass the config= of this checkpoint, or a state_dict_converter= that renames or drops "
            "tensors.",
        ]
    )
    assert set(caught.value.missing) == {"scale", "norm.weight"}
    assert set(caught.value.unexpected) == {"model.norm.weight", "scael", "table"}
    assert caught.value.mismatched == ["offset"]
    assert isinstance(caught.value, RuntimeError)  # which is what load_state_dict raises


@pytest.mark.parametrize("where", [None, "cpu", "disk"])
def test_complex_tensors_for_real_parameters(state, where):
    state["scale"] = state["scale"] * 1j
    managed = {} if where is None else {"module_map": LAYERS, "vram_config": everywhere(where)}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(Net, "", state_dict=Unreadable(state), **managed)
    assert str(caught.value).splitlines()[1] == (
        '    1 complex, which a real dtype would halve: "scale" (complex64, but float32 in the model)'
    )
    assert str(caught.value).endswith("Complex values are kept where no dtype is asked for.")
    assert caught.value.mismatched == ["scale"]


def test_complex_tensors_are_kept_where_dtypes_are(state):
    state["scale"] = state["scale"] * 1j
    assert torch.equal(load_model(Net, "", torch_dtype=None, state_dict=state).scale, state["scale"])


def test_long_lists_are_cut(state):
    renamed = {f"x{i}": torch.zeros(1) for i in range(1000)}
    with pytest.raises(CheckpointMismatchError, match="and 995 more") as caught:
        load_model(Net, "", state_dict=renamed)
    assert len(str(caught.value)) < 1000
    assert len(caught.value.unexpected) == 1000


class Unreadable(Mapping):
    """Describes its tensors, but will not give them."""

    def __init__(self, state):
        self.state = state

    def __getitem__(self, name):
        raise AssertionError(f"{name} was read")

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)

    def __contains__(self, name):
        return name in self.state

    def info(self, name):
        return self.state[name]


@pytest.mark.parametrize("where", [None, "cpu", "disk"])
def test_misfits_are_found_before_anything_is_read(state, where):
    del state["scale"]
    managed = {} if where is None else {"module_map": LAYERS, "vram_config": everywhere(where)}
    with pytest.raises(CheckpointMismatchError):
        load_model(Net, "", state_dict=Unreadable(state), **managed)


def test_layers_on_disk_are_not_read(state):
    whole = {Net: AutoWrappedModule}
    stored = {
        name: tensor for name, tensor in state.items() if name not in ("offset",) and "norm.r" not in name
    }
    del stored["norm.num_batches_tracked"]
    assert stored.keys() < state.keys()
    with pytest.raises(AssertionError, match="was read"):  # persistent buffers are, and nothing else
        load_model(Net, "", state_dict=Unreadable(state), module_map=whole, vram_config=everywhere("disk"))


def test_module_map_without_settings(file):
    with pytest.raises(
        ValueError, match=r"^module_map says which layers are managed, vram_config where they are"
    ):
        load_model(Net, file, module_map=LAYERS)


def test_settings_without_module_map_are_ignored(plain, file):
    model = load_model(Net, file, torch_dtype=None, vram_config=everywhere("disk"), vram_limit=0)
    assert not hasattr(model, "vram_management_enabled")
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"onlaod_device": "cpu"}, {}, r'unknown key .onlaod_device.\. Did you mean "onload_device"\?'),
        ({"onload_device": "cqu"}, {}, "onload_device 'cqu' is no device that torch knows"),
        ({"onload_dtype": "float16"}, {}, "onload_dtype must be a torch.dtype"),
        ({}, {"vram_limit": "8GB"}, "vram_limit must be a number of GiB or None"),
        ({}, {"vram_limit": -1}, "vram_limit must be zero GiB or more"),
    ],
    ids=["unknown key", "no device", "no dtype", "limit no number", "limit negative"],
)
def test_bad_settings(state, settings, options, message):
    source = Unreadable(state)  # refused before anything is read
    config = everywhere("cpu") | settings
    with pytest.raises(ValueError, match=message):
        load_model(Net, "", state_dict=source, module_map=LAYERS, vram_config=config, **options)
