import gc

import pytest
import torch
from offload_layers import BudgetError
from offload_layers._books import Borrower
from offload_layers._budget import Budget, Lease
from offload_layers.testing import FakeMemory

CPU = torch.device("cpu")


class Layer:
    """A borrower that leaves when it is asked to, unless it is busy."""

    def __init__(self, name: str, nbytes: int, budget: Budget) -> None:
        self.name = name
        self.computation_nbytes = nbytes
        self.staying_nbytes = nbytes
        self.always_passes = False
        self.beside_nbytes = 0
        self.last_called = 0
        self.busy = False
        self.lease: Lease | None = None
        budget.register(self)

    def try_demote(self) -> bool:
        if self.busy or self.lease is None:
            return False
        self.lease.give_back()
        self.lease = None
        return True

    def yield_ahead_to(self, other: Borrower, *, waits: bool = True) -> None:
        """Nothing is fetched ahead for this layer."""

    def finish_dropped(self) -> None:
        """Nothing is fetched ahead for this layer."""

    def drop_ahead(self) -> None:
        """Nothing is fetched ahead for this layer."""


@pytest.fixture
def budget() -> Budget:
    return Budget(CPU, FakeMemory())


def stay(layer: Layer, budget: Budget, limit: int | None) -> bool:
    layer.lease = budget.try_borrow(layer, layer.computation_nbytes, limit=limit)
    return layer.lease is not None


def test_residents_leave_room_for_the_largest_layer_twice(budget: Budget) -> None:
    layers = [Layer(f"l{i}", 10, budget) for i in range(5)]
    large = [Layer("large", 25, budget), Layer("other", 25, budget)]
    assert [stay(layer, budget, 85) for layer in layers] == [True, True, True, False, False]
    assert budget.statistics().lent_nbytes == 30
    assert budget.statistics().refusals == 2
    assert large[0].lease is None


def test_when_everything_fits_no_room_is_left_for_what_would_pass(budget: Budget) -> None:
    layers = [Layer(f"l{i}", nbytes, budget) for i, nbytes in enumerate((10, 20, 30, 20))]
    assert [stay(layer, budget, 79) for layer in layers] == [True, False, False, False]
    assert [stay(layer, budget, 80) for layer in layers[1:]] == [True, True, True]
    assert budget.statistics().lent_nbytes == 80
    assert layers[1].try_demote()
    assert not stay(layers[1], budget, 79)
    more = Layer("more", 1, budget)  # of another model
    assert not stay(layers[1], budget, 80)
    assert stay(layers[1], budget, 81)
    assert stay(more, budget, 81)


def test_what_others_have_taken_counts() -> None:
    memory = FakeMemory(taken=95)
    budget = Budget(CPU, memory)
    layer = Layer("l", 10, budget)
    passing = Layer("passing", 10, budget)
    assert not stay(layer, budget, 100)
    memory.taken = 81
    assert not stay(layer, budget, 100)
    memory.taken = 80
    assert stay(layer, budget, 100)
    assert passing.lease is None


def test_layers_that_need_copies_even_if_they_stay_pass_always(budget: Budget) -> None:
    layers = [Layer(f"l{i}", 10, budget) for i in range(3)]
    for layer in layers[1:]:
        layer.always_passes = True
        budget.register(layer)
    assert [stay(layer, budget, 40) for layer in layers] == [True, True, False]
    assert stay(layers[2], budget, 50)


def test_without_a_limit_everything_fits(budget: Budget) -> None:
    assert stay(Layer("l", 1 << 60, budget), budget, None)


def test_a_layer_that_must_compute_makes_the_last_residents_leave(budget: Budget) -> None:
    layers = [Layer(f"l{i}", 10, budget) for i in range(3)]
    assert all(stay(layer, budget, 50) for layer in layers)
    lease = budget.borrow(layers[0], 15, limit=40)
    assert [layer.lease is not None for layer in layers] == [True, True, False]
    assert budget.statistics().lent_nbytes == 35
    lease.give_back()


def test_busy_residents_are_passed_over(budget: Budget) -> None:
    layers = [Layer(f"l{i}", 10, budget) for i in range(3)]
    assert all(stay(layer, budget, 50) for layer in layers)
    layers[2].busy = True
    other = Layer("other", 20, budget)
    budget.borrow(other, 20, limit=40)
    assert [layer.lease is not None for layer in layers] == [True, False, True]


def test_a_layer_larger_than_the_limit_runs_alone(budget: Budget) -> None:
    small, large = Layer("small", 10, budget), Layer("large", 100, budget)
    assert stay(small, budget, 210)
    lease = budget.borrow(large, 100, limit=50)
    assert small.lease is None
    assert budget.statistics().lent_nbytes == 100
    lease.give_back()


def test_giving_back_twice_is_an_error(budget: Budget) -> None:
    lease = budget.borrow(Layer("l", 10, budget), 10, limit=None)
    lease.give_back()
    with pytest.raises(BudgetError, match="a lease of 10 bytes is given back twice"):
        lease.give_back()
    assert budget.statistics().lent_nbytes == 0


def test_a_model_that_is_garbage_owes_nothing(budget: Budget) -> None:
    layer = Layer("l", 10, budget)
    assert stay(layer, budget, None)
    del layer
    gc.collect()
    assert budget.statistics().lent_nbytes == 0
    assert budget.statistics().residents == 0


def test_after_a_failed_allocation_all_residents_leave() -> None:
    memory = FakeMemory()
    budget = Budget(CPU, memory)
    layers = [Layer(f"l{i}", 10, budget) for i in range(3)]
    assert all(stay(layer, budget, None) for layer in layers)
    assert budget.demote_all() == 3
    assert memory.released == 1
    assert budget.statistics().lent_nbytes == 0
    assert budget.statistics().peak_nbytes == 30


def test_repr(budget: Budget) -> None:
    layer = Layer("l", 2048, budget)
    stay(layer, budget, None)
    assert repr(budget) == "<Budget cpu 2,048 bytes lent, 1 residents>"


def test_a_listener_is_told_each_change(budget: Budget) -> None:
    small, large = Layer("small", 10, budget), Layer("large", 25, budget)
    told: list[tuple[int, int]] = []
    with budget.telling(lambda lent, staying: told.append((lent, staying))):
        assert stay(small, budget, None)
        passing = budget.borrow(large, 25, limit=None)
        assert budget.try_keep(passing, limit=None)
        passing.give_back()
        ahead = budget.borrow_ahead(large, 25, limit=None)
        assert ahead is not None
        ahead.give_back()
        del ahead, passing
    assert told == [(0, 0), (10, 10), (35, 10), (35, 35), (10, 10), (35, 10), (10, 10), (10, 10)]
    stay(large, budget, None)
    assert len(told) == 8
