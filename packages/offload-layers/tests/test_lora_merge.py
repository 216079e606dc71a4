"""Adapters by method: added with a weight, merged into the weights of any layer, and taken out to the bit."""

import copy
import io
from typing import Any

import pytest
import torch
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedQuantizedModule,
    ConfigError,
    State,
    disable_vram_management,
    enable_vram_management,
)
from offload_layers._merge import added
from offload_layers.testing import CountingSource, assert_invariants
from torch import Tensor, nn

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
IN, OUT = 6, 5


def settings(rest: object, computation: torch.dtype, **more: object) -> dict[str, Any]:
    at_rest: dict[str, Any] = {"computation_dtype": computation, "computation_device": "cpu"}
    for role in ("offload", "onload", "preparing"):
        at_rest[f"{role}_dtype"] = rest
        at_rest[f"{role}_device"] = "disk" if rest == "disk" else "cpu"
    return at_rest | more


#: name -> dtype of the checkpoint, settings
CONFIGURATIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "resident": (F32, settings(F32, F32)),
    "host, other dtype": (BF16, settings(BF16, F32)),
    "fp8": (FP8, settings(FP8, F32)),
    "fp8, prepared": (FP8, settings(FP8, F32, preparing_dtype=F32)),
    "disk": (BF16, settings("disk", BF16)),
    "disk, float8 checkpoint": (FP8, settings("disk", F32)),
    "disk, prepared": (BF16, settings("disk", F32, preparing_dtype=F32, preparing_device="cpu")),
    "disk, onload": (
        F32,
        settings("disk", F32, onload_dtype=F32, onload_device="cpu", preparing_dtype=F32)
        | {"preparing_device": "cpu"},
    ),
}


def make(config: str, *, with_source: bool = True) -> tuple[AutoWrappedLinear, Tensor]:
    """Return a layer and its weight as it is at rest."""
    stored, options = CONFIGURATIONS[config]
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    linear.weight = nn.Parameter(linear.weight.to(stored), requires_grad=False)
    base = linear.weight.detach().clone()
    source = {"l.weight": base.clone()} if with_source or "disk" in config else None
    return AutoWrappedLinear(linear, **options, name="l", disk_map=source), base


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def adapters(count: int = 2) -> list[tuple[Tensor, Tensor, float]]:
    torch.manual_seed(1)
    return [(torch.randn(2, IN), torch.randn(OUT, 2), 0.5 + i) for i in range(count)]


def expected_weight(base: Tensor, dtype: torch.dtype, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    total = base.double()
    for a, b, weight in pairs:
        total = total + weight * (b.double() @ a.double())
    return total.to(dtype)


@pytest.fixture(params=list(CONFIGURATIONS))
def config(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, IN, generator=torch.Generator().manual_seed(2))


def input_of(layer: AutoWrappedLinear, x: Tensor) -> Tensor:
    return x.to(layer.computation_dtype)


def test_adapters_with_weights(config: str, x: Tensor) -> None:
    layer, _ = make(config)
    x = input_of(layer, x)
    expected = layer(x)
    for a, b, weight in adapters():
        layer.add_lora(a, b, weight)
        expected = expected + x @ (a * weight).T.to(x.dtype) @ b.T.to(x.dtype)
    assert torch.equal(layer(x), expected)
    layer.clear_lora()
    assert layer.lora_A_weights == layer.lora_B_weights == []


@pytest.mark.parametrize("state", list(State))
def test_merged_and_taken_out(config: str, state: State, x: Tensor) -> None:
    layer, base = make(config)
    layer._owner().climb_to(state)
    x = input_of(layer, x)
    before = layer(x)
    for adapter in adapters():
        layer.add_lora(*adapter)
    layer.merge_lora()
    assert layer.lora_A_weights == []
    # a weight on disk is not rounded to eight bits; one at rest in eight bits is
    dtype = layer.computation_dtype if config == "disk, float8 checkpoint" else base.dtype
    merged = expected_weight(base, dtype, adapters()).to(layer.computation_dtype)
    tolerance = 2 * torch.finfo(dtype).eps  # of float32 sums beside float64 ones, rounded once
    for _ in range(2):
        torch.testing.assert_close(layer.weight, merged, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer(x), x @ merged.T, rtol=0.05, atol=0.05 + 4 * tolerance)
        assert not torch.equal(layer(x), before)
    layer.unmerge_lora()
    assert len(layer.lora_A_weights) == 2
    layer.clear_lora()
    assert torch.equal(layer(x), before)
    assert torch.equal(bits(layer.state_dict()["weight"]), bits(base.to(layer.state_dict()["weight"].dtype)))
    assert_invariants(layer)


def test_what_is_merged_is_in_everything_that_is_saved_or_copied(config: str, x: Tensor) -> None:
    layer, _ = make(config)
    x = input_of(layer, x)
    layer.add_lora(*adapters()[0])
    layer.merge_lora()
    merged = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), merged)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    plain = torch.load(stored, weights_only=False)
    assert type(plain) is nn.Linear
    assert torch.equal(nn.functional.linear(x, plain.weight.to(x.dtype)), merged)
    assert torch.equal(bits(plain.weight), bits(layer.state_dict()["weight"]))
    layer.unmerge_lora()
    twin.unmerge_lora()
    twin.clear_lora()
    layer.clear_lora()
    assert torch.equal(twin(x), layer(x))
    twin = copy.deepcopy(layer)
    twin.add_lora(*adapters()[0])
    twin.merge_lora()
    disable_vram_management(twin)
    assert type(twin) is nn.Linear
    assert "_merge" not in twin.__dict__
    assert torch.equal(nn.functional.linear(x, twin.weight.to(x.dtype)), merged)


