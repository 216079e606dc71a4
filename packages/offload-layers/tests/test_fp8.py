import threading

import pytest
import torch
from offload_layers import AutoWrappedLinear, ConfigError
from offload_layers import _fp8 as fp8
from offload_layers._fp8 import FP8, upcast
from torch import Tensor, nn

FORMATS = sorted(FP8, key=str)
WIDE = (torch.bfloat16, torch.float16, torch.float32)
LARGE = (1 << 19) + (1 << 18)  # more than one piece


def codes(count: int, dtype: torch.dtype) -> Tensor:
    """Every code, again and again, in an order of pairs that does not repeat soon."""
    numbers = torch.arange(count)
    return (numbers * 7 + numbers // 256 * 11).to(torch.uint8).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_is_torchs(tensor: Tensor, dtype: torch.dtype, found: Tensor) -> None:
    expected = tensor.to(dtype)
    assert found.dtype == dtype
    assert found.stride() == expected.stride()
    assert torch.equal(bits(found), bits(expected))  # NaN included


@pytest.mark.parametrize("count", [0, 1, 256, 65_536, LARGE, LARGE + 1, LARGE + 37])
@pytest.mark.parametrize("wanted", [*WIDE, torch.float64], ids=str)
@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_every_code_becomes_what_torch_makes_of_it(
    stored: torch.dtype, wanted: torch.dtype, count: int
) -> None:
    tensor = codes(count, stored)
    assert_is_torchs(tensor, wanted, upcast(tensor, wanted))


@pytest.mark.parametrize("wanted", WIDE, ids=str)
def test_every_pair_of_codes(wanted: torch.dtype) -> None:
    pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float8_e5m2)
    tensor = pairs.repeat(4)
    assert_is_torchs(tensor, wanted, upcast(tensor, wanted))


def test_any_shape_and_strides() -> None:
    memory = codes(4 * LARGE, torch.float8_e4m3fn)
    for tensor in (
        memory[0].reshape(()),
        memory[:LARGE].view(1024, -1),
        memory[:LARGE].view(1024, -1).t(),
        memory[:LARGE].view(2, 1024, -1).permute(2, 0, 1),
        memory[1 : LARGE + 1],
        memory[3 : LARGE + 4],
        memory.view(4096, -1)[:, 1:],
        memory[::2],
        memory[:1024].view(1024, 1).expand(1024, 512),
        memory[:LARGE].view(-1, 1, 1024),
    ):
        assert_is_torchs(tensor, torch.bfloat16, upcast(tensor, torch.bfloat16))


def test_the_result_can_go_to_memory_that_is_there() -> None:
    tensor = codes(LARGE, torch.float8_e4m3fn).view(1024, -1)
    memory = torch.full((LARGE + 8,), 7.0, dtype=torch.bfloat16)
    for start in (0, 1, 2):
        out = memory[start : start + LARGE].view(1024, -1)
        assert upcast(tensor, torch.bfloat16, out=out) is out
        assert_is_torchs(tensor, torch.bfloat16, out)
        assert memory[start + LARGE :].eq(7.0).all()


def test_memory_of_another_kind_is_refused() -> None:
    tensor = codes(12, torch.float8_e4m3fn).view(3, 4)
    message = (
        r"^out must be a contiguous torch.bfloat16 tensor of shape \(3, 4\); got torch.bfloat16, "
        r"shape \(3, 4\), strides \(1, 3\)$"
    )
    with pytest.raises(ConfigError, match=message):
        upcast(tensor, torch.bfloat16, out=torch.empty(4, 3, dtype=torch.bfloat16).t())
    with pytest.raises(ConfigError, match=r"got torch\.float16"):
        upcast(tensor, torch.bfloat16, out=torch.empty(3, 4, dtype=torch.float16))


@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_small_numbers_survive_where_denormals_are_flushed(stored: torch.dtype) -> None:
    tensor = codes(LARGE, stored)
    expected = tensor.to(torch.bfloat16)
    fp8._table.cache_clear()
    torch.set_flush_denormal(True)
    try:
        found = upcast(tensor, torch.bfloat16)
    finally:
        torch.set_flush_denormal(False)
        fp8._table.cache_clear()
    assert torch.equal(bits(found), bits(expected))


def test_threads_do_not_share_scratch_memory() -> None:
    tensors = [codes(LARGE, dtype) for dtype in FORMATS[:2]]
    expected = [tensor.to(torch.bfloat16) for tensor in tensors]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(10):
            found = upcast(tensors[which], torch.bfloat16)
            if not torch.equal(found.nan_to_num(), expected[which].nan_to_num()):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def stored_in_fp8(linear: nn.Linear, **more: object) -> AutoWrappedLinear:
    at_rest = {f"{role}_dtype": torch.float8_e4m3fn for role in ("offload", "onload", "preparing")}
    settings = at_rest | {"computation_dtype": torch.float32, "computation_device": "cpu"} | more
    return AutoWrappedLinear(linear, **settings)  # type: ignore[no-any-return]


def test_layers_stored_in_fp8_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def counting(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        asked.append(tensor.dtype)
        return upcast(tensor, dtype)

    monkeypatch.setattr("offload_layers._device.upcast", counting)
    linear = nn.Linear(1024, 512).requires_grad_(False)
    rounded = linear.weight.to(torch.float8_e4m3fn).float()
    bias = linear.bias.to(torch.float8_e4m3fn).float()
    layer, x = stored_in_fp8(linear), torch.randn(3, 1024)
    assert torch.equal(layer(x), nn.functional.linear(x, rounded, bias))
    assert asked == [torch.float8_e4m3fn] * 2


def test_gradients_flow_to_weights_stored_in_fp8() -> None:
    layer = stored_in_fp8(nn.Linear(8, 4))
    with torch.enable_grad():
        layer(torch.randn(3, 8)).sum().backward()
    gradient = next(layer.parameters()).grad
    assert gradient is not None
    assert gradient.dtype == torch.float8_e4m3fn
