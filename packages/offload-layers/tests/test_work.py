"""What a forward consists of, found without weights, and how long that takes."""

import contextlib
import functools
import gc
import math

import pytest
import torch
from offload_layers import ConfigError, Rates, Tier, offload, plan
from offload_layers._find import find_layers
from offload_layers._timed import seconds_of
from offload_layers._trace import Operation, Shaped, Trace, trace
from offload_layers._work import measure_work
from torch import Tensor, nn

CPU = torch.device("cpu")
RATES = Rates(1e9, 1e10, 1e10, 1e12)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.up(x)))


class Model(nn.Module):
    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("scale", torch.ones(width))
        self.calls = 0

    @functools.lru_cache  # noqa: B019
    def table(self, length: int) -> Tensor:
        return torch.arange(length, dtype=torch.float32)

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        self.calls += 1
        x = x * self.scale + self.table(x.shape[-1]).to(x.device)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) * (2 if twice else 1)


def traced(model: nn.Module, inputs, **options) -> Trace:
    layers = [layer.name for layer in find_layers(model)]
    return trace(model, inputs, layers=layers, **{"device": CPU, "dtype": None, "source": None} | options)


def names(found: Trace, layer: str) -> dict[str, int]:
    return {
        operation.function.overloadpacket.__name__: count
        for (where, operation), count in found.calls.items()
        if where == layer
    }


def test_operations_belong_to_the_layer_that_was_called_last() -> None:
    found = traced(Model(), [torch.ones(2, 5, 64)])
    assert {"mul", "arange", "add"} <= names(found, "").keys()
    assert "sigmoid" in names(found, "blocks.0.up")
    assert "sigmoid" not in names(found, "blocks.0.down")
    assert names(found, "blocks.1.down")["add"] == 1
    assert "mul" in names(found, "norm")
    products = {o for (_, o) in found.calls if o.function.overloadpacket.__name__ == "addmm"}
    assert len(products) == 2  # of three blocks: equal ones are one


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_the_model_stays_as_it_is(where: str) -> None:
    model = Model() if where == "cpu" else Model().to("meta")
    x = torch.ones(2, 64)
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    expected = model(x) if where == "cpu" else None
    calls = model.calls
    traced(model, {"x": x.to(where), "twice": True})
    assert model.calls == calls
    after = model.state_dict(keep_vars=True)
    assert {name: id(t) for name, t in after.items()} == {name: i for name, (i, _) in before.items()}
    assert not any(block.up._forward_pre_hooks for block in model.blocks)
    if expected is not None:
        assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
        assert torch.equal(model(x), expected)


@functools.lru_cache
def cached_table(length: int) -> tuple[Tensor]:
    return (torch.arange(length, dtype=torch.float32),)


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_caches_of_functions_have_no_tensors_without_values(fails: bool) -> None:
    class Cached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + cached_table(x.shape[-1])[0])

    cached_table.cache_clear()
    x = torch.ones(2, 8)
    with pytest.raises(ConfigError) if fails else contextlib.nullcontext():
        traced(Cached(4 if fails else 8, 4), [x])
    assert type(cached_table(8)[0]) is Tensor
    model = Cached(8, 4)
    assert torch.equal(model(x), nn.functional.linear(x + torch.arange(8), model.weight, model.bias))


def test_what_is_kept_elsewhere_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    traced(model, [torch.ones(2, 8)])
    assert not caplog.text
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda *args: kept.append(args[-1]))
    traced(model, [torch.ones(2, 8)])
    assert "Sequential keeps 1 tensor of its forward" in caplog.text


def test_inputs_stay_as_they_are() -> None:
    class Cache:
        def __init__(self) -> None:
            self.past = [torch.ones(1, 8, requires_grad=True) * 2]

    class Cached(nn.Linear):
        def forward(self, x: Tensor, *, cache: Cache, noise: torch.Generator) -> Tensor:
            cache.past.append(x)
            return super().forward(torch.cat(cache.past)) + torch.rand(1, generator=noise)

    cache, noise = Cache(), torch.Generator()
    before = noise.get_state()
    plan(
        Cached(8, 8),
        device="cpu",
        ram="1GB",
        inputs={"x": torch.ones(2, 8), "cache": cache, "noise": noise},
        rates=RATES,
    )
    assert [type(tensor) for tensor in cache.past] == [Tensor]
    assert torch.equal(noise.get_state(), before)


