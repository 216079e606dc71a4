"""How much memory there is, as told by trees of files that stand for ``/proc`` and ``/sys``."""

import os
import sys
from pathlib import Path

import pytest
import torch
from offload_layers import ConfigError
from offload_layers._cgroup import cpu_quota, memory_left, memory_limit
from offload_layers._machine import (
    AUTO_SHARE,
    available_ram,
    foreign_nbytes,
    free_vram,
    total_ram,
    total_vram,
    vram_limit,
)

GB = 10**9
V2 = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
DISK = "25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard"
NONE_V1 = 9223372036854771712


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(
        tmp_path,
        "proc/meminfo",
        "MemTotal: 64000000 kB\nMemAvailable:   50000000 kB\nHugePages_Total:       0",
    )
    return tmp_path


def write(root: Path, path: str, text: object) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n")


def group_v2(root: Path, path: str, current: int, files: int = 0, **limits: object) -> None:
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    write(root, f"{folder}/memory.current", current)
    write(root, f"{folder}/memory.stat", f"anon 5\nfile 7\ninactive_file {files}\nactive_file 0")
    for name, limit in limits.items():
        write(root, f"{folder}/memory.{name}", limit)


def group_v1(root: Path, path: str, usage: int, limit: int, files: int = 0) -> None:
    folder = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    write(root, f"{folder}/memory.usage_in_bytes", usage)
    write(root, f"{folder}/memory.limit_in_bytes", limit)
    write(root, f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {files}\ntotal_active_file 0")


def member(root: Path, *lines: str, mounts: tuple[str, ...]) -> None:
    write(root, "proc/self/cgroup", "\n".join(lines))
    write(root, "proc/self/mountinfo", "\n".join([DISK, *mounts]))


def test_without_groups_the_machine_counts(root: Path) -> None:
    assert available_ram(root) == 51_200_000_000
    assert total_ram(root) == 65_536_000_000
    assert memory_limit(root) is None
    assert memory_left(root) is None
    assert cpu_quota(root) is None


class TestVersion2:
    @pytest.fixture(autouse=True)
    def _member(self, root: Path) -> None:
        member(root, "0::/slice/scope", mounts=(V2,))

    def test_the_limit_less_what_is_used(self, root: Path) -> None:
        group_v2(root, "slice/scope", 3 * GB, max=8 * GB, high="max")
        assert memory_limit(root) == 8 * GB
        assert available_ram(root) == 5 * GB

    def test_page_cache_counts_as_free_on_both_lists(self, root: Path) -> None:
        group_v2(root, "slice/scope", 7 * GB, files=2 * GB, max=8 * GB)
        assert available_ram(root) == 3 * GB
        stat = f"inactive_file {2 * GB}\nactive_file {GB}"
        write(root, "sys/fs/cgroup/slice/scope/memory.stat", stat)
        assert available_ram(root) == 4 * GB

    def test_high_is_a_limit(self, root: Path) -> None:
        group_v2(root, "slice/scope", 1 * GB, max="max", high=4 * GB)
        assert memory_limit(root) == 4 * GB
        assert available_ram(root) == 3 * GB

    def test_the_parents_limits_hold(self, root: Path) -> None:
        group_v2(root, "slice/scope", 1 * GB, max=8 * GB)
        group_v2(root, "slice", 9 * GB, max=10 * GB)
        assert memory_limit(root) == 8 * GB
        assert available_ram(root) == 1 * GB

    def test_the_parent_may_be_the_only_one_with_a_limit(self, root: Path) -> None:
        group_v2(root, "slice/scope", 1 * GB, max="max")
        group_v2(root, "", 3 * GB, max=4 * GB)  # the root of a container
        assert available_ram(root) == 1 * GB

    def test_no_limit(self, root: Path) -> None:
        group_v2(root, "slice/scope", 3 * GB, max="max", high="max")
        assert memory_limit(root) is None
        assert available_ram(root) == 51_200_000_000

    def test_a_limit_beyond_the_machine(self, root: Path) -> None:
        group_v2(root, "slice/scope", 3 * GB, max=500 * GB)
        assert available_ram(root) == 51_200_000_000

    def test_beyond_the_limit_nothing_is_left(self, root: Path) -> None:
        group_v2(root, "slice/scope", 9 * GB, high=8 * GB)
        assert available_ram(root) == 0

    def test_never_more_than_the_limit(self, root: Path) -> None:
        group_v2(root, "slice/scope", 1 * GB, files=2 * GB, max=8 * GB)  # statistics lag behind
        assert available_ram(root) == 8 * GB

    def test_a_group_that_was_removed_leaves_its_parents(self, root: Path) -> None:
        group_v2(root, "slice", 3 * GB, max=4 * GB)
        assert available_ram(root) == 1 * GB

    def test_a_quota_of_cores(self, root: Path) -> None:
        write(root, "sys/fs/cgroup/slice/scope/cpu.max", "max 100000")
        assert cpu_quota(root) is None
        write(root, "sys/fs/cgroup/slice/cpu.max", "150000 100000")
        assert cpu_quota(root) == 1.5


@pytest.mark.parametrize("group", ["/../../elsewhere", "/docker/0123", "/"])
def test_the_mounted_root_counts_where_the_group_is_not_visible(root: Path, group: str) -> None:
    member(root, f"0::{group}", mounts=(V2,))
    group_v2(root, "", 1 * GB, max=4 * GB)
    group_v2(root, "../../elsewhere", 1 * GB, max=2 * GB)  # of no concern, if it happens to be there
    assert available_ram(root) == 3 * GB


class TestVersion1:
    def test_the_limit_less_what_is_used(self, root: Path) -> None:
        member(root, "5:cpu,cpuacct:/", "4:memory:/job/7", "0::/", mounts=(V2, V1.format(shown="/")))
        group_v1(root, "job/7", 3 * GB, 6 * GB, files=1 * GB)
        group_v1(root, "job", 3 * GB, NONE_V1)
        group_v1(root, "", 3 * GB, NONE_V1)
        assert memory_limit(root) == 6 * GB
        assert available_ram(root) == 4 * GB

    def test_the_parents_limits_hold(self, root: Path) -> None:
        member(root, "4:memory:/job/7", mounts=(V1.format(shown="/"),))
        group_v1(root, "job/7", 3 * GB, NONE_V1)
        group_v1(root, "job", 3 * GB, 5 * GB)
        assert available_ram(root) == 2 * GB

    def test_a_container_that_sees_its_own_group_only(self, root: Path) -> None:
        member(root, "4:memory:/docker/abc/inner", mounts=(V1.format(shown="/docker/abc"),))
        group_v1(root, "", 3 * GB, 4 * GB)
        group_v1(root, "inner", 3 * GB, NONE_V1)
        assert available_ram(root) == 1 * GB

    def test_a_group_outside_of_what_is_mounted(self, root: Path) -> None:
        member(root, "4:memory:/other", mounts=(V1.format(shown="/docker/abc"),))
        group_v1(root, "", 3 * GB, 4 * GB)
        assert available_ram(root) == 1 * GB

    def test_no_limit(self, root: Path) -> None:
        member(root, "4:memory:/", mounts=(V1.format(shown="/"),))
        group_v1(root, "", 3 * GB, NONE_V1)
        assert memory_limit(root) is None
        assert available_ram(root) == 51_200_000_000

    def test_a_quota_of_cores(self, root: Path) -> None:
        mount = "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
        member(root, "3:cpu,cpuacct:/job", "2:cpuset:/", mounts=(mount,))
        folder = "sys/fs/cgroup/cpu,cpuacct/job"
        write(root, f"{folder}/cpu.cfs_quota_us", -1)
        write(root, f"{folder}/cpu.cfs_period_us", 100_000)
        assert cpu_quota(root) is None
        write(root, f"{folder}/cpu.cfs_quota_us", 200_000)
        assert cpu_quota(root) == 2


def test_a_folder_with_a_space(root: Path) -> None:
    member(root, "0::/a b", mounts=(V2.replace("/sys/fs/cgroup", r"/sys/fs/c\040group"),))
    write(root, "sys/fs/c group/a b/memory.max", 4 * GB)
    assert memory_limit(root) == 4 * GB


def test_a_group_whose_name_is_escaped(root: Path) -> None:
    """As those of systemd are: it writes a dash in the name of a device as a backslash and ``x2d``."""
    member(root, r"0::/a\x2db/inner", mounts=(V2.replace("0:27 /", r"0:27 /a\134x2db"),))
    group_v2(root, "", GB, max=8 * GB)
    group_v2(root, "inner", GB, max=4 * GB)
    assert memory_limit(root) == 4 * GB


def test_folders_with_names_in_another_encoding(root: Path) -> None:
    member(root, "0::/", mounts=(V2,))
    group_v2(root, "", GB, max=4 * GB)
    with (root / "proc/self/mountinfo").open("ab") as file:
        file.write(b"40 23 8:1 / /media/caf\xe9 rw - vfat /dev/sdb1 rw\n")
    assert memory_limit(root) == 4 * GB


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux is asked")
def test_this_machine() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total_ram() == total
    assert 0 < available_ram() < total


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="no sysconf here")
def test_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_AVPHYS_PAGES": 1000, "SC_PHYS_PAGES": 2000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf_names", pages)
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert available_ram(tmp_path) == 4_096_000
    assert total_ram(tmp_path) == 8_192_000


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf_names", {"SC_PAGE_SIZE": 30}, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError) as refused:
        available_ram(tmp_path)
    told = 'cannot find out how much host memory is free on darwin; pass it, as in ram="16GB"'
    assert str(refused.value) == told
    assert total_ram(tmp_path) is None


