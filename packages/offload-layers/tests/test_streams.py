"""Several streams: whether all that touches memory is ordered, found out without a GPU.

A device is simulated whose work is done at once, in memory of the host, while it is noted what each stream
is told to wait for. Two uses of the same bytes, of which one writes, must be ordered by that; so must uses of
memory that Python has dropped, and whatever its stream is given next. What is not in order is a race.
"""

import copy
import gc
import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    State,
    _pinned,
    _staged,
    disable_vram_management,
    enable_vram_management,
)
from offload_layers._device import Accelerator, replaced
from offload_layers._pinned import PinnedSlabs
from offload_layers._placement import GIB
from offload_layers.testing import CountingSource, residencies
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
raw = torch._C.DisableTorchFunctionSubclass
plain_lock = PinnedSlabs.lock
plain_to, plain_empty, plain_class = Tensor.to, torch.empty, Tensor.as_subclass
Clock = Counter  # of each stream, how much of its work comes before


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.before: Clock = Clock()
        sim.streams.append(self)
        self.name = f"stream {len(sim.streams)}"

    def wait_event(self, event: "Event") -> None:
        with sim.lock:
            self.before |= event.before

    def synchronize(self) -> None:
        with sim.lock:
            sim.host |= self.before

    def __repr__(self) -> str:
        return self.name


class Event:
    def record(self, stream: Stream) -> None:
        with sim.lock:
            self.before = Clock(stream.before)

    def synchronize(self) -> None:
        with sim.lock:
            sim.host |= self.before