def test_activations_are_what_is_alive_at_once() -> None:
    width, rows = 64, 10
    model = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False))
    found = traced(model, [torch.ones(rows, width)])
    # the input is held by the caller, so beside the hidden state there are both it and the output
    assert found.activations_nbytes == 4 * rows * (width + 4 * width + width)
    deeper = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(9)))
    found = traced(deeper, [torch.ones(rows, width)])
    assert found.activations_nbytes == 3 * 4 * rows * width  # not ten times


def test_the_dtype_is_that_of_the_computation() -> None:
    def dtypes(**options) -> set[torch.dtype]:
        model = nn.Sequential(nn.Linear(8, 8))
        found = traced(model, [torch.ones(2, 8, dtype=options.pop("given"))], **options)
        return {a.dtype for _, o in found.calls for a in o.arguments if isinstance(a, Shaped)}

    assert dtypes(given=torch.float32) == {torch.float32}
    assert dtypes(given=torch.bfloat16, dtype=torch.bfloat16) == {torch.bfloat16}

    class Source(dict[str, Tensor]):
        def info(self, name: str) -> Tensor:
            return self[name]

    source = Source({"0.weight": torch.ones(8, 8).half(), "0.bias": torch.ones(8).half()})
    assert dtypes(given=torch.float16, source=source) == {torch.float16}


def test_ties_are_one_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    found = traced(model, [torch.ones(2, 8)])
    assert found.calls


class Depends(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "inputs", "told"),
    [
        (Depends(4, 4), [torch.ones(1, 4)], "Depends"),
        (nn.Linear(4, 4), [torch.ones(1, 5)], "reduction dim|1x5"),
        (nn.Linear(4, 4), {"y": torch.ones(1, 4)}, "'y'"),
        (nn.Linear(4, 4), 3, "int"),
        (nn.Linear(4, 4), "x", "str"),
    ],
    ids=["values", "shape", "name", "number", "text"],
)
def test_what_cannot_be_foreseen_is_told(model: nn.Module, inputs, told: str) -> None:
    for call in (plan, offload):
        with pytest.raises(ConfigError, match=told):
            call(model, device="cpu", inputs=inputs, rates=RATES)
    assert type(model) in (Depends, nn.Linear)  # and nothing was changed


def test_inputs_need_a_model() -> None:
    with pytest.raises(ConfigError, match="rows"):
        plan({"a.weight": torch.ones(2, 2)}, device="cpu", inputs=[torch.ones(2)], rates=RATES)


def test_each_kind_of_operation_is_measured() -> None:
    small, large = (
        Operation(torch.ops.aten.mm.default, (Shaped((n, n), (n, 1), torch.float32, False),) * 2, ())
        for n in (16, 512)
    )
    weight = Shaped((512, 512), (1, 512), torch.float32, True)
    transposed = Operation(torch.ops.aten.mm.default, (large.arguments[0], weight), ())
    kinds = Operation(
        torch.ops.aten.cat.default,
        ((Shaped((4,), (1,), torch.complex64, False), Shaped((2,), (1,), torch.complex64, False)), 0),
        (),
    )
    found = seconds_of([small, large, transposed, kinds], CPU)
    assert 0 < found[small] < found[large]
    assert found[transposed] > found[small]
    assert 0 < found[kinds] < found[large]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.float16], ids=str)
def test_tensors_of_any_dtype_can_be_made(dtype: torch.dtype) -> None:
    clone = Operation(torch.ops.aten.clone.default, (Shaped((3, 5), (5, 1), dtype, True),), ())
    assert seconds_of([clone], CPU)[clone] > 0


def test_what_cannot_be_tried_counts_nothing_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    wrong = Operation(torch.ops.aten.mm.default, (Shaped((2,), (1,), torch.float32, False),) * 2, ())
    assert seconds_of([wrong], CPU) == {wrong: 0.0}
    assert "aten.mm" in caplog.text


