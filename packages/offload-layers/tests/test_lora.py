import pytest
import torch
from offload_layers import AutoWrappedLinear
from torch import Tensor, nn

RESTING = ("offload", "onload", "preparing")
CONFIGS = {
    "resident": {"computation_device": "cpu"},
    "fp8": {
        "offload_dtype": torch.float8_e4m3fn,
        "onload_dtype": torch.float8_e4m3fn,
        "preparing_dtype": torch.float8_e4m3fn,
        "computation_dtype": torch.float32,
        "computation_device": "cpu",
    },
    "disk": {
        **{
            f"{role}_{what}": "disk"
            for role in ("offload", "onload", "preparing")
            for what in ("dtype", "device")
        },
        "computation_dtype": torch.float32,
        "computation_device": "cpu",
    },
}


@pytest.fixture(params=CONFIGS.values(), ids=list(CONFIGS))
def layer(request: pytest.FixtureRequest) -> AutoWrappedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    return AutoWrappedLinear(
        linear,
        **request.param,
        name="l",
        disk_map={  # type: ignore[no-any-return]
            "l.weight": linear.weight.detach().clone(),
            "l.bias": linear.bias.detach().clone(),
        },
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6)


def adapters(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 6), torch.randn(5, 2)) for _ in range(count)]


def test_adapters_add_to_the_output(layer: AutoWrappedLinear, x: Tensor) -> None:
    base = layer(x)
    expected = base
    for a, b in adapters(3):
        layer.lora_A_weights.append(a)
        layer.lora_B_weights.append(b)
        expected = expected + x @ a.T @ b.T
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(input=x), expected)


def test_clearing_the_lists_gives_the_plain_layer_back(layer: AutoWrappedLinear, x: Tensor) -> None:
    base = layer(x)
    ((a, b),) = adapters(1)
    layer.lora_A_weights.append(a)
    layer.lora_B_weights.append(b)
    assert not torch.equal(layer(x), base)
    layer.lora_A_weights.clear()
    layer.lora_B_weights.clear()
    assert torch.equal(layer(x), base)


def test_a_merger_gets_the_output_and_all_adapters(layer: AutoWrappedLinear, x: Tensor) -> None:
    base = layer(x)
    pairs = adapters(2)
    for a, b in pairs:
        layer.lora_A_weights.append(a)
        layer.lora_B_weights.append(b)
    seen: list[tuple[int, ...]] = []

    def merge(out: Tensor, stacked: Tensor) -> Tensor:
        seen.append(tuple(stacked.shape))
        return out - stacked.sum(0)

    layer.lora_merger = merge
    expected = base - torch.stack([x @ a.T @ b.T for a, b in pairs]).sum(0)
    assert torch.equal(layer(x), expected)
    assert seen == [(2, 2, 3, 5)]


def test_unequal_lists_are_an_error(layer: AutoWrappedLinear, x: Tensor) -> None:
    layer.lora_A_weights.append(torch.randn(2, 6))
    with pytest.raises(ValueError, match="shorter"):
        layer(x)


def test_gradients_reach_the_adapters_and_the_input(layer: AutoWrappedLinear, x: Tensor) -> None:
    ((a, b),) = adapters(1)
    layer.lora_A_weights.append(a.requires_grad_())
    layer.lora_B_weights.append(b.requires_grad_())
    with torch.enable_grad():
        layer(x.requires_grad_()).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert x.grad is not None


def test_the_output_is_a_fresh_tensor(layer: AutoWrappedLinear, x: Tensor) -> None:
    out = layer(x)
    again = out.clone()
    out.zero_()
    assert torch.equal(layer(x), again)
