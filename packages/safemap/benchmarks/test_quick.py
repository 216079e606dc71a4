"""Is reading still as fast as it was?  For pytest-benchmark; compare.py compares with other libraries."""

import pytest
import torch
from safemap import DiskMap
from safetensors.torch import save_file

SHAPES = {"6 KB": (3072,), "1 MB": (512, 1024), "18 MB": (3072, 3072), "75 MB": (12288, 3072)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("quick") / "model.safetensors"
    save_file({name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}, path)
    return str(path)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(group="one tensor")
def test_get(benchmark, path: str, name: str) -> None:
    with DiskMap(path) as disk_map:
        benchmark(disk_map.__getitem__, name)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(group="into touched memory")
def test_read_into(benchmark, path: str, name: str) -> None:
    out = torch.zeros(SHAPES[name], dtype=torch.bfloat16)
    with DiskMap(path) as disk_map:
        benchmark(disk_map.read_into, name, out)


@pytest.mark.benchmark(group="converted to float32")
def test_convert(benchmark, path: str) -> None:
    with DiskMap(path, torch_dtype=torch.float32) as disk_map:
        benchmark(disk_map.__getitem__, "75 MB")


@pytest.mark.benchmark(group="open")
def test_open(benchmark, path: str) -> None:
    benchmark(lambda: DiskMap(path).close())
