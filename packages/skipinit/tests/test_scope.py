"""Whom a block acts on, and that it leaves nothing behind."""

import asyncio
import contextvars
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from skipinit import NestedBlockError, skip_model_initialization, suspended, unmaterialized
from torch import nn


def is_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def is_real(model: nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in model.parameters())


def test_after_the_block_models_are_plain_again() -> None:
    with skip_model_initialization():
        inside = nn.Linear(2, 2)
    assert is_meta(inside)
    assert is_real(nn.Linear(2, 2))


def test_nested_blocks_join() -> None:
    with skip_model_initialization():
        with skip_model_initialization("meta"):
            inner = nn.BatchNorm1d(2)
        outer = nn.BatchNorm1d(2)
        assert inner.running_var.tolist() == [1, 1]
    assert is_meta(inner)
    assert is_meta(outer)
    assert outer.running_var.tolist() == [1, 1]


def test_nested_block_for_another_device_is_refused() -> None:
    expected = (
        r'skip_model_initialization\("cpu"\) was entered inside a block for "meta"\. The inner block joins'
    )
    with (
        skip_model_initialization(),
        pytest.raises(NestedBlockError, match=expected),
        skip_model_initialization("cpu"),
    ):
        pass
    assert is_real(nn.Linear(2, 2))


# -- suspension --------------------------------------------------------------------------------------


def test_what_is_made_while_a_block_is_suspended_is_plain() -> None:
    with skip_model_initialization():
        before = nn.Linear(2, 2)
        with suspended():
            loaded = nn.Linear(2, 2)
            assert before.weight.is_meta
            assert torch.equal(loaded(torch.ones(1, 2)), loaded(torch.ones(1, 2)))
        after = nn.Linear(2, 2)
    assert is_real(loaded)
    assert is_meta(before)
    assert is_meta(after)


def test_a_suspended_block_is_joined_by_none() -> None:
    with skip_model_initialization(), suspended():
        with skip_model_initialization("cpu"):  # another device is no contradiction
            real = nn.Linear(2, 2)
        with skip_model_initialization():
            model = nn.Linear(2, 2)
        assert is_meta(model)
        model.weight = nn.Parameter(torch.ones(2, 2))  # not by load_state_dict, which a block knows
        model.bias = nn.Parameter(torch.ones(2))
    assert is_real(real)
    assert is_real(model)


def test_pending_tensors_get_values_when_a_block_is_suspended() -> None:
    with skip_model_initialization():
        tensor = torch.arange(3.0).mul_(2)
        parameter = nn.Parameter(torch.full((2,), 3.0))
        layer = nn.Linear(2, 2)
        with suspended():
            assert tensor.tolist() == [0, 2, 4]
        assert tensor.add(1).tolist() == [1, 3, 5]
        layer.register_parameter("other", parameter)
        assert layer.other.tolist() == [3, 3]
    assert is_meta(layer)
    assert tensor.tolist() == [0, 2, 4]


def test_an_error_ends_a_suspension() -> None:
    with skip_model_initialization():
        with pytest.raises(ZeroDivisionError), suspended():
            _ = 1 / 0
        layer = nn.Linear(2, 2)
    assert is_meta(layer)


def test_suspensions_may_be_nested_and_need_no_block() -> None:
    @suspended()
    def load() -> nn.Module:
        with suspended():
            return nn.Linear(2, 2)

    assert is_real(load())
    with skip_model_initialization():
        layers = load(), load()
        skipped = nn.Linear(2, 2)
    assert is_real(nn.ModuleList(layers))
    assert is_meta(skipped)


def test_one_suspension_may_be_entered_many_times() -> None:
    block = suspended()
    with skip_model_initialization():
        with block:
            with block:
                layers = [nn.Linear(2, 2)]
            layers.append(nn.Linear(2, 2))
        skipped = nn.Linear(2, 2)
    assert all(is_real(layer) for layer in layers)
    assert is_meta(skipped)


def test_a_suspension_decorates_what_runs_when_it_is_called() -> None:
    async def coroutine() -> None: ...

    def generator() -> Any:
        yield

    for function in (coroutine, functools.partial(coroutine), generator, nn.Linear):
        with pytest.raises(TypeError, match=r"suspended decorates plain functions, .* use a with-block"):
            suspended()(function)