def test_random_numbers_go_on_as_if_nothing_was_drawn() -> None:
    noise = torch.Generator()

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(1) + torch.rand(1, generator=noise)

    model = nn.Sequential(Noisy(8, 8), nn.Dropout(0.5))
    before = torch.get_rng_state(), noise.get_state()
    plan(model, device="cpu", ram="1GB", inputs=[torch.ones(2, 8)], rates=RATES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(noise.get_state(), before[1])


def test_work_adds_up() -> None:
    model = Model()
    layers = [layer.name for layer in find_layers(model)]
    work = measure_work(model, [torch.ones(20, 64)], layers=layers, device=CPU, dtype=None, source=None)
    assert set(work.layer_s) == set(layers)
    assert work.before_s > 0
    assert math.isclose(work.total_s, work.before_s + sum(work.layer_s.values()))
    assert work.activations_nbytes > 20 * 256 * 4


def test_a_plan_on_inputs() -> None:
    model = Model()
    planned = plan(model, device="cpu", ram="1GB", inputs=[torch.ones(20, 64)], rates=RATES)
    prediction = planned.predict()
    assert planned.work is not None
    assert prediction is not None
    assert prediction.compute_s == planned.work.total_s
    assert "on these inputs" in str(planned)
    assert "activations" in str(planned)
    assert planned.to_dict()["activations_nbytes"] == planned.work.activations_nbytes
    assert planned.with_more(ram=1).work is planned.work


def test_a_handle_puts_it_beside_the_fact() -> None:
    model = Model()
    x = torch.ones(20, 64)
    expected = model(x)
    handle = offload(model, device="cpu", ram="1GB", inputs=[x], rates=RATES)
    assert torch.equal(handle(x), expected)
    told = handle.report()
    assert told.forward_s is not None
    assert told.plan.work is not None
    assert "predicted" in str(told)
    assert told.with_rows(5).plan.work is None


def test_what_hides_transfers_is_measured_not_told_from_the_size() -> None:
    """A layer that much else is computed after needs not stay: it hides behind that."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                x = layer(x)
                if number == 3:
                    for _ in range(100):
                        x = x.sin()
            return x

    inputs = [torch.ones(64, 256)]
    model = Uneven()
    work = plan(model, device="cpu", inputs=inputs, rates=RATES).work
    assert work is not None
    assert max(work.layer_s, key=work.layer_s.__getitem__) == "layers.3"


def test_on_a_cpu_the_limit_is_one_of_weights() -> None:
    model = Model()
    handle = offload(model, device="cpu", ram="1GB", inputs=[torch.ones(20, 64)], rates=RATES)
    assert handle.plan.beside_nbytes == 0
    assert model.norm._owner().schedule.beside.nbytes == 0


@pytest.mark.cuda
def test_on_a_device_activations_are_left_room_from_the_first_forward_on(accelerator: torch.device) -> None:
    model = Model(width=1024, blocks=8)
    inputs = [torch.ones(4096, 1024, device=accelerator)]
    module = torch.get_device_module(accelerator)
    module.empty_cache()
    handle = offload(model, device=accelerator, vram="8GB", inputs=inputs, rates=RATES)
    told = handle.plan.beside_nbytes
    assert told > 4096 * 4096 * 4
    assert model.norm._owner().schedule.beside.nbytes == told
    before = module.memory_allocated(accelerator)
    module.reset_peak_memory_stats(accelerator)
    handle(*inputs)
    weights_nbytes = sum(weight.nbytes for weight in model.parameters())  # all of them have come to stay
    assert module.max_memory_allocated(accelerator) - before - weights_nbytes < 1.2 * told


@pytest.mark.cuda
def test_what_was_tried_leaves_no_memory_behind(accelerator: torch.device) -> None:
    module, model = torch.get_device_module(accelerator), Model()
    gc.collect()
    module.empty_cache()
    before = module.memory_reserved(accelerator)
    plan(model, device=accelerator, vram="1GB", ram="1GB", inputs=[torch.ones(20, 64)])
    assert module.memory_reserved(accelerator) <= before


def test_activations_take_room_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from offload_layers._layer_sizes import LayerSize
    from offload_layers._plan import make_plan
    from offload_layers._work import Work

    sizes = [LayerSize(f"{i}", 100, 100, 100) for i in range(10)]
    work = Work({f"{i}": 1.0 for i in range(10)}, 0.0, 500)
    options = {"ram": 10**9, "rows": 1, "rates": None}
    fits = make_plan(sizes, device=torch.device("cuda"), vram=1500, work=work, **options)
    assert fits.nbytes_on(Tier.DEVICE) == 1000
    less = make_plan(sizes, device=torch.device("cuda"), vram=1400, work=work, **options)
    assert less.nbytes_on(Tier.DEVICE) < 1000
    assert less.peak_device_nbytes <= 900
    with pytest.raises(ConfigError, match="activations"):
        make_plan(sizes, device=torch.device("cuda"), vram=550, work=work, **options)
    on_cpu = make_plan(sizes, device=CPU, vram=1000, work=work, **options)
    assert on_cpu.nbytes_on(Tier.DEVICE) == 1000  # there the limit is one of weights
