"""Computation in eight-bit floats, against a product of the dequantized numbers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    ConfigError,
    _fp8_matmul,
    disable_vram_management,
    enable_vram_management,
)
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
RESTING = ("offload", "onload", "preparing")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _try_again() -> Iterator[None]:
    _fp8_matmul._why_not.cache_clear()
    yield
    _fp8_matmul._why_not.cache_clear()


@pytest.fixture
def device(device: torch.device, multiplies_fp8: Callable[[torch.device], bool]) -> torch.device:
    if not multiplies_fp8(device):
        pytest.skip("no products of eight-bit floats here")
    return device


def settings(device: torch.device, rest: Any = FP8, computation: torch.dtype = FP8) -> dict[str, Any]:
    config: dict[str, Any] = {"computation_dtype": computation, "computation_device": device}
    for role in RESTING:
        config[f"{role}_dtype"] = rest
        config[f"{role}_device"] = "disk" if rest == "disk" else "cpu"
    return config


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer should give, in float64, from the rounded weight and bias."""
    largest = x.double().abs().amax(-1, keepdim=True)
    scale = (largest.float() / 448).clamp(min=1)
    rounded = (x.float() / scale).to(FP8).double() * scale.double()
    out = rounded @ weight.to(FP8).double().T
    return out if bias is None else out + bias.to(FP8).double()