def test_one_object_enters_many_times() -> None:
    block = skip_model_initialization()
    with block, block:
        first = nn.Linear(2, 2)
    with block:
        second = nn.Linear(2, 2)
    assert is_meta(first)
    assert is_meta(second)
    assert is_real(nn.Linear(2, 2))


def test_decorated_functions() -> None:
    @skip_model_initialization()
    def build(size: int, *, bias: bool) -> nn.Module:
        """Build."""
        return nn.Linear(size, size, bias=bias)

    assert is_meta(build(2, bias=True))
    assert (build.__name__, build.__doc__) == ("build", "Build.")
    assert is_real(nn.Linear(2, 2))


def test_decorated_coroutine() -> None:
    @skip_model_initialization()
    async def build() -> nn.Module:
        await asyncio.sleep(0)
        return nn.Linear(2, 2)

    assert is_meta(asyncio.run(build()))


def test_what_cannot_be_decorated_says_so() -> None:
    with pytest.raises(TypeError, match="written with parentheses"):
        skip_model_initialization(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not the class or generator Linear"):
        skip_model_initialization()(nn.Linear)

    def generate() -> Any:
        yield nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"class or generator .*generate"):
        skip_model_initialization()(generate)


def test_exception_ends_the_block_and_what_was_built_has_values() -> None:
    kept: dict[str, Any] = {}

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            kept.update(model=self, table=torch.ones(2))
            raise ValueError("in the constructor")

    with pytest.raises(ValueError, match="in the constructor"), skip_model_initialization():
        Fails()
    assert is_real(nn.Linear(2, 2))
    assert is_meta(kept["model"])
    assert kept["table"].tolist() == [1, 1]


def test_global_generator_stays_where_it_was() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with skip_model_initialization():
        model = nn.Linear(4, 4)
        drawn = [
            torch.randn(3),
            torch.randperm(4),
            torch.nn.functional.dropout(torch.ones(8)),
            torch.bernoulli(torch.ones(2) / 2),
        ]
        drawn.append(torch.rand_like(drawn[0]))
        assert float(model.weight.detach().abs().sum()) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not tensor.is_meta for tensor in drawn)


def test_parameters_made_before_the_block_are_untouched() -> None:
    weight, tensor = nn.Parameter(torch.ones(2, 2)), torch.full((2,), 3.0)
    address = weight.data_ptr()
    with skip_model_initialization():
        model = nn.Linear(2, 2, bias=False)
        model.weight = weight
        model.wrapped = nn.Parameter(tensor)
        nn.init.zeros_(model.wrapped)
        weight.data[0, 0] = 7
    assert model.weight is weight
    assert weight.data_ptr() == address
    assert weight.tolist() == [[7, 1], [1, 1]]
    assert tensor.tolist() == model.wrapped.tolist() == [0, 0]


def test_meta_tensors_of_the_user_stay_meta() -> None:
    with skip_model_initialization():
        model = nn.Linear(2, 2)
        model.register_buffer("meta", torch.zeros(2, device="meta"))
        model.moved = torch.zeros(2).to("meta")
        with torch.device("meta"):
            model.inner = nn.BatchNorm1d(2)
    assert model.meta.is_meta
    assert model.moved.is_meta
    assert model.inner.running_mean.is_meta


def test_default_device_context_is_honoured() -> None:
    with torch.device("cpu"), skip_model_initialization():
        outside = nn.BatchNorm1d(2)
    with skip_model_initialization(), torch.device("cpu"):
        inside = nn.BatchNorm1d(2)
    for model in (outside, inside):
        assert is_meta(model)
        assert model.running_var.tolist() == [1, 1]


def test_device_other_than_meta_keeps_the_plain_values() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(3, 3)
    torch.manual_seed(0)
    with skip_model_initialization("cpu"):
        model = nn.Linear(3, 3)
        model.steps = nn.Parameter(torch.arange(3.0))
    assert torch.equal(model.weight, plain.weight)
    assert torch.equal(model.bias, plain.bias)
    assert model.steps.tolist() == [0, 1, 2]


def test_device_other_than_meta_keeps_the_values_of_views() -> None:
    with skip_model_initialization("cpu"):
        model = nn.Module()
        model.late = nn.Parameter(torch.arange(6.0)[4:])
    assert model.late.tolist() == [4, 5]


