"""Quantized layers whose library lays their weights out anew in the first forward, as bitsandbytes does."""

import pytest
import torch
from offload_layers import AutoWrappedQuantizedModule, enable_vram_management
from torch import nn


class Packed(nn.Parameter):
    """Integers with a note of how they are laid out, which copies keep."""

    def __new__(cls, data, is_transposed=False):
        self = super().__new__(cls, data, requires_grad=False)
        self.is_transposed = is_transposed
        return self

    def __deepcopy__(self, memo):
        return Packed(self.data.clone(), self.is_transposed)


class Layer(nn.Linear):
    def forward(self, x):
        if not self.weight.is_transposed:
            self.weight.data = self.weight.data.T.contiguous()
            self.weight.is_transposed = True
        return x @ self.weight.data.to(x.dtype) + self.bias


class Quantize:
    def is_quantized_linear(self, module):
        return isinstance(module, Layer)

    def build_quantized_shell(self, module, dtype, layer_name):
        return Layer(module.in_features, module.out_features, device="meta").requires_grad_(False)

    def unflatten_state_dict(self, state, metadata):
        return {n: Packed(t) if n.endswith("weight") else t for n, t in state.items()}


@pytest.mark.parametrize("onload", ["disk", "cpu"])
@pytest.mark.parametrize("limit", [None, 0])
def test_a_layout_made_for_a_forward_goes_with_its_copy(onload, limit):
    weight = torch.randint(-9, 9, (4, 3), dtype=torch.int8)
    source = {"0.weight": weight.clone(), "0.bias": torch.randn(4)}
    x = torch.randn(2, 3)
    expected = x @ weight.T.contiguous().float() + source["0.bias"]  # others round otherwise
    model = nn.Sequential(Layer(3, 4, device="meta").requires_grad_(False))
    config = {"computation_dtype": torch.float32, "computation_device": "cpu"}
    for role, where in (("offload", "disk"), ("onload", onload), ("preparing", "cpu")):
        config[f"{role}_device"] = where
        config[f"{role}_dtype"] = where if where == "disk" else torch.float32
    enable_vram_management(model, {}, config, vram_limit=limit, disk_map=source, quantize=Quantize())
    assert isinstance(model[0], AutoWrappedQuantizedModule)
    for _ in range(3):
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        model[0].offload()
        assert model[0]._parameters["weight"].is_meta
    assert torch.equal(source["0.weight"], weight)