def test_adapters_on_top_of_merged_ones(config: str, x: Tensor) -> None:
    layer, base = make(config)
    first, second = adapters()
    layer.add_lora(*first)
    layer.merge_lora()
    layer.add_lora(*second)
    layer.merge_lora()
    together, _ = make(config)
    for adapter in (first, second):
        together.add_lora(*adapter)
    together.merge_lora()
    assert torch.equal(bits(layer.state_dict()["weight"]), bits(together.state_dict()["weight"]))
    layer.unmerge_lora()
    layer.clear_lora()
    assert torch.equal(bits(layer.weight), bits(base.to(layer.computation_dtype)))


@pytest.mark.parametrize("with_source", [True, False])
def test_a_second_copy_is_kept_only_where_the_source_cannot_give_it(config: str, with_source: bool) -> None:
    layer, base = make(config, with_source=with_source)
    layer.add_lora(*adapters()[0])
    layer.merge_lora()
    kept = layer.__dict__["_merge"].base
    assert (kept is None) == (with_source or config.startswith("disk"))
    if config.startswith("disk"):
        layer.offload()
        assert next(layer.parameters()).is_meta
    layer.unmerge_lora()
    layer.clear_lora()
    assert torch.equal(bits(layer.weight), bits(base.to(layer.computation_dtype)))


def test_layers_that_are_fetched_ahead_have_the_adapters_in_them(x: Tensor) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(IN, IN) for _ in range(4))).requires_grad_(False)
    source = CountingSource(plain.state_dict())
    model = copy.deepcopy(plain)
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, settings("disk", F32), disk_map=source)
    prefetcher = model[0]._owner().schedule.prefetcher
    for layer in model:
        layer.register_forward_hook(lambda *_: prefetcher.settle())  # the reader is always faster
    expected = plain(x)
    a, b = torch.randn(2, IN), torch.randn(IN, 2)
    for _ in range(3):
        for _ in range(3):
            assert torch.equal(model(x), expected)
        for layer in model:
            layer.add_lora(a, b)
            layer.merge_lora()
        merged = x
        for layer in plain:
            merged = nn.functional.linear(merged, added(layer.weight, ((a, b),), F32), layer.bias)
        for _ in range(3):
            assert torch.equal(model(x), merged)
        for layer in model:
            layer.unmerge_lora()
            layer.clear_lora()
    assert sum(layer._owner().counters.hits for layer in model) > 40
    assert_invariants(model)


def test_a_weight_that_was_trained_is_not_taken_from_the_source(x: Tensor) -> None:
    layer, _ = make("resident")
    layer.weight.mul_(2)
    trained = layer.weight.clone()
    layer.add_lora(*adapters()[0])
    layer.merge_lora()
    assert layer.__dict__["_merge"].base is not None
    layer.unmerge_lora()
    assert torch.equal(layer.weight, trained)


def test_a_merged_weight_that_was_changed_is_not_thrown_away(config: str) -> None:
    layer, _ = make(config)
    layer.add_lora(*adapters()[0])
    layer.merge_lora()
    layer.load_state_dict({"weight": torch.ones(OUT, IN)})
    message = (
        '^"l.weight" was changed after adapters were merged into it, so they cannot be taken out again. Load '
        "the weight anew.$"
    )
    with pytest.raises(ConfigError, match=message):
        layer.unmerge_lora()
    assert torch.equal(layer.weight, torch.ones(OUT, IN, dtype=layer.computation_dtype))