def test_other_threads_build_plain_models_meanwhile() -> None:
    with skip_model_initialization():
        mine = nn.Linear(3, 3)
        with ThreadPoolExecutor(4) as pool:
            others = list(pool.map(lambda _: nn.BatchNorm1d(3), range(64)))
        assert mine.weight.device.type == "cpu"  # as in a plain construction
    assert is_meta(mine)
    assert all(is_real(other) for other in others)
    assert all(other.weight.tolist() == [1, 1, 1] for other in others)


def test_concurrent_blocks_and_plain_builds_do_not_mix() -> None:
    wrong: list[str] = []

    def skipped() -> None:
        for _ in range(50):
            with skip_model_initialization():
                model = nn.BatchNorm1d(3)
            if not is_meta(model) or model.running_var.tolist() != [1, 1, 1]:
                wrong.append("skipped")

    def plain() -> None:
        for _ in range(200):
            if not is_real(nn.Linear(3, 3)):
                wrong.append("plain")

    threads = [threading.Thread(target=target) for target in (skipped, plain, skipped, plain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_submodules_built_in_threads_are_plain() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mine = nn.Linear(2, 2)
            with ThreadPoolExecutor(2) as pool:
                self.theirs = nn.ModuleList(pool.map(lambda _: nn.Linear(2, 2), range(2)))

    with skip_model_initialization():
        model = Parallel()
    assert unmaterialized(model) == ["mine.weight", "mine.bias"]


def test_thread_with_the_context_of_another_opens_its_own_block() -> None:
    def build() -> nn.Module:
        plain = nn.Linear(2, 2)
        assert is_real(plain)
        with skip_model_initialization():
            return nn.Linear(2, 2)

    with skip_model_initialization(), ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(contextvars.copy_context().run, build).result()
        assert theirs.weight.is_meta  # their block has ended, ours has not
        mine = nn.Linear(2, 2)
    assert is_meta(mine)


@pytest.mark.parametrize("read", [lambda t: t.tolist(), lambda t: t + torch.ones(3), lambda t: float(t[0])])
def test_helper_thread_that_reads_a_pending_value_gets_an_error(read: Any) -> None:
    with skip_model_initialization(), ThreadPoolExecutor(1) as pool:
        pending = torch.ones(3)
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            pool.submit(read, pending).result()
    assert pending.tolist() == [1, 1, 1]


def test_asyncio_tasks_are_separate() -> None:
    async def skipped() -> nn.Module:
        with skip_model_initialization():
            first = nn.Linear(2, 2)
            await asyncio.sleep(0)
            second = nn.BatchNorm1d(2)
            await asyncio.sleep(0)
            return nn.Sequential(first, second)

    async def plain() -> nn.Module:
        first = nn.Linear(2, 2)
        await asyncio.sleep(0)
        return nn.Sequential(first, nn.Linear(2, 2))

    async def main() -> list[nn.Module]:
        return await asyncio.gather(skipped(), plain(), skipped(), plain(), skipped())

    built = asyncio.run(main())
    assert [is_meta(model) for model in built] == [True, False, True, False, True]
    assert [is_real(model) for model in built] == [False, True, False, True, False]
    assert built[0][1].running_var.tolist() == [1, 1]
    assert is_real(nn.Linear(2, 2))


def test_task_started_inside_a_block_is_plain_and_may_open_its_own() -> None:
    async def child(release: asyncio.Event) -> tuple[nn.Module, nn.Module]:
        plain = nn.Linear(2, 2)
        with skip_model_initialization():
            await release.wait()
            return plain, nn.Linear(2, 2)

    async def main() -> tuple[nn.Module, nn.Module, nn.Module]:
        release = asyncio.Event()
        with skip_model_initialization():
            task = asyncio.create_task(child(release))
            await asyncio.sleep(0)
            mine = nn.Linear(2, 2)
        assert is_meta(mine)
        release.set()
        return (mine, *(await task))

    _, plain, own = asyncio.run(main())
    assert is_real(plain)
    assert is_meta(own)


def test_nothing_of_torch_is_replaced_while_a_block_is_open() -> None:
    def attributes() -> dict[str, int]:
        owners = {
            "Module": nn.Module,
            "Parameter": nn.Parameter,
            "Tensor": torch.Tensor,
            "init": nn.init,
            "torch": torch,
        }
        return {
            f"{name}.{key}": id(value) for name, owner in owners.items() for key, value in vars(owner).items()
        }

    nn.Linear(2, 2)
    before = attributes()
    with skip_model_initialization():
        nn.Linear(2, 2)
        assert attributes() == before
    assert attributes() == before