@pytest.mark.parametrize("ask", [total_vram, free_vram])
def test_the_host_has_no_device_memory(ask) -> None:
    with pytest.raises(ConfigError) as refused:
        ask(torch.device("cpu"))
    told = 'cpu has no memory of its own that its driver tells of; pass its size, as in vram="8GB"'
    assert str(refused.value) == told


@pytest.mark.parametrize("ask", [total_vram, free_vram])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(ask) -> None:
    with pytest.raises(ConfigError, match=r"torch .* sees no cuda device here"):
        ask(torch.device("cuda"))


class FakeModule:
    """``torch.cuda`` of a machine with a device."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 2

    @staticmethod
    def mem_get_info(device: torch.device) -> tuple[int, int]:
        assert device == torch.device("cuda:1")
        return 5 * GB, 8 * GB

    @staticmethod
    def memory_reserved(device: torch.device) -> int:
        return 2 * GB

    @staticmethod
    def memory_allocated(device: torch.device) -> int:
        return 1 * GB


def test_a_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeModule)
    assert total_vram(torch.device("cuda:1")) == 8 * GB
    assert free_vram(torch.device("cuda:1")) == 6 * GB  # torch keeps 1 GB for reuse
    with pytest.raises(ConfigError, match=r"^there is no cuda:2: torch sees 2 cuda devices$"):
        total_vram(torch.device("cuda:2"))


def test_the_weights_that_a_model_has_on_the_device_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeModule)
    device = torch.device("cuda:1")
    assert vram_limit("auto", device, 0, held=0) == 2 * GB + int(AUTO_SHARE * 6 * GB)
    assert vram_limit("auto", device, 0, held=GB) == 1 * GB + int(AUTO_SHARE * 7 * GB)
    assert vram_limit("3GB", device, 0, held=GB) == 3 * GB


def test_what_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:1")
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeModule)
    assert foreign_nbytes(device, held=GB) == 1 * GB
    assert foreign_nbytes(torch.device("cpu"), held=0) == 0

    def fail(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("The device doesn't support querying the available free memory.")

    monkeypatch.setattr(FakeModule, "mem_get_info", fail)
    assert foreign_nbytes(device, held=GB) == 0
    assert vram_limit("3GB", device, 0, held=GB) == 3 * GB
    with pytest.raises(ConfigError, match=r'pass its size, as in vram="8GB"$'):
        vram_limit("auto", device, 0, held=GB)


@pytest.mark.cuda
def test_a_real_device(accelerator: torch.device) -> None:
    assert 0 < free_vram(accelerator) < total_vram(accelerator)
