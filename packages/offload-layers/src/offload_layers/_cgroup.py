"""What the container allows: the limits of the process's control groups, version 1 and version 2.

A process is in one group of each hierarchy, inside all the parents of that group, and the limits of each of
them hold. Only those that are mounted can be seen; in a container that is usually one, which is its own root.

Note [What can be reclaimed]
    A group's use includes the page cache of the files it has read. The kernel drops pages of files, those on
    its active list as well as those on its inactive one, before it lets a process run out of memory. So both
    count as free here, as in ``MemAvailable``: otherwise a checkpoint that was read twice would look like
    memory that is gone.
    Source: Linux, ``si_mem_available`` in mm/show_mem.c, and Documentation/admin-guide/cgroup-v2.rst.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

#: version 1 says "no limit" by the largest number of whole pages in 63 bits; anything near it is no limit
_NO_LIMIT = 2**60


class _Mount(NamedTuple):
    point: str  # where it is
    root: str  # which group is shown there
    is_v2: bool
    options: list[str]  # version 1: the controllers of this hierarchy are among them


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the smallest limit, in bytes, of this process's group and its parents; None: there is none."""
    limits = [limit for folder in _folders("memory", root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Return the bytes that may be taken until one of the limits is met; None: there is no limit."""
    left = [
        max(0, min(limit, limit - _used(folder)))
        for folder in _folders("memory", root)
        if (limit := _limit(folder)) is not None
    ]
    return min(left, default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' worth of time may be used; None: there is no limit."""
    quotas = []
    for folder in _folders("cpu", root):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # else "max", or -1, or nothing
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _limit(folder: Path) -> int | None:
    """*memory.high* counts as well: beyond it a process is slowed down until it is of no use."""
    numbers = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    return min((n for n in numbers if n is not None and n < _NO_LIMIT), default=None)


def _used(folder: Path) -> int:
    """Return the bytes in use that cannot be reclaimed; see Note [What can be reclaimed]."""
    used = _number(folder / "memory.current")
    prefix = ""
    if used is None:
        used, prefix = _number(folder / "memory.usage_in_bytes") or 0, "total_"  # total: with the children's
    statistics = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines())
    files = sum(int(statistics.get(f"{prefix}{state}_file", 0)) for state in ("active", "inactive"))
    return used - files


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folder of this process's group of *controller*, and those of its parents."""
    group, is_v2 = _group(controller, root)
    for mount in _mounts(root):
        if mount.is_v2 != is_v2 or not (is_v2 or controller in mount.options):
            continue
        point = root / mount.point.lstrip("/")
        parts = PurePosixPath(group).parts
        within = PurePosixPath(mount.root)
        if within in (PurePosixPath(group), *PurePosixPath(group).parents) and ".." not in parts:
            inner = PurePosixPath(group).relative_to(within)
        else:  # the group lies outside of what is mounted: all that is known is the group that is shown
            inner = PurePosixPath()
        for path in (inner, *inner.parents):
            yield point / path
        return


def _group(controller: str, root: Path) -> tuple[str, bool]:
    """Return the path of this process's group, and whether its hierarchy is of version 2."""
    group = "/"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path, False
        if number == "0" and not controllers:
            group = path
    return group, True


def _mounts(root: Path) -> Iterator[_Mount]:
    """Yield the mounted hierarchies. Source: proc_pid_mountinfo(5)."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            shown, point = map(_unescaped, before.split(" ")[3:5])
            yield _Mount(point, shown, kind == "cgroup2", options.split(","))


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").strip()  # names of folders may be of any bytes
    except OSError:  # not there in this version, at the root, or since the group was removed
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None
