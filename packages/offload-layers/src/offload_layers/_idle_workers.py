"""The cores on which torch's idle workers wait, for threads that read between two computations.

Note [Idle workers]
    On a CPU torch computes with a team of OpenMP threads. A worker of GNU OpenMP, with which torch is built
    on Linux, does not sleep when its part is done: for 300,000 pauses of the processor (17 ms where this was
    measured) it looks whether there is more, and its core is taken. So a layer that is read between two
    computations, by as many threads as there are cores, gets less than them: 5.5 GB/s on two cores instead of
    7.5. The environment variable OMP_WAIT_POLICY=passive lets workers sleep, but has to be set before torch
    is imported.
    From within there is one way. Where there are more OpenMP threads than cores, a worker looks 100 times
    only. So while layers are read, a thread has a team of its own, too small to be in the way, which does
    nothing. Source: the manual of libgomp, GOMP_SPINCOUNT.
    It is not free: a worker that sleeps has to be woken, which takes each operation some 10 us longer. So the
    team goes when nothing has been read for a second. Other OpenMP libraries do not count that way; there the
    team is of no use, and no harm.
"""

import contextlib
import os
import threading
import time

import torch

#: how long after the last read the workers wait in the usual way again
HELD_S = 1.0
#: so many elements of an operation torch gives to one thread. Source: at::internal::GRAIN_SIZE
_GRAIN = 32768

_until = 0.0  # by time.monotonic()
_holder: threading.Thread | None = None
_lock = threading.Lock()


def let_idle_workers_sleep() -> None:
    """Have cores that compute nothing free from now on; called after each read, it costs a microsecond."""
    global _until, _holder
    _until = time.monotonic() + HELD_S
    if _holder is not None:
        return
    size = _team_size()
    with _lock:
        if _holder is not None or not size:
            return
        holder = threading.Thread(
            target=_hold_team, args=(size,), name="offload-layers-idle-workers", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no more threads, or the interpreter is ending
            holder.start()
            _holder = holder


def _team_size() -> int:
    """Return the threads of a team that makes more than there are cores; 0 if cores are free in any case."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    computing = torch.get_num_threads()
    size = cores - computing + 2  # the thread that holds it does not count
    return size if 2 <= size <= computing else 0


def _hold_team(size: int) -> None:
    global _holder
    torch.empty(size * _GRAIN, dtype=torch.uint8).fill_(0)  # torch makes the team; it lasts as long as we do
    while True:
        time.sleep(max(0.0, _until - time.monotonic()))
        with _lock:
            if time.monotonic() >= _until:
                _holder = None
                return


def _after_fork() -> None:
    global _holder, _lock
    _holder, _lock = None, threading.Lock()  # a forked child has no thread, and may have found the lock taken


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
