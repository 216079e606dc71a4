"""What a machine lacks for full speed, and what to do about it: judgement of facts, nothing is asked here."""

import dataclasses
from collections.abc import Iterator

from offload_layers._facts import Facts
from offload_layers._sizes import format_size

#: what SATA carries: 6 Gbit/s, of which 8 in 10 are data. A disk that is not faster is no NVMe
_SATA_BYTES_PER_S = 600e6
#: a desktop and a browser take about this share of a small card; more than that is another program
_OTHERS_SHARE = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """Something that costs speed, and what can be done."""

    problem: str
    remedy: str


def advice(facts: Facts) -> list[Advice]:
    """Return what is missing for full speed, as far as *facts* show."""
    rules = (_device, _cores, _memory, _bus, _disk, _kernel)
    return [Advice(problem, remedy) for rule in rules for problem, remedy in rule(facts)]


def _device(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.has_unused_gpu:
        yield (
            f"an NVIDIA driver is loaded, but torch {facts.torch} sees no CUDA device",
            f"update the driver to one for CUDA {facts.torch_cuda}, or see if CUDA_VISIBLE_DEVICES hides it"
            if facts.torch_cuda
            else "this torch is built without CUDA: install one that is, see https://pytorch.org/get-started",
        )
    if facts.device_total_bytes is not None and facts.device_free_bytes is not None:
        total, taken = facts.device_total_bytes, facts.device_total_bytes - facts.device_free_bytes
        if taken > _OTHERS_SHARE * total:
            yield (
                f"{format_size(taken)} of the {format_size(total)} of {facts.device} are taken",
                "end what else uses it (nvidia-smi lists programs); weights that stay there need no bus",
            )
    if facts.why_no_fp8 and facts.device != "cpu":  # on a CPU eight bits are there for results, not for speed
        yield (
            f"{facts.device} does not multiply eight-bit floats: {facts.why_no_fp8.rstrip('.')}",
            "compute in bfloat16; storing eight bits halves what crosses the bus all the same",
        )


def _cores(facts: Facts) -> Iterator[tuple[str, str]]:
    usable = facts.cores if facts.core_quota is None else min(facts.cores, facts.core_quota)
    if facts.threads > max(1, usable):
        threads = max(1, int(usable))
        yield (
            f"torch computes with {facts.threads} threads, but the process may use {usable:g} cores",
            f"set OMP_NUM_THREADS={threads}, or call torch.set_num_threads({threads}): a thread without a "
            "core holds up the others",
        )
    if (
        facts.device == "cpu" and facts.threads * 2 < usable
    ):  # half is torch's own choice: one per core of two
        yield (
            f"torch computes with {facts.threads} of {usable:g} cores",
            "unset OMP_NUM_THREADS, or call torch.set_num_threads",
        )
    if usable < 2:
        yield (
            f"there is {usable:g} core for computing and for reading ahead",
            "give the process a second one; otherwise reading takes time from computing",
        )


def _memory(facts: Facts) -> Iterator[tuple[str, str]]:
    limit, total = facts.container_bytes, facts.host_total_bytes
    if limit is not None and (total is None or limit < total):
        of = "" if total is None else f" of the machine's {format_size(total)}"
        yield (
            f"the container may use {format_size(limit)}{of}",
            "raise its limit (docker run --memory, or resources.limits.memory) for models to stay in memory",
        )


def _bus(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.why_not_pinned:
        yield (
            f"the driver gives no page-locked memory: {facts.why_not_pinned.rstrip('.')}",
            "raise the limit of locked memory (ulimit -l unlimited, docker run --ulimit memlock=-1); "
            "otherwise copies make the host wait",
        )
    link = facts.link
    if link is not None and link.lanes < link.most_lanes:
        yield (
            f"{facts.device} is connected by {link.lanes} of its {link.most_lanes} lanes",
            "move it to a slot with more lanes, or see whether another card takes them",
        )
    if link is not None and link.gigatransfers_per_s < link.most_gigatransfers_per_s:
        speed, most = link.gigatransfers_per_s, link.most_gigatransfers_per_s
        yield (
            f"{facts.device} is connected at {speed:g} of its {most:g} GT/s",
            "see which generation the slot is set to in the firmware, and whether a riser cable is too slow",
        )


def _disk(facts: Facts) -> Iterator[tuple[str, str]]:
    rate = facts.disk_bytes_per_s
    if rate is not None and not facts.is_disk_cached and rate < _SATA_BYTES_PER_S:
        yield (
            f"the checkpoint's disk reads {format_size(int(rate))}/s",
            "move the checkpoint to a local NVMe disk, or give host memory to what the device cannot hold",
        )


def _kernel(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.huge_pages == "never":
        yield (
            "the kernel gives no huge pages",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root); large buffers then take "
            "less time to set up",
        )
