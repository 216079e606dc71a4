"""What is found out about a machine, how it is judged, and how it is told."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from offload_layers import _doctor, _facts, _probe
from offload_layers._advice import Advice, advice
from offload_layers._cli import main
from offload_layers._facts import Facts, Link, gather

GB = 10**9
CPU = torch.device("cpu")

#: a machine with nothing to complain about
FINE = Facts(
    device="cuda:0",
    device_name="NVIDIA GeForce RTX 4090",
    driver="550.54.15",
    torch="2.13.0",
    torch_cuda="12.8",
    has_unused_gpu=False,
    device_total_bytes=24 * GB,
    device_free_bytes=23 * GB,
    host_total_bytes=64 * GB,
    host_free_bytes=50 * GB,
    container_bytes=None,
    cores=16,
    core_quota=None,
    threads=8,
    locked_limit_bytes=None,
    why_not_pinned="",
    huge_pages="madvise",
    why_no_fp8="",
    link=Link(16, 16, 16.0, 16.0),
    disk_bytes_per_s=3.5e9,
    is_disk_cached=False,
    bus_bytes_per_s=25.2e9,
    memory_bytes_per_s=40e9,
    flops=160e12,
)


def test_nothing_is_missing() -> None:
    assert advice(FINE) == []
    assert list(_doctor.as_text(FINE, [])) == [
        "device        cuda:0, NVIDIA GeForce RTX 4090",
        "driver        550.54.15",
        "torch         2.13.0",
        "device memory 23 GB free of 24 GB",
        "host memory   50 GB free of 64 GB",
        "container     no limit",
        "cores         16; torch computes with 8 threads",
        "page-locked   works (no limit)",
        "huge pages    madvise",
        "eight bits    matrix products",
        "disk          3.5 GB/s",
        "bus           25.2 GB/s (16 lanes at 16 GT/s)",
        "memory        40 GB/s",
        "computing     160 TFLOP/s in bfloat16",
        "",
        "Nothing is missing for full speed.",
    ]


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        (
            {"has_unused_gpu": True, "torch": "2.13.0+cpu", "torch_cuda": None},
            "an NVIDIA driver is loaded, but torch 2.13.0+cpu sees no CUDA device",
            "this torch is built without CUDA: install one that is",
        ),
        (
            {"has_unused_gpu": True},
            "an NVIDIA driver is loaded, but torch 2.13.0 sees no CUDA device",
            "update the driver to one for CUDA 12.8",
        ),
        (
            {"device_free_bytes": 20 * GB},
            "4 GB of the 24 GB of cuda:0 are taken",
            "end what else uses it",
        ),
        (
            {"why_no_fp8": "compute capability 8.6."},
            "cuda:0 does not multiply eight-bit floats: compute capability 8.6",
            "compute in bfloat16",
        ),
        (
            {"core_quota": 2.5},
            "torch computes with 8 threads, but the process may use 2.5 cores",
            "set OMP_NUM_THREADS=2, or",
        ),
        (
            {"device": "cpu", "threads": 1},
            "torch computes with 1 of 16 cores",
            "unset OMP_NUM_THREADS",
        ),
        (
            {"cores": 1, "threads": 1},
            "there is 1 core for computing and for reading ahead",
            "give the process a second one",
        ),
        (
            {"container_bytes": 8 * GB},
            "the container may use 8 GB of the machine's 64 GB",
            "raise its limit",
        ),
        (
            {"container_bytes": 8 * GB, "host_total_bytes": None},
            "the container may use 8 GB",
            "raise its limit",
        ),
        (
            {"why_not_pinned": "CUDA error: out of memory"},
            "the driver gives no page-locked memory: CUDA error: out of memory",
            "raise the limit of locked memory",
        ),
        (
            {"link": Link(4, 16, 16.0, 16.0)},
            "cuda:0 is connected by 4 of its 16 lanes",
            "move it to a slot with more lanes",
        ),
        (
            {"link": Link(16, 16, 2.5, 16.0)},
            "cuda:0 is connected at 2.5 of its 16 GT/s",
            "see which generation the slot is set to",
        ),
        (
            {"disk_bytes_per_s": 180e6},
            "the checkpoint's disk reads 180 MB/s",
            "move the checkpoint to a local NVMe disk",
        ),
        ({"huge_pages": "never"}, "the kernel gives no huge pages", "echo madvise > /sys/kernel"),
    ],
)
def test_what_is_missing(changes: dict[str, object], problem: str, remedy: str) -> None:
    (found,) = advice(dataclasses.replace(FINE, **changes))
    assert found.problem == problem
    assert found.remedy.startswith(remedy)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cpu", "why_no_fp8": "no kernel", "link": None, "why_not_pinned": None},
        {"container_bytes": 100 * GB},
        {"cores": 16, "threads": 16},
        {"core_quota": 20.0},
        {"disk_bytes_per_s": 180e6, "is_disk_cached": True},  # nothing is known of the disk
        {"disk_bytes_per_s": None, "huge_pages": None, "driver": None, "host_total_bytes": None},
        {"device_total_bytes": None, "device_free_bytes": None},
    ],
)
def test_what_is_no_fault(changes: dict[str, object]) -> None:
    assert advice(dataclasses.replace(FINE, **changes)) == []


def test_text_of_what_is_missing() -> None:
    facts = dataclasses.replace(
        FINE,
        **{"core_quota": 2.0, "container_bytes": 8 * GB, "locked_limit_bytes": 65536, "why_not_pinned": "no"},
        **{"why_no_fp8": "no", "is_disk_cached": True, "huge_pages": None, "link": None},
    )
    lines = list(_doctor.as_text(facts, [Advice("it is slow", "make it fast")]))
    for line in (
        "container     8 GB",
        "cores         16, time for 2; torch computes with 8 threads",
        "page-locked   refused (limit 65.5 kB)",
        "huge pages    unknown",
        "eight bits    no matrix products",
        "disk          3.5 GB/s (the page cache, which stays)",
        "bus           25.2 GB/s",
    ):
        assert line in lines
    assert lines[-3:] == ["Missing for full speed:", "- it is slow.", "  Make it fast."]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe, "_WIDTH", 64)
    monkeypatch.setattr(_probe, "_ROUND_S", 0.001)
    monkeypatch.setattr(_probe, "_MEMORY_BYTES", 1 << 20)
    gathering = _facts.gather
    monkeypatch.setattr(_doctor, "gather", lambda *a, **k: gathering(*a, **k, seconds=0.01))


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.usefixtures("_quick")
def test_facts_of_a_tree(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal: 64000000 kB\nMemAvailable: 50000000 kB\n")
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: A Processor @ 3 GHz\n")
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    mount = "30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    write(tmp_path, "proc/self/mountinfo", mount)
    write(tmp_path, "sys/fs/cgroup/memory.max", "8000000000\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", "1000000000\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    facts = gather(CPU, seconds=0, root=tmp_path)
    assert facts.device_name == "A Processor @ 3 GHz"
    assert facts.host_total_bytes == 65_536_000_000
    assert facts.host_free_bytes == 7 * GB
    assert facts.container_bytes == 8 * GB
    assert facts.core_quota == 1.5
    assert facts.huge_pages == "never"
    assert facts.torch == torch.__version__
    assert (facts.device, facts.driver, facts.link) == ("cpu", None, None)
    assert (facts.device_total_bytes, facts.device_free_bytes, facts.why_not_pinned) == (None, None, None)
    assert facts.threads == torch.get_num_threads()
    assert 1 <= facts.cores <= (os.cpu_count() or 1)
    assert not facts.has_unused_gpu
    assert facts.disk_bytes_per_s is None


@pytest.mark.usefixtures("_quick")
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the device")
@pytest.mark.parametrize("path", ["proc/driver/nvidia/version", "usr/lib/wsl/lib/libcuda.so.1"])
def test_a_driver_that_torch_does_not_use(tmp_path: Path, path: str) -> None:
    write(tmp_path, "proc/meminfo", "MemAvailable: 50000000 kB\n")
    write(tmp_path, path, "")
    assert gather(CPU, seconds=0, root=tmp_path).has_unused_gpu


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (a@b)",
    ],
)
def test_version_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert _facts._driver(torch.device("cuda"), tmp_path) is None
    write(tmp_path, "proc/driver/nvidia/version", f"{line}\nGCC version:  gcc version 12.3.0\n")
    assert _facts._driver(torch.device("cuda"), tmp_path) == "550.54.15"


@pytest.mark.parametrize(
    ("changes", "link"),
    [
        ({}, Link(8, 16, 16.0, 32.0)),
        ({"current_link_speed": "Unknown\n"}, None),
        ({"max_link_width": "63\n"}, None),
        ({"max_link_width": "255\n"}, None),
        ({"current_link_width": "0\n"}, None),
    ],
)
def test_the_link_of_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], link: Link | None
) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x65, pci_device_id=0)
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(get_device_properties=lambda d: properties)
    )
    device = torch.device("cuda:0")
    assert _facts._link(device, tmp_path) is None
    files = {
        "current_link_width": "8\n",
        "max_link_width": "16\n",
        "current_link_speed": "16.0 GT/s PCIe\n",
        "max_link_speed": "32.0 GT/s PCIe\n",
    }
    for name, text in (files | changes).items():
        write(tmp_path, f"sys/bus/pci/devices/0000:65:00.0/{name}", text)
    assert _facts._link(device, tmp_path) == link


def test_pinning_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no page-locked memory\nand a long explanation")

    monkeypatch.setattr(torch, "empty", refuse)
    assert _facts._why_not_pinned() == "no page-locked memory"


@pytest.mark.cuda
def test_facts_of_a_real_device(accelerator: torch.device) -> None:
    facts = gather(accelerator, seconds=0.1)
    assert facts.device_name == torch.get_device_module(accelerator).get_device_name(0)
    assert facts.device_total_bytes is not None
    assert facts.device_free_bytes is not None
    assert 0 < facts.device_free_bytes < facts.device_total_bytes
    assert facts.why_not_pinned == ""


@pytest.mark.usefixtures("_quick")
class TestCommand:
    def test_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "checkpoint").write_bytes(b"x" * 10_000)
        assert main(["doctor", "--device", "cpu", "--file", str(tmp_path / "checkpoint"), "--json"]) == 0

        def refuse(constant: str) -> None:
            pytest.fail(f"{constant} is no JSON")

        found = json.loads(capsys.readouterr().out, parse_constant=refuse)
        assert set(found) == {field.name for field in dataclasses.fields(Facts)} | {"missing"}
        assert found["device"] == "cpu"
        assert found["flops"] > 0
        assert found["disk_bytes_per_s"] > 0
        assert all(set(entry) == {"problem", "remedy"} for entry in found["missing"])

    def test_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("device        cpu, ")
        assert "disk          not measured; name a file on it with --file" in out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_device_that_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--device", "cuda"]) == 1
        err = capsys.readouterr().err
        assert err == (
            f"offload-layers: torch {torch.__version__} sees no cuda device here; cpu is always there\n"
        )

    def test_a_file_that_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--device", "cpu", "--file", "nowhere"]) == 1
        assert capsys.readouterr().err == (
            "offload-layers: nowhere cannot be read: No such file or directory; name a checkpoint\n"
        )

    def test_an_interruption(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(_doctor, "gather", interrupt)
        assert main(["doctor"]) == 130
        assert capsys.readouterr().err == "offload-layers: interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["doctor", "--device", "teapot"], ["diagnose"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: offload-layers" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_program() -> None:
    command = [sys.executable, "-m", "offload_layers", "doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: offload-layers doctor ")
