"""Memory that the machine really has, for measurements in a virtual one.

A virtual machine gives memory that it does not use back to its host after seconds, huge pages first, and
getting it again takes up to 2 ms a MiB: several times as long as reading as much from a disk. Whether that
happens to a contender is chance, and on a machine that owns its memory it never does.
"""

import contextlib
import mmap
import subprocess
import sys
from collections.abc import Iterator

HUGE_PAGE = 2 << 20
LEFT = 64 << 20  # bytes that stay free when all are used once


@contextlib.contextmanager
def owned_memory(nbytes: int) -> Iterator[None]:
    """Inside, leave *nbytes* of memory free and hold the rest."""
    holder = subprocess.Popen(
        [sys.executable, __file__, str(_free_nbytes() - nbytes), "hold"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        yield
    finally:
        holder.communicate()  # ends its input, and with it the process


def use_free_memory() -> None:
    """Use all free memory once; call it right before each measurement."""
    command = [sys.executable, __file__, str(_free_nbytes() - LEFT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _free_nbytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemFree:")) * 1024


def _used_once(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, nbytes, HUGE_PAGE):
        memory[start] = 1
    return memory


if __name__ == "__main__":
    held = _used_once(max(HUGE_PAGE, int(sys.argv[1])))
    print("ready", flush=True)
    if sys.argv[2:]:
        sys.stdin.read()
