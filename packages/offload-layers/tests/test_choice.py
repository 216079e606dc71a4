"""Who stays: as many bytes as there is room for, and those that hide least behind computation."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offload_layers._choice import Demand, adapt_residents, choose_residents


def chosen(sizes: list[int], work: list[float], room: int, window: int = 20) -> list[int]:
    demands = [Demand(*pair) for pair in zip(sizes, work, strict=True)]
    return sorted(choose_residents(demands, room=room, window=window))


def test_everything_stays_where_everything_fits() -> None:
    assert chosen([10, 20, 30], [1, 1, 1], room=60) == [0, 1, 2]


def test_nothing_stays_without_room() -> None:
    assert chosen([10, 20, 30], [1, 1, 1], room=9) == []
    assert chosen([], [], room=9) == []


@pytest.mark.parametrize("count", [1, 2, 5, 10, 15])
def test_equal_layers_are_spread_evenly(count: int) -> None:
    stay = chosen([10] * 20, [10.0] * 20, room=10 * count)
    assert len(stay) == count
    gaps = [(b - a) % 20 or 20 for a, b in zip(stay, stay[1:] + stay[:1], strict=True)]
    assert max(gaps) <= 2 * math.ceil(20 / count)


def test_layers_with_much_to_move_and_little_to_compute_stay() -> None:
    # as in a diffusion transformer: a modulation is computed for one row, the other layers for every token
    sizes, work = [30, 10, 10] * 6, [1.0, 1000.0, 1000.0] * 6
    assert chosen(sizes, work, room=180, window=60) == [i for i in range(18) if i % 3 == 0]


def test_without_any_work_the_bytes_decide() -> None:
    assert len(chosen([10] * 8, [0.0] * 8, room=40)) == 4
    assert len(chosen([10] * 8, [0.0] * 7 + [1.0], room=20)) == 2


def test_those_on_disk_stay_first() -> None:
    demands = [Demand(10, 1.0, is_from_disk=index % 3 == 0) for index in range(12)]
    on_disk = {0, 3, 6, 9}
    assert choose_residents(demands, room=20, window=20) < on_disk
    assert choose_residents(demands, room=40, window=20) == on_disk
    more = choose_residents(demands, room=60, window=20)
    assert more > on_disk
    assert len(more) == 6
    assert choose_residents(demands, room=120, window=20) == set(range(12))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 50)), min_size=2, max_size=12),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_little_more_or_less_room_moves_few(
    layers: list[tuple[int, int]], share: float, then: float
) -> None:
    demands = [Demand(nbytes, work) for nbytes, work in layers]
    room, later = (int(part * sum(nbytes for nbytes, _ in layers)) for part in (share, then))
    before = choose_residents(demands, room=room, window=20)
    after = adapt_residents(before, demands, room=later, window=20)
    assert sum(demands[index].nbytes for index in after) <= later
    if sum(demands[index].nbytes for index in before) <= later:
        assert after >= before
    left = later - sum(demands[index].nbytes for index in after)
    assert all(demands[index].nbytes > left for index in set(range(len(demands))) - after)
    assert adapt_residents(after, demands, room=later, window=20) == after


def demanded_pace(sizes: list[int], work: list[float], stay: set[int], window: int) -> float:
    """Bytes per unit of work that the bus must move at the busiest moment of two forwards."""
    steps = [(0 if i in stay else size, w) for i, (size, w) in enumerate(zip(sizes, work, strict=True))] * 2
    paces = [0.0]
    for start, stop in itertools.combinations(range(len(steps) + 1), 2):
        nbytes = sum(size for size, _ in steps[start:stop]) - window
        done = sum(w for _, w in steps[start : stop - 1])
        paces.append(nbytes / done if done else (math.inf if nbytes > 0 else 0.0))
    return max(paces)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 50)), min_size=2, max_size=7),
    st.floats(0, 1),
)
def test_nearly_the_best_of_all_choices(layers: list[tuple[int, int]], share: float) -> None:
    sizes, work = [size for size, _ in layers], [float(w) for _, w in layers]
    room, window = int(share * sum(sizes)), 2 * max(sizes)
    stay = set(chosen(sizes, work, room, window))
    assert sum(sizes[i] for i in stay) <= room
    fitting = [
        set(subset)
        for count in range(len(sizes) + 1)
        for subset in itertools.combinations(range(len(sizes)), count)
        if sum(sizes[i] for i in subset) <= room
    ]
    best = min(demanded_pace(sizes, work, subset, window) for subset in fitting)
    first_come: set[int] = set()
    for index, size in enumerate(sizes):
        if sum(sizes[i] for i in first_come) + size <= room:
            first_come.add(index)
    ours = demanded_pace(sizes, work, stay, window)
    assert ours <= 2.5 * best + sum(sizes) / sum(work)
