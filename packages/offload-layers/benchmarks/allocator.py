"""What does torch's allocator take from the driver for weights that pass through a device?

Answered without a device. Forwards of a small transformer run on a ``FakeDevice``; what is allocated in its
copying queue, and when that is dropped, is replayed by the rules of torch's caching allocator, with sizes as
if the model was 8 times as wide, which is as wide as Qwen-Image. The rules are those that
``CUDACachingAllocator.cpp`` of torch 2.13 has: best fit, blocks that are split and joined, segments that grow
only with ``expandable_segments:True``. Activations are not in it: they have a stream, and so a pool, of their
own.

Needs diffusers and skipinit. ``python allocator.py`` takes half a minute.
"""

import bisect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from disk_offload import CONFIG, WEIGHTS, inputs, model_class, module_map, skeleton
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    enable_vram_management,
)
from offload_layers.testing import CountingSource, FakeDevice, residencies
from torch import Tensor

MIB = 1 << 20
HALF = torch.bfloat16
WIDER = 8
SMALL, SMALL_SEGMENT, LARGE_SEGMENT, EXACT_FROM, ROUNDED_TO = MIB, 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB
LINE = "{:28} {:>8} {:>12} {:>12} {:>12} {:>12}"


@dataclass(eq=False)
class Block:
    start: int
    nbytes: int
    is_free: bool = False
    before: "Block | None" = None
    after: "Block | None" = None


class Pool:
    """One of the two pools of a stream: of tensors up to a megabyte, and of larger ones."""

    def __init__(self, *, is_small: bool, expands: bool) -> None:
        self.is_small, self.expands = is_small, expands
        self.free: list[Block] = []  # by size, then address
        self.last: Block | None = None  # of what can be expanded
        self.reserved = self.asked_driver = self._end = 0

    def take(self, nbytes: int) -> Block:
        nbytes = -(-nbytes // 512) * 512
        index = bisect.bisect_left(self.free, (nbytes, 0), key=_order)
        block = self.free.pop(index) if index < len(self.free) else self._new(nbytes)
        rest = block.nbytes - nbytes
        if rest >= 512 if self.is_small or self.expands else rest > SMALL:
            other = Block(block.start + nbytes, rest, before=block, after=block.after)
            if block.after is not None:
                block.after.before = other
            elif self.last is block:
                self.last = other
            block.nbytes, block.after = nbytes, other
            self._add(other)
        block.is_free = False
        return block

    def give_back(self, block: Block) -> None:
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self.free.remove(other)
                block = _joined(*sorted((other, block), key=lambda b: b.start))
                if self.last in (other, block):
                    self.last = block if block.after is None else self.last
        self._add(block)

    def _new(self, nbytes: int) -> Block:
        segment = SMALL_SEGMENT if self.is_small else LARGE_SEGMENT
        self.asked_driver += 1
        if not self.expands:
            if nbytes >= EXACT_FROM:
                segment = -(-nbytes // ROUNDED_TO) * ROUNDED_TO
            self.reserved += segment
            self._end += segment + LARGE_SEGMENT  # segments never join
            return Block(self._end, segment)
        tail = self.last if self.last is not None and self.last.is_free else None
        missing = nbytes - (tail.nbytes if tail is not None else 0)
        grown = -(-missing // segment) * segment
        self.reserved += grown
        new = Block(self._end, grown, before=self.last)
        self._end += grown
        if self.last is not None:
            self.last.after = new
        self.last = new
        if tail is not None:
            self.free.remove(tail)
            new = self.last = _joined(tail, new)
        return new

    def _add(self, block: Block) -> None:
        block.is_free = True
        bisect.insort(self.free, block, key=_order)


def _order(block: Block) -> tuple[int, int]:
    return block.nbytes, block.start


def _joined(first: Block, second: Block) -> Block:
    first.nbytes, first.after = first.nbytes + second.nbytes, second.after
    if second.after is not None:
        second.after.before = first
    return first


class Replayed(FakeDevice):
    """A device whose copying queue allocates by torch's rules."""

    def __init__(self, *, expands: bool) -> None:
        super().__init__()
        self.pools = [Pool(is_small=small, expands=expands) for small in (True, False)]
        self.allocated = self.most_allocated = self.asked_in_the_last_forward = 0
        self._replaying = threading.RLock()
        self._is = threading.local()

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._is.aside = True
        try:
            with super().aside():
                yield
        finally:
            self._is.aside = False

    def upload(self, tensor: Tensor) -> Tensor:
        there = super().upload(tensor)
        if getattr(self._is, "aside", False):
            nbytes = tensor.nbytes * WIDER**2 if tensor.dim() > 1 else tensor.nbytes * WIDER
            with self._replaying:
                pool = self.pools[nbytes > SMALL]
                block = pool.take(nbytes)
                self.allocated += nbytes
                self.most_allocated = max(self.most_allocated, self.allocated)
            weakref.finalize(there.untyped_storage(), self._dropped, pool, block, nbytes).atexit = False
        return there

    def _dropped(self, pool: Pool, block: Block, nbytes: int) -> None:
        with self._replaying:
            self.allocated -= nbytes
            pool.give_back(block)

    @property
    def reserved(self) -> int:
        return sum(pool.reserved for pool in self.pools)

    @property
    def asked_driver(self) -> int:
        return sum(pool.asked_driver for pool in self.pools)


@torch.no_grad()
def replay(*, by_block: bool, share: float | None, expands: bool, forwards: int = 8) -> Replayed:
    """Run *forwards* with this share of the weights as the limit; None: no limit, and nothing stays."""
    model = skeleton()
    state = {name: torch.zeros(value.shape, dtype=HALF) for name, value in model.state_dict().items()}
    layers = module_map(AutoWrappedLinear, AutoWrappedModule, AutoWrappedNonRecurseModule, model)
    if by_block:
        layers = {type(model.transformer_blocks[0]): AutoWrappedModule, **layers}
    config: dict[str, Any] = {f"{r}_{w}": "disk" for r in ("offload", "onload") for w in ("dtype", "device")}
    config |= {"computation_dtype": HALF, "computation_device": "cpu"}
    for what in ("dtype", "device"):
        config[f"preparing_{what}"] = "disk" if share is None else config[f"computation_{what}"]
    nbytes = sum(value.nbytes for value in state.values())
    device = Replayed(expands=expands)
    with device.installed():
        limit = None if share is None else share * nbytes / 2**30
        managed = enable_vram_management(model, layers, config, limit, CountingSource(state))
        for _ in range(forwards):
            asked = device.asked_driver
            managed(**inputs(managed, "few"))
        device.asked_in_the_last_forward = device.asked_driver - asked
        schedule = residencies(managed)[0].schedule
        assert schedule is not None
        schedule.forget()
    return device


def main() -> None:
    WEIGHTS["dtype"] = HALF
    CONFIG.update(num_layers=6, num_attention_heads=24 // WIDER, joint_attention_dim=3584 // WIDER)
    model_class()
    print(LINE.format("layers", "limit", "segments", "passing, MB", "taken, MB", "asked, last"))
    for by_block in (False, True):
        for share in (None, 0.25, 0.6):
            for expands in (False, True):
                device = replay(by_block=by_block, share=share, expands=expands)
                print(
                    LINE.format(
                        "whole blocks" if by_block else "linear layers, norms",
                        "none" if share is None else f"{share:.0%}",
                        "expandable" if expands else "default",
                        f"{device.most_allocated / MIB:,.0f}",
                        f"{device.reserved / MIB:,.0f}",
                        device.asked_in_the_last_forward,
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