class Block:
    """Memory, and who has used which bytes of it; that of the host has no stream."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self.recorded: set[Stream] = set()
        self.uses: list[tuple[Stream, int, bool, range]] = []

    def check(self, before: Clock, doing: str, *, writes: bool, where: range | None = None) -> None:
        for stream, number, wrote, its in self.uses:
            overlaps = where is None or (its.start < where.stop and where.start < its.stop)
            if overlaps and (writes or wrote) and before[stream] < number:
                sim.races.append(f"{doing} what {stream} {'writes' if wrote else 'reads'}")

    def check_reuse(self, stream: Stream) -> None:
        self.uses = [use for use in self.uses if use[0] not in self.recorded]
        self.check(stream.before, f"{stream} may be given", writes=True)


class Simulation:
    """All streams and blocks; as much of ``torch.cuda`` as an `Accelerator` uses."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.races: list[str] = []
        self.streams: list[Stream] = []
        self.host: Clock = Clock()  # what somebody has waited for is over
        self.blocks: dict[int, Block] = {}
        self.freed: list[Block] = []
        self.locked: list[tuple[Block, range]] = []
        self.slabs: list[Tensor] = []  # so that they are not freed
        self.lock = threading.RLock()
        self._current = threading.local()

    def is_available(self) -> bool:
        return True

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._current, "stream", self.streams[0])

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before

    def synchronize(self, device: Any = None) -> None:
        for stream in self.streams:
            stream.synchronize()

    def block(self, tensor: Tensor) -> Block | None:
        with raw():
            block, address = self.blocks.get(tensor.untyped_storage()._cdata), tensor.data_ptr()
        if block is None and tensor.device.type == "cpu":
            its = (locked for locked, where in self.locked if address in where)
            return next(its, None)  # memory of its own, but of a slab
        return block

    def allocate(self, tensor: Tensor, stream: Stream | None) -> None:
        if stream is not None:
            stream.before |= self.host
        for block in self.freed:
            if block.stream is stream is not None:
                block.check_reuse(stream)
        with raw():
            storage = tensor.untyped_storage()
        self.blocks[storage._cdata] = Block(stream)
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, key: int) -> None:
        with self.lock:
            self.freed.append(self.blocks.pop(key))

    def launch(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Do something in the current stream; what it writes may be new."""
        with self.lock:
            stream = self.current_stream()
            stream.before |= self.host
            stream.before[stream] += 1
            for tensor in writes:
                if self.block(tensor) is None:
                    self.allocate(tensor, stream)
            for tensor, is_write in [*((t, False) for t in reads), *((t, True) for t in writes)]:
                block = self.block(tensor)
                if block is not None:
                    where = bytes_of(tensor)
                    block.check(stream.before, f"{stream}: {name} uses", writes=is_write, where=where)
                    block.uses.append((stream, stream.before[stream], is_write, where))


def bytes_of(tensor: Tensor) -> range:
    with raw():
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return range(start, start + (last + 1) * tensor.element_size())


def changes_first(function: Any) -> bool:
    name = function.__name__
    return name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "detach_")


class PinnedTensor(Tensor):
    def is_pinned(self, device: Any = None) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if changes_first(function):
            with sim.lock:
                block: Any = sim.block(args[0])
                block.check(sim.host, "the host writes", writes=True, where=bytes_of(args[0]))
        with raw():
            result = function(*args, **(kwargs or {}))
        is_view = lambda t: type(t) is Tensor and sim.block(t) is not None  # noqa: E731
        return tree_map(lambda t: plain_class(t, cls) if is_view(t) else t, result)


class CudaTensor(Tensor):
    device = property(lambda self: CUDA)  # type: ignore[assignment]

    def record_stream(self, stream: Any) -> None:
        block: Any = sim.block(self)
        block.recorded.add(stream)

    def __deepcopy__(self, memo: Any) -> Tensor:
        memo[id(self)] = twin = self.detach().clone().requires_grad_(self.requires_grad)
        twin._is_param = getattr(self, "_is_param", False)  # type: ignore[attr-defined]
        return twin

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.__name__
        with raw():
            result = function(*args, **kwargs)
        result = tree_map(lambda t: plain_class(t, cls) if type(t) is Tensor else t, result)
        if name in ("__get__", "__set__"):
            return result
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        changed = [args[0]] if changes_first(function) else []
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and sim.block(t) is None]
        if changed or new:
            sim.launch(name, [t for t in tensors if t is not args[0] or not changed], changed + new)
        pageable = name == "copy_" and not isinstance(args[1], (CudaTensor, PinnedTensor))
        if pageable or name == "equal" or (name == "copy_" and not kwargs.get("non_blocking")):
            sim.current_stream().synchronize()
        return result


def to(self: Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    """Stand in for ``Tensor.to``."""
    wanted = [*args, *kwargs.values()]
    device = next((torch.device(w) for w in wanted if isinstance(w, (str, torch.device))), self.device)
    dtype = next((w for w in wanted if isinstance(w, torch.dtype)), self.dtype)
    if CUDA not in (device, self.device):
        return plain_to(self, *args, **kwargs)
    if (device, dtype) == (self.device, self.dtype) and not kwargs.get("copy"):
        return self
    with raw():
        there = plain_class(plain_to(self, dtype, copy=True), CudaTensor if device == CUDA else Tensor)
    sim.launch("to", [self], [there] if device == CUDA else [])
    if device != self.device and not (non_blocking and is_pinned(self)):
        sim.current_stream().synchronize()
    return there


def empty(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """Stand in for ``torch.empty``."""
    if device != CUDA:
        return plain_empty(*args, device=device, **kwargs)
    tensor = plain_class(plain_empty(*args, **kwargs), CudaTensor)
    with sim.lock:
        sim.allocate(tensor, sim.current_stream())
    return tensor


def page_locked(nbytes: int) -> Tensor:
    tensor = plain_class(plain_empty(nbytes, dtype=torch.uint8), PinnedTensor)
    with sim.lock:
        sim.allocate(tensor, None)
        block: Any = sim.block(tensor)
        sim.locked.append((block, bytes_of(tensor)))
        sim.slabs.append(tensor)
    return tensor


def lock(self: PinnedSlabs, tensor: Tensor) -> Tensor:
    """Stand in for ``PinnedSlabs.lock``: what lies in page-locked memory is of another class here only."""
    locked = plain_lock(self, tensor)
    return tensor if locked is tensor else plain_class(locked, PinnedTensor)


def as_subclass(self: Tensor, cls: Any) -> Tensor:
    """Stand in for ``Tensor.as_subclass``: a parameter on another device is of another class here only."""
    if cls not in (CudaTensor, PinnedTensor):
        return plain_class(self, cls)
    return self if isinstance(self, CudaTensor) else nn.Parameter(self, requires_grad=False)


def usual() -> tuple[int, ...]:
    """Stand in for ``_staged._usual``: a tensor on the device is an alias of another one here only."""
    with raw():
        return _staged._counts([plain_class(plain_empty(1), CudaTensor)])[0]


def is_pinned(self: Tensor, device: Any = None) -> bool:
    """Stand in for ``Tensor.is_pinned``: a parameter whose values were moved keeps its class."""
    block = sim.block(self)
    return block is not None and block.stream is None


@pytest.fixture(autouse=True)
def _simulated() -> Iterator[None]:
    global sim
    sim = Simulation()
    Stream()
    real = torch.get_device_module
    with ExitStack() as stack:
        for where, name, stand_in in (
            (torch, "get_device_module", lambda d=None: sim if torch.device(d).type == "cuda" else real(d)),
            (torch, "empty", empty),
            (Tensor, "to", to),
            (Tensor, "as_subclass", as_subclass),
            (Tensor, "is_pinned", is_pinned),
            (_pinned, "_page_locked", page_locked),
            (PinnedSlabs, "lock", lock),
            (_staged, "_usual", usual),
            (_pinned, "available_ram", lambda: 1 << 40),
            (_pinned, "CHUNK", 64),
            (_pinned, "SLAB", 1 << 12),
        ):
            stack.enter_context(mock.patch.object(where, name, stand_in))
        stack.enter_context(replaced(CUDA, Accelerator(CUDA)))
        yield
        gc.collect()


sim: Simulation


# -- models ------------------------------------------------------------------------------------------

WIDTH = 8
NBYTES = 4 * WIDTH * WIDTH
F32, BF16 = torch.float32, torch.bfloat16
saved: list[tuple[Stream, Tensor]] = []  # as autograd saves them for the backward pass


class Scale(nn.Module):
    """What it does can be replaced by *instead*."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.ones(WIDTH))
        self.instead: Callable[[Scale, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.instead is not None:
            return self.instead(self, x)
        weight = self.weight
        if torch.is_grad_enabled():
            saved.append((sim.current_stream(), weight))
        return x * weight + self.shift


class Block_(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(WIDTH))
        self.scale = Scale()
        self.called, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.read.weight  # before others compute
        x = self.called(self.scale(x)) * self.gate
        return nn.functional.linear(x, weight).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block_(), Block_(), Block_())
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.blocks[0].read.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))  # type: ignore[no-any-return]


