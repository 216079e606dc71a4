"""The pool: what it lends, keeps and gives back."""

import gc
import sys
import threading

import pytest
import torch
from safemap._blank import CACHE_LINE, Blank, aliases, skip_for
from safemap._buffers import HUGE_PAGE, MIB, BufferPool, bytes_of, round_up

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's allocator is used")


def take(pool: BufferPool, nbytes: int) -> torch.Tensor:
    view = pool.take(nbytes)
    assert view is not None
    return torch.frombuffer(view, dtype=torch.uint8)


@pytest.mark.parametrize("nbytes", [8 * MIB, 8 * MIB + 5, 50 * MIB + 5])
def test_memory_is_used_again(nbytes: int) -> None:
    pool = BufferPool()
    first = take(pool, nbytes)
    address = first.data_ptr()
    second = take(pool, nbytes)
    assert second.data_ptr() != address
    del first
    assert take(pool, nbytes).data_ptr() == address


def test_a_view_keeps_the_memory() -> None:
    pool = BufferPool()
    whole = take(pool, 8 * MIB)
    whole.fill_(7)
    part = whole[100:200].view(10, 10)
    del whole
    gc.collect()
    take(pool, 8 * MIB).fill_(9)
    assert bool((part == 7).all())


def test_a_sweep_peaks_at_the_largest_tensor_and_slack() -> None:
    sizes = [113, 5, 56, 28, 9, 85, 113, 1, 18, 56] * 5
    pool = BufferPool()
    highest = 0
    for size in sizes:
        tensor = take(pool, size * MIB)
        highest = max(highest, pool.resident_nbytes)
        del tensor
    assert highest <= (113 + 32) * MIB + HUGE_PAGE


def test_everything_alive_at_once_then_gone() -> None:
    pool = BufferPool()
    held = [take(pool, size * MIB) for size in (16, 4, 8, 16, 12)]
    total = sum(tensor.nbytes for tensor in held)
    assert total <= pool.resident_nbytes <= total + len(held) * HUGE_PAGE
    held.clear()
    gc.collect()
    assert pool.resident_nbytes <= 32 * MIB


def test_a_much_larger_buffer_gives_its_tail_back() -> None:
    pool = BufferPool(slack=4 * MIB)
    del_me = take(pool, 100 * MIB)
    del del_me
    small = [take(pool, 60 * MIB)]
    assert pool.resident_nbytes <= 104 * MIB
    small.append(take(pool, 60 * MIB))
    assert pool.resident_nbytes <= 124 * MIB + HUGE_PAGE + 40 * MIB
    for number, tensor in enumerate(small):
        tensor.fill_(number)
    assert [int(tensor[-1]) for tensor in small] == [0, 1]


def test_trimming_gives_back_what_is_not_lent_and_nothing_else() -> None:
    pool = BufferPool()
    kept = take(pool, 8 * MIB).fill_(3)
    gone = take(pool, 64 * MIB)
    del gone
    assert pool.resident_nbytes == 72 * MIB
    pool.trim()
    assert pool.resident_nbytes == 8 * MIB
    assert int(kept[0]) == int(kept[-1]) == 3
    again = take(pool, 64 * MIB)
    del again
    assert pool.resident_nbytes == 72 * MIB  # it lends again as before


def test_drop_free() -> None:
    pool = BufferPool()
    kept = take(pool, 8 * MIB)
    gone = take(pool, 8 * MIB)
    del gone
    pool.drop_free()
    assert pool.resident_nbytes == 8 * MIB
    del kept
    assert pool.resident_nbytes == 0


def test_tensors_die_in_other_threads() -> None:
    pool = BufferPool()

    def work() -> None:
        for value in range(100):
            tensor = take(pool, 2 * MIB)
            tensor.fill_(value)
            assert int(tensor[0]) == int(tensor[-1]) == value
            del tensor

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.resident_nbytes <= (4 * 2 + 32) * MIB


def test_bytes_of() -> None:
    tensor = torch.zeros(3, dtype=torch.int16)
    bytes_of(tensor)[2:4] = b"\x01\x02"
    assert tensor.tolist() == [0, 0x0201, 0]
    with pytest.raises(ValueError, match="expected a contiguous CPU tensor"):
        bytes_of(torch.zeros(2, 2).t())


def test_round_up() -> None:
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


# ---------------------------------------------------------------------- where memory lies


@pytest.mark.parametrize("offset", [0, 8, 63, 64, 4032, 4033, 4088, 4095])
def test_memory_that_the_processor_copies_to_slowly_is_avoided(offset: int) -> None:
    """Slow is a few bytes behind the source, modulo the page; so much further on it never is."""
    assert aliases(0, offset) == (offset in (4033, 4088, 4095))
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.complex64):
        skip = skip_for(dtype, offset)
        assert not aliases(skip, offset)
        assert skip % dtype.itemsize == 0
        assert (skip - offset) % CACHE_LINE == 0 or skip % CACHE_LINE == 0


def test_memory_may_begin_further_on() -> None:
    pool = BufferPool()
    view = pool.take(8 * MIB, skip=CACHE_LINE)
    assert view is not None
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    assert tensor.nbytes == 8 * MIB
    assert tensor.data_ptr() % 4096 == CACHE_LINE
    tensor.fill_(1)
    del view, tensor
    assert take(pool, 8 * MIB + CACHE_LINE).data_ptr() % 4096 == 0


@pytest.mark.parametrize("shape", [(), (5,), (1, 7, 1), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64], ids=str)
def test_a_blank_has_no_memory_and_makes_tensors_that_do(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    expected = torch.ones(shape, dtype=dtype)
    blank = Blank(dtype, shape, expected.nbytes)
    assert blank.template.untyped_storage().nbytes() == 0
    made = torch.empty_like(blank.template)
    memoryview(blank.at(made.data_ptr())).cast("B")[:] = bytes_of(expected)
    assert torch.equal(made, expected)
    assert (made.dtype, made.shape, made.stride()) == (dtype, expected.shape, expected.stride())
    assert made.is_contiguous()
    assert made.untyped_storage().nbytes() == expected.nbytes