def test_the_bytes_of_adapters_are_borrowed(x: Tensor) -> None:
    layer, _ = make("disk")
    budget = layer._owner().budget
    before = budget.statistics().lent_nbytes
    a, b, _ = adapters()[0]
    layer.add_lora(a, b)
    nbytes = 4 * (a.numel() + b.numel())
    assert budget.statistics().lent_nbytes - before == nbytes == layer._owner().leased_nbytes
    layer.lora_A_weights.append(a)  # as DiffSynth's pipelines do
    layer.lora_B_weights.append(b)
    layer(input_of(layer, x))
    assert budget.statistics().lent_nbytes - before == 2 * nbytes
    layer.lora_A_weights.clear()
    layer.lora_B_weights.clear()
    layer(input_of(layer, x))
    assert budget.statistics().lent_nbytes == before
    layer.add_lora(a, b)
    layer.merge_lora()
    assert budget.statistics().lent_nbytes == before
    assert_invariants(layer)


def test_large_weights_are_added_piece_by_piece() -> None:
    base = torch.randn(3000, 2000).to(BF16)
    a, b = torch.randn(4, 2000), torch.randn(3000, 4)
    found = added(base, ((a, b),), BF16)
    assert torch.equal(found, (base.float() + b @ a).to(BF16)) or torch.allclose(
        found.float(), base.float() + b @ a, rtol=torch.finfo(BF16).eps
    )


def test_shapes_that_do_not_fit() -> None:
    layer, _ = make("resident")
    message = r'^an adapter for layer "l" has shapes \(rank, 6\) and \(5, rank\); got \(2, 5\) and \(5, 2\)$'
    with pytest.raises(ConfigError, match=message):
        layer.add_lora(torch.zeros(2, OUT), torch.zeros(OUT, 2))


def test_what_cannot_be_merged() -> None:
    layer, _ = make("resident")
    layer.add_lora(*adapters()[0])
    layer.lora_merger = lambda out, stacked: out
    message = (
        '^the adapters of layer "l" are merged by lora_merger, which needs their outputs; they cannot be '
        "merged into the weight$"
    )
    with pytest.raises(ConfigError, match=message):
        layer.merge_lora()
    quantized = AutoWrappedQuantizedModule(nn.Linear(IN, OUT), computation_device="cpu", name="q")
    quantized.add_lora(*adapters()[0])
    normed: Any = nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))
    layer = AutoWrappedLinear(normed, **settings(F32, F32), name="n")
    layer.add_lora(torch.zeros(1, IN), torch.zeros(OUT, 1))
    with pytest.raises(ConfigError, match='layer "n" computes its weight from other parameters; adapters'):
        layer.merge_lora()

    message = '^adapters cannot be merged into the quantized weight "q.weight"; leave them beside it$'
    with pytest.raises(ConfigError, match=message):
        quantized.merge_lora()


class Adapter(nn.Module):
    """A minimal adapter around a layer, as PEFT's are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        assert self.base_layer.weight.dtype == x.dtype  # such libraries look
        return self.base_layer(x) + x @ self.a.T @ self.b.T  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", [c for c in CONFIGURATIONS if c != "disk"])
def test_adapters_around_a_layer_are_trained(config: str, x: Tensor) -> None:
    layer, base = make(config)
    model = nn.Sequential(Adapter(layer), Adapter(nn.Linear(OUT, 2).requires_grad_(False)))
    oracle = copy.deepcopy(model)
    oracle[0].base_layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    oracle[0].base_layer.weight.data.copy_(base.to(F32))
    with torch.enable_grad():
        for each in (model, oracle):
            optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=1e-3)
            for _ in range(3):
                optimizer.zero_grad()
                y = x.clone().requires_grad_()
                each(y).square().mean().backward()
                assert y.grad is not None
                optimizer.step()
    for found, expected in ((model[0].a, oracle[0].a), (model[0].b, oracle[0].b), (model[1].a, oracle[1].a)):
        assert torch.equal(found, expected)
        assert found.isfinite().all()
    assert torch.equal(layer.weight, base.to(F32))


@pytest.mark.parametrize("config", [c for c in CONFIGURATIONS if c != "disk"])
def test_peft(config: str, x: Tensor) -> None:
    peft = pytest.importorskip("peft")
    layer, base = make(config)
    model = nn.Sequential(layer)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    inner = wrapped.base_model.model[0]
    assert inner.base_layer is layer
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        wrapped(y).sum().backward()
    a, b = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    assert a.grad is not None
    assert b.grad is not None
    assert y.grad is not None
    expected = x @ (base.to(F32) + inner.scaling["default"] * b.detach() @ a.detach()).T
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)
