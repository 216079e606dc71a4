"""``load_model(quantize=...)`` with an object that has the methods of DiffSynth's ``QuantizeConfig``."""

import json

import pytest
import torch
from diffsynth_core_vram import AutoWrappedLinear, AutoWrappedModule, load_model
from offload_layers import AutoWrappedQuantizedModule
from safetensors.torch import save_file
from torch import nn

BF16 = torch.bfloat16


class Int8Linear(nn.Linear):
    """Weights in int8, with a scale in float32 that no cast may touch."""

    def __init__(self, in_features, out_features, device="cpu"):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        packed = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=BF16, device=device), requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features, 1, device=device))

    def forward(self, x):
        assert self.scale.dtype == torch.float32
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


class Quantize:
    """Quantizes every linear layer of which the name ends with ``proj``."""

    def __init__(self, mode="dynamic", load_prequantized=False):
        self.mode, self.load_prequantized = mode, load_prequantized
        self.calls = []

    def is_quantized_linear(self, module):
        return isinstance(module, Int8Linear)

    def _replace(self, model, make):
        for name, module in list(model.named_modules()):
            if name.endswith("proj"):
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], make(module))
        return model

    def prepare_for_prequantized_load(self, model, compute_dtype):
        self.calls.append(("prepare", compute_dtype))
        return self._replace(model, lambda m: Int8Linear(m.in_features, m.out_features, "meta"))

    def build_quantized_shell(self, module, compute_dtype, layer_name):
        return Int8Linear(module.in_features, module.out_features, "meta")

    def unflatten_state_dict(self, state, metadata):
        assert json.loads(metadata["packed"]) == ["proj.weight"]
        return {name.replace(".packed", ".weight"): tensor for name, tensor in state.items()}

    def quantize_model(self, model, compute_device, model_device):
        self.calls.append(("quantize", torch.device(compute_device), torch.device(model_device)))
        return model if self.load_prequantized else self._replace(model, self._quantized)

    def dequantize_model(self, model, compute_dtype, compute_device, model_device):
        if self.mode != "dequant_once":
            return model
        return self._replace(model, lambda m: self._restored(m, compute_dtype))

    @staticmethod
    def _quantized(linear):
        new = Int8Linear(linear.in_features, linear.out_features)
        new.scale = linear.weight.detach().float().abs().amax(1, keepdim=True) / 127
        new.weight.data.copy_((linear.weight.detach() / new.scale).round())
        new.bias.data.copy_(linear.bias.detach())
        return new

    @staticmethod
    def _restored(packed, dtype):
        new = nn.Linear(packed.in_features, packed.out_features, dtype=dtype)
        new.load_state_dict({"weight": packed.weight * packed.scale, "bias": packed.bias})
        return new.requires_grad_(False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.proj = nn.Linear(16, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        return self.out(self.proj(self.norm(x)))


LAYERS = {nn.Linear: AutoWrappedLinear, nn.LayerNorm: AutoWrappedModule}
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(BF16)


def everywhere(where, dtype=BF16):
    config = {"computation_dtype": BF16, "computation_device": "cpu"}
    for role in ("offload", "onload", "preparing"):
        config[f"{role}_device"] = where
        config[f"{role}_dtype"] = "disk" if where == "disk" else dtype
    return config


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Net().to(BF16).eval().requires_grad_(False)


@pytest.fixture
def file(plain, tmp_path):
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    return str(tmp_path / "plain.safetensors")


@pytest.fixture
def quantized(file):
    """The oracle: the plain model, quantized by the object alone."""
    model = load_model(Net, file)
    return Quantize().quantize_model(model, "cpu", "cpu")


@pytest.fixture
def packed_file(quantized, tmp_path):
    state = {n.replace("proj.weight", "proj.packed"): t for n, t in quantized.state_dict().items()}
    save_file(state, tmp_path / "packed.safetensors", metadata={"packed": '["proj.weight"]'})
    return str(tmp_path / "packed.safetensors")


def test_a_plain_checkpoint_is_quantized_after_loading(file, quantized):
    quantize = Quantize()
    model = load_model(Net, file, quantize=quantize)
    assert type(model.proj) is Int8Linear
    assert not model.training
    assert model.quantize_config is quantize
    assert torch.equal(model(X), quantized(X))
    assert quantize.calls == [("quantize", torch.device("cpu"), torch.device("cpu"))]


def test_a_quantized_checkpoint(packed_file, quantized):
    quantize = Quantize(load_prequantized=True)
    model = load_model(Net, packed_file, quantize=quantize)
    assert quantize.calls[0] == ("prepare", BF16)
    assert model.proj.scale.dtype == torch.float32
    assert torch.equal(model(X), quantized(X))


@pytest.mark.parametrize("prequantized", [False, True])
def test_dequantized_once(file, packed_file, quantized, prequantized):
    quantize = Quantize("dequant_once", prequantized)
    model = load_model(Net, packed_file if prequantized else file, quantize=quantize)
    assert type(model.proj) is nn.Linear
    assert torch.equal(model.proj.weight, (quantized.proj.weight * quantized.proj.scale).to(BF16))


@pytest.mark.parametrize("vram_limit", [None, 0])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_managed_and_quantized(file, packed_file, quantized, where, vram_limit):
    for prequantized in (False, True):
        if where == "disk" and not prequantized:
            continue
        quantize = Quantize(load_prequantized=prequantized)
        model = load_model(
            Net,
            packed_file if prequantized else file,
            module_map=LAYERS,
            vram_config=everywhere(where),
            vram_limit=vram_limit,
            quantize=quantize,
        )
        assert isinstance(model.proj, AutoWrappedQuantizedModule)
        assert isinstance(model.out, AutoWrappedLinear)
        assert model.quantize_config is quantize
        assert model.vram_management_enabled
        for _ in range(2):
            assert torch.equal(model(X), quantized(X))
        at_rest = next(model.proj.parameters())
        assert at_rest.is_meta == (where == "disk")
        assert torch.equal(model.proj.scale, quantized.proj.scale)


def test_managed_and_dequantized_once(file, quantized):
    model = load_model(
        Net, file, module_map=LAYERS, vram_config=everywhere("cpu"), quantize=Quantize("dequant_once")
    )
    assert type(model.proj).__name__ == "Linear"
    assert isinstance(model.proj, AutoWrappedLinear)
    assert torch.equal(model.proj.weight, (quantized.proj.weight * quantized.proj.scale).to(BF16))


def test_a_plain_checkpoint_cannot_be_quantized_on_disk(file):
    message = (
        "^layers can be quantized on disk only if the checkpoint is: pass a pre-quantized checkpoint and "
        'load_prequantized=True, or an offload_device other than "disk"$'
    )
    with pytest.raises(ValueError, match=message):
        load_model(Net, file, module_map=LAYERS, vram_config=everywhere("disk"), quantize=Quantize())


def test_other_objects_are_refused(file):
    message = (
        "^quantize must be an object such as DiffSynth's QuantizeConfig; 'int8' has no is_quantized_linear, "
        "load_prequantized, mode, quantize_model, dequantize_model$"
    )
    with pytest.raises(ValueError, match=message):
        load_model(Net, file, quantize="int8")