def assert_close(found: Tensor, expected: Tensor) -> None:
    # products and sums of eight-bit numbers are exact in float32 but for the last bits of large sums; what is
    # left is the rounding to the dtype of the output, which is bfloat16 in between on GPUs
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(torch.bfloat16).eps * (found.device.type != "cpu"))
    assert ((found.double() - expected).abs() <= 2 * eps * expected.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("rest", [FP8, torch.bfloat16, "disk"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_dequantized_numbers(
    device: torch.device, bias: bool, dtype: torch.dtype, rest: Any
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    weight, b = linear.weight.to(device).clone(), linear.bias.to(device).clone() if bias else None
    x = torch.randn(2, 5, 64, device=device).to(dtype)
    x[0, 0] *= 3000  # a row beyond the format's range
    expected = oracle(x, weight, b)
    source = {f"l.{name}": tensor for name, tensor in linear.state_dict().items()}
    layer = AutoWrappedLinear(linear, **settings(device, rest), name="l", disk_map=source)
    for _ in range(2):
        found = layer(x)
        assert found.dtype == dtype
        assert found.shape == (2, 5, 32)
        assert_close(found, expected)


def test_inputs_lie_as_gpus_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    strides = []

    def multiply(a: Tensor, b: Tensor, *, scale_a: Tensor, out_dtype: torch.dtype, **_: Any) -> Tensor:
        strides.append((a.stride(), b.stride()))
        return (a.float() @ b.float() * scale_a).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", multiply)  # the real one is refused on CPUs by older versions
    weight = torch.randn(16, 32).to(FP8)
    pictures = torch.randn(1, 32, 10).to(torch.bfloat16)
    found = _fp8_matmul.linear(pictures.transpose(1, 2), weight, None)  # one picture: its rows lie by columns
    assert torch.equal(found, _fp8_matmul.linear(pictures.transpose(1, 2).contiguous(), weight, None))
    assert strides == 2 * [((32, 1), (1, 32))]


def test_a_large_row_does_not_touch_its_neighbours(device: torch.device) -> None:
    layer = AutoWrappedLinear(nn.Linear(32, 16, dtype=torch.bfloat16), **settings(device))
    x = torch.randn(2, 32, device=device).to(torch.bfloat16)
    with torch.no_grad():
        alone = layer(x)[1]
        x[0] *= 1e5
        assert torch.equal(layer(x)[1], alone)
        assert layer(x).isfinite().all()


def test_odd_sizes_and_no_rows(device: torch.device) -> None:
    with torch.no_grad():
        linear = nn.Linear(33, 7, dtype=torch.float32)
        weight = linear.weight.to(FP8).float().to(device)
        layer = AutoWrappedLinear(linear, **settings(device))
        assert layer(torch.zeros(0, 33, device=device)).shape == (0, 7)
        x = torch.randn(33, device=device)
        assert layer(x).shape == (7,)
        torch.testing.assert_close(
            layer(x) - layer(torch.zeros_like(x)), x @ weight.T, rtol=0.1, atol=0.1
        )  # the input has three bits of mantissa


def test_gradients_flow_to_the_input_and_to_adapters(device: torch.device) -> None:
    linear = nn.Linear(32, 16, bias=False).requires_grad_(False)
    rounded = linear.weight.to(FP8).float().to(device)
    layer = AutoWrappedLinear(linear, **settings(device))
    x = torch.randn(3, 32, device=device, requires_grad=True)
    a = torch.randn(2, 32, device=device, requires_grad=True)
    b = torch.randn(16, 2, device=device, requires_grad=True)
    layer.lora_A_weights.append(a)
    layer.lora_B_weights.append(b)
    with torch.enable_grad():
        layer(x).sum().backward()
    ones = torch.ones(3, 16, device=device)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, ones @ (rounded + b.detach() @ a.detach()))
    assert a.grad is not None
    assert b.grad is not None
    assert all(p.grad is None for p in layer.parameters())


def test_copies_and_the_way_back(device: torch.device) -> None:
    linear = nn.Linear(32, 16, dtype=torch.bfloat16).requires_grad_(False)
    layer = AutoWrappedLinear(linear, **settings(device))
    x = torch.randn(3, 32, device=device).to(torch.bfloat16)
    found = layer(x)
    assert isinstance(layer, AutoWrappedLinear)
    assert torch.equal(copy.deepcopy(layer)(x), found)
    disable_vram_management(layer, device=device, dtype=torch.bfloat16)
    assert type(layer) is nn.Linear
    assert torch.allclose(layer(x), found, atol=0.2)


def test_a_change_of_the_computation_dtype(device: torch.device) -> None:
    linear = nn.Linear(32, 16, dtype=torch.bfloat16).requires_grad_(False)
    weight, bias = (p.to(FP8).to(device, torch.bfloat16) for p in (linear.weight, linear.bias))
    layer = AutoWrappedLinear(linear, **settings(device), name="l")
    layer.computation_dtype = torch.bfloat16
    x = torch.randn(3, 32, device=device).to(torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, weight, bias))
    message = (
        '^computation_dtype of layer "l" cannot become torch.float8_e4m3fn while it is managed; enable '
        "management with it$"
    )
    with pytest.raises(ConfigError, match=message):
        layer.computation_dtype = FP8


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(2))


REFUSED = {
    "a norm": (
        lambda: AutoWrappedModule(nn.LayerNorm(2), **settings(CPU)),
        "LayerNorm cannot compute in float8_e4m3fn: only linear layers can, in AutoWrappedLinear. Leave "
        "LayerNorm out of module_map, or set computation_dtype=torch.bfloat16",
    ),
    "parameters of its own": (
        lambda: AutoWrappedNonRecurseModule(Holder(), **settings(CPU)),
        "Holder cannot compute in float8_e4m3fn: only linear layers can, in AutoWrappedLinear. Leave Holder "
        "out of module_map, or set computation_dtype=torch.bfloat16",
    ),
    "a forward of its own": (
        lambda: AutoWrappedLinear(Own(2, 2), **settings(CPU)),
        "Own has a forward of its own, which cannot compute in float8_e4m3fn; use nn.Linear, or set "
        "computation_dtype=torch.bfloat16",
    ),
    "two bits of mantissa": (
        lambda: AutoWrappedLinear(nn.Linear(2, 2), **settings(CPU, computation=E5M2)),
        "computation_dtype float8_e5m2 cannot be multiplied with itself on any device; set "
        "computation_dtype=torch.float8_e4m3fn, or torch.bfloat16",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


def test_layers_without_numbers_of_their_own_are_welcome() -> None:
    block = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    AutoWrappedModule(block[1], **settings(CPU))
    AutoWrappedNonRecurseModule(block, **settings(CPU))


def test_hardware_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on newer devices.\nException raised from ...")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ConfigError) as caught:
        enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, settings(CPU))
    assert str(caught.value) == (
        "computation_dtype float8_e4m3fn needs a device that multiplies eight-bit floats (CUDA: compute "
        "capability 8.9 or more); this is cpu, where torch says: torch._scaled_mm is only supported on newer "
        "devices. Set computation_dtype=torch.bfloat16"
    )
    assert type(model[0]) is nn.Linear