FACES: Any = {nn.Linear: AutoWrappedLinear, Scale: AutoWrappedModule, Block_: AutoWrappedNonRecurseModule}


def config(*resting: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"computation_dtype": F32, "computation_device": CUDA}
    for role, placement in zip(("offload", "onload", "preparing"), resting, strict=True):
        settings[f"{role}_dtype"], settings[f"{role}_device"] = placement
    return settings


DISK = ("disk", "disk")
CONFIGS = {
    "disk": config(DISK, DISK, DISK),
    "host": config((F32, "cpu"), (F32, "cpu"), (F32, "cpu")),
    "page-locked": config(DISK, (BF16, "cpu"), (BF16, "cpu")),
    "preparing": config(DISK, (F32, "cpu"), (F32, CUDA)),
    "preparing in bfloat16": config(DISK, (BF16, "cpu"), (BF16, CUDA)),
    "device": config((F32, CUDA), (F32, CUDA), (F32, CUDA)),
    "device in bfloat16": config((BF16, CUDA), (BF16, CUDA), (BF16, CUDA)),
}


def make(module: nn.Module, name: str, limit: float | None = None, *, trains: bool = False) -> Any:
    """Return a managed copy of *module*, whose weights bfloat16 can hold."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    model = copy.deepcopy(module).requires_grad_(trains)
    return enable_vram_management(model, FACES, CONFIGS[name], limit, CountingSource(module.state_dict()))


def one_scale(name: str, *, trains: bool = False) -> Any:
    return make(nn.Sequential(Scale()), name, trains=trains)[0]


def ones() -> Tensor:
    x = torch.ones(3, WIDTH).to(CUDA)
    sim.synchronize()
    return x


def settle(model: nn.Module) -> None:
    for residency in residencies(model):
        assert residency.schedule is not None
        residency.schedule.prefetcher.settle()


# -- what the simulation sees ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "broken", "expected"),
    [
        ("disk", (Accelerator, "wait"), "stream 1: linear uses what stream 2 writes"),
        ("disk", (Accelerator, "finished"), "stream 2 may be given what stream 1 reads"),
        ("disk", (Event, "synchronize"), "the host writes what stream 2 reads"),
        ("preparing", (Accelerator, "synchronize"), "stream 2: linear uses what stream 1 writes"),
    ],
)
def test_races_are_seen(name: str, broken: tuple[type, str], expected: str) -> None:
    with mock.patch.object(*broken, lambda *args: None):
        model, x = make(Net(), name), ones()
        for _ in range(2):
            model(x)
        with sim.stream(Stream()):
            model(x)
    assert expected in sim.races


# -- one race each -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_two_streams_in_turn(name: str) -> None:
    x, streams = ones(), (Stream(), Stream())
    model = make(Net(), name)
    for stream in 3 * streams:
        with sim.stream(stream):
            model(x)
    assert sim.races == []


@pytest.mark.parametrize("known_order", [False, True])
def test_copies_are_made_after_what_the_caller_wrote(known_order: bool) -> None:
    model, x = make(Net(), "device in bfloat16"), ones()
    for _ in range(2):
        model(x)
    residencies(model)[0].schedule.let_go()  # type: ignore[union-attr]
    residencies(model)[0].schedule.forget()  # type: ignore[union-attr]
    if not known_order:
        model = copy.deepcopy(model)
    sim.synchronize()
    for parameter in set(model.parameters()):
        parameter.mul_(2)  # an optimizer's step, say
    model(x)
    settle(model)
    assert sim.races == []


def test_what_was_moved_to_the_device_is_there_for_all_streams() -> None:
    x = ones()
    layer = one_scale("device")
    with sim.stream(Stream()):
        layer(x)
    layer.load_state_dict({"weight": torch.ones(WIDTH), "shift": torch.ones(WIDTH)})
    with sim.stream(Stream()):
        layer(x)
    layer.computation_dtype = layer.offload_dtype = BF16
    with sim.stream(Stream()):
        layer(x.to(BF16))
    assert sim.races == []


def test_a_plain_model_is_there_for_all_streams() -> None:
    x, model = ones(), make(Net(), "host")
    disable_vram_management(model, CUDA)
    with sim.stream(Stream()):
        model(x)
    assert sim.races == []


def test_weights_that_a_layer_in_another_dtype_leaves() -> None:
    x, layer = ones(), one_scale("preparing in bfloat16")
    layer(x)
    with sim.stream(Stream()):
        layer(x)
    layer.offload()
    assert x.add(1).numel()
    assert sim.races == []


def test_a_layer_that_ceases_to_be_resident_while_others_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer, other = ones(), one_scale("preparing"), Stream()
    layer(x)
    assert layer.state is State.PREPARING

    def call() -> None:
        with torch.no_grad(), sim.stream(other):
            layer(x)

    def wait(self: Accelerator) -> None:
        sim.synchronize()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(0.2)  # it may have to wait, too
        threads.append(thread)

    threads: list[threading.Thread] = []
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "synchronize", wait)
        assert layer._owner().try_demote()
    assert x.add(1).numel()
    for thread in threads:
        thread.join(10)
    assert sim.races == []


@pytest.mark.parametrize("is_known", [True, False])
def test_a_thread_that_has_read_a_resident_weight_when_another_one_makes_it_leave(is_known: bool) -> None:
    model, x, other = make(nn.Sequential(Scale(), Scale()), "preparing"), ones(), Stream()
    has_read, has_left = threading.Event(), threading.Event()

    def compute(self: Scale, x: Tensor) -> Tensor:
        weight = self.weight
        has_read.set()
        assert has_left.wait(10)
        return x * weight

    def call() -> None:
        with torch.no_grad(), sim.stream(other):
            model[0](x)

    model(x)
    if is_known:
        model[0].offload()
        call()  # here the stream is seen to compute
        assert model[0].state is State.PREPARING
    model[0].instead = compute
    thread = threading.Thread(target=call)
    thread.start()
    assert has_read.wait(10)
    assert model[0]._owner().try_demote()
    has_left.set()
    thread.join(10)
    x.add(1)
    assert sim.races == []


@pytest.mark.parametrize(("name", "times"), [("device", 0), ("preparing", 3)])
def test_only_weights_that_leave_are_kept_for_others(name: str, times: int) -> None:
    x, layer = ones(), one_scale(name)
    with mock.patch.object(Accelerator, "record_use") as record_use:
        for _ in range(3):
            with torch.no_grad():
                layer(x)
            layer.offload()
    assert sum(call.kwargs.get("by_anyone", False) for call in record_use.call_args_list) == times


def test_adapters_are_added_to_what_is_read_when_they_are_there() -> None:
    x, model = ones(), make(nn.Sequential(nn.Linear(WIDTH, WIDTH)), "disk")
    a, b = torch.ones(2, WIDTH).to(CUDA), torch.ones(WIDTH, 2).to(CUDA)
    model[0].add_lora(a, b, 0.5)
    model[0].merge_lora()
    model(x)
    assert sim.races == []


def test_weights_that_the_caller_has_page_locked_are_overwritten() -> None:
    x, model = ones(), nn.Sequential(Scale()).requires_grad_(False)
    locked = page_locked(4 * WIDTH).view(F32)
    locked._is_param = True  # type: ignore[attr-defined]
    model[0]._parameters["weight"] = locked  # type: ignore[assignment]
    enable_vram_management(model, FACES, CONFIGS["host"])
    model(x)
    model.load_state_dict({"0.weight": torch.ones(WIDTH), "0.shift": torch.ones(WIDTH)})
    assert sim.races == []


@pytest.mark.parametrize("name", ["host", "page-locked"])
@pytest.mark.parametrize("waits", [True, False])
def test_whoever_has_page_locked_weights_may_change_them_at_once(name: str, waits: bool) -> None:
    with ExitStack() as stack:
        if not waits:
            stack.enter_context(mock.patch.object(Accelerator, "let_pass"))
        model, x = make(nn.Sequential(Scale(), Scale(), Scale()), name, 0), ones()
        for _ in range(4):  # a model's own weights are moved after the third
            model(x)
        locked = [parameter for parameter in model.parameters() if parameter.is_pinned()]
        assert len(locked) == 3
        for parameter in locked:
            block: Any = sim.block(parameter)
            block.check(sim.host, "the host writes", writes=True, where=bytes_of(parameter))
    assert bool(sim.races) == (not waits)


def test_weights_that_the_caller_page_locks_later_may_be_changed_at_once() -> None:
    model, x = make(nn.Sequential(Scale(), Scale(), Scale()), "host", 0), ones()
    model(x)
    for parameter in model.parameters():
        parameter.data = page_locked(4 * WIDTH).view(F32).copy_(parameter)
    model(x)
    for parameter in model.parameters():
        block: Any = sim.block(parameter)
        block.check(sim.host, "the host writes", writes=True, where=bytes_of(parameter))
    assert sim.races == []


@pytest.mark.parametrize("waits", [True, False])
def test_whoever_has_read_a_weight_may_change_it_where_it_rests(waits: bool) -> None:
    with ExitStack() as stack:
        if not waits:
            stack.enter_context(mock.patch.object(Accelerator, "let_pass"))
        layer = one_scale("page-locked")
        layer.weight.add(1)
        parameter = layer._owner().weights[0].registered
        block: Any = sim.block(parameter)
        block.check(sim.host, "the host writes", writes=True, where=bytes_of(parameter))
    assert bool(sim.races) == (not waits)


def test_buffers_that_came_in_inference_mode_can_be_written() -> None:
    x, layer = ones(), one_scale("disk")
    with torch.inference_mode():
        layer(x)
    layer.shift.add_(1)
    layer.load_state_dict({"weight": torch.ones(WIDTH), "shift": torch.ones(WIDTH)})
    assert torch.equal(layer(x), x + 1)


def test_a_weight_that_two_streams_read_from_outside() -> None:
    x, model = ones(), make(nn.Sequential(Scale(), Scale()), "disk")
    for stream in (Stream(), Stream()):
        with sim.stream(stream):
            x.add(model[0].weight)
    model[1](x)
    model[1](x)
    assert sim.races == []


def test_a_weight_that_is_read_from_outside_before_its_layer_leaves() -> None:
    x, layer = ones(), one_scale("preparing")
    layer(x)
    with sim.stream(Stream()):
        weight = layer.weight
        layer.offload()
        x.add(weight)
        del weight
    x.add(1)
    assert sim.races == []


def test_buffers_of_modules_outside_of_the_map_are_where_the_layers_compute() -> None:
    plain = nn.Sequential(nn.Identity(), Scale())
    plain[0].register_buffer("table", torch.ones(WIDTH), persistent=False)
    managed = make(plain, "disk")
    assert managed[0].table.device == CUDA


def test_buffers_that_go_home() -> None:
    x, layer, other = ones(), one_scale("disk"), Stream()
    layer(x)
    with sim.stream(other):
        layer(x)
    layer.offload()
    x.add(1)
    assert sim.races == []


# -- copies that several share -----------------------------------------------------------------------


def nested(layer: Any, x: Tensor, *, outer_grad: bool, inner_grad: bool) -> Callable[[], Tensor]:
    """Call *layer* while it computes, in another stream; return how the other one goes on afterwards."""
    outer, inner = Stream(), Stream()
    kept: list[Tensor] = []

    def compute_inside(self: Scale, x: Tensor) -> Tensor:
        kept.append(self.weight)
        return x * self.weight

    def compute(self: Scale, x: Tensor) -> Tensor:
        weight = self.weight
        self.instead = compute_inside
        with sim.stream(inner), torch.set_grad_enabled(inner_grad):
            self(x)
        out = x * weight
        del weight
        layer_again(x)
        return out

    def layer_again(x: Tensor) -> None:
        """Let the copying stream use what memory it has."""
        with layer_device.aside():
            torch.empty(1, device=CUDA).add(1)

    def backward() -> Tensor:
        with sim.stream(inner):
            return x * kept.pop()

    layer_device = layer._owner()._device
    layer.instead = compute
    with sim.stream(outer), torch.set_grad_enabled(outer_grad):
        layer(x)
    if not inner_grad:
        kept.clear()
    with sim.stream(outer):
        x.add(1)
    return backward


@pytest.mark.parametrize("name", ["host", "page-locked"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("outer_grad", [False, True])
@pytest.mark.parametrize("inner_grad", [False, True])
def test_a_copy_that_two_streams_share(name: str, trains: bool, outer_grad: bool, inner_grad: bool) -> None:
    x, layer = ones(), one_scale(name, trains=trains)
    backward = nested(layer, x, outer_grad=outer_grad, inner_grad=inner_grad)
    if inner_grad:
        backward()
    with torch.no_grad():
        layer.instead = None
        layer(x)
    assert sim.races == []


# -- programs ----------------------------------------------------------------------------------------


class Program:
    """A random sequence of what can be done with a model, in several streams, beside the plain model."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        choose = self.random.choice
        self.oracle = Net().requires_grad_(False)
        self.inputs = [torch.randn(3, WIDTH) for _ in range(2)]
        self.there = [x.to(CUDA) for x in self.inputs]
        self.streams = [sim.streams[0], Stream(), Stream()]
        self.is_exact = True  # until adapters were there
        with sim.stream(choose(self.streams)):
            limit = choose([None, 0, 3 * NBYTES / GIB, 8 * NBYTES / GIB])
            self.model = make(self.oracle, choose(list(CONFIGS)), limit, trains=choose([False, True]))
        self.layers = residencies(self.model)

    def run(self, steps: int) -> None:
        actions = [self.forward, self.forward, self.train, self.infer, self.read, self.move, self.limit]
        actions += [self.load, self.change, self.demote, self.fail, self.copy]
        for _ in range(steps):
            with sim.stream(self.random.choice(self.streams)):
                self.random.choice(actions)()
                assert sim.races == []
            with sim.stream(self.random.choice(self.streams)):
                self.there[0].add(1)  # whatever memory is free is used

    def forward(self, model: Any = None) -> None:
        index = self.random.randrange(2)
        out = (model or self.model)(self.there[index])
        if self.random.random() < 0.3:  # otherwise the host goes on
            assert torch.allclose(out.detach().to("cpu"), self.oracle(self.inputs[index]), atol=1e-5)

    def train(self) -> None:
        with torch.enable_grad():
            self.forward()
        for stream, weight in saved:
            with sim.stream(stream):
                weight.add(1)
        saved.clear()

    def infer(self) -> None:
        with torch.inference_mode():
            self.forward()

    def read(self) -> None:
        layer = self.random.choice(self.layers)
        layer.read(self.random.choice(layer.weights)).add(1)

    def move(self) -> None:
        layer = self.random.choice(self.layers)
        self.random.choice([layer.offload, lambda: layer.climb_to(self.random.choice(list(State)))])()

    def limit(self) -> None:
        limit = self.random.choice([None, 0, 3 * NBYTES, 8 * NBYTES])
        for layer in self.layers:
            layer.limit = limit

    def load(self) -> None:
        self._ordered(lambda: self.model.load_state_dict(self.oracle.state_dict()))

    def change(self) -> None:
        def change() -> None:
            self.layers[0].schedule.let_go()  # type: ignore[union-attr]
            for parameter in set(self.model.parameters()):
                if not parameter.is_meta:
                    parameter.mul_(1)

        self._ordered(change)

    def _ordered(self, change: Callable[[], object]) -> None:
        """Change weights as on a plain model: streams that use them before and after are told to wait."""
        settle(self.model)
        sim.synchronize()
        change()
        self.forward()
        sim.synchronize()

    def demote(self) -> None:
        self.layers[0].budget.demote_all()

    def fail(self) -> None:
        source: Any = self.layers[0].source
        failing = getattr(source, "_source", source)
        failing.failing.add("blocks.1.called.weight")
        try:
            self.forward()
        except OSError:
            pass
        finally:
            failing.failing.clear()

    def copy(self) -> None:
        twin = copy.deepcopy(self.model)
        self.forward(twin)
        sim.synchronize()


@pytest.mark.parametrize("seed", range(20))
def test_programs(seed: int) -> None:
    Program(seed).run(12)
