"""What a process holds in memory, seen from another process so that the first is not disturbed."""

import dataclasses
import time
from pathlib import Path

import psutil


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Resident memory of a process at one time.

    Attributes:
        time_s: Of the monotonic clock, which all processes of a machine share.
        anonymous: Bytes that belong to the process alone.
        mapped: Bytes of files in the page cache that the process has mapped; the system can take them back.
            None where the system does not tell the two apart (then ``anonymous`` is all there is).
    """

    time_s: float
    anonymous: int
    mapped: int | None


def resident(pid: int) -> Sample | None:
    """The memory of process *pid* now, or None when it has ended."""
    now = time.monotonic()
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        return _resident_elsewhere(pid, now)
    kibibytes = {
        line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Rss")
    }
    if "RssAnon" not in kibibytes:  # a process that has ended and was not waited for
        return None
    anonymous, mapped = (int(kibibytes[name]) * 1024 for name in ("RssAnon", "RssFile"))
    return Sample(now, anonymous + int(kibibytes["RssShmem"]) * 1024, mapped)


def _resident_elsewhere(pid: int, now: float) -> Sample | None:
    try:
        return Sample(now, psutil.Process(pid).memory_info().rss, None)
    except psutil.NoSuchProcess:
        return None
