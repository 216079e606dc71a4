"""Shared by every package's tests: the ``device`` fixture, the ``cuda`` marker, README blocks as tests."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", "simulated", "all"],
        default="all",
        help="run the tests of this device only; simulated: those for cuda, on a device that needs none",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device, or the simulated one")
    if config.getoption("--device") == "simulated":
        sys.path.append(str(Path(__file__).parent))
        import simulated_device

        simulated_device.install()
    if os.environ.get("REQUIRE_CUDA") == "1" and not torch.cuda.is_available():
        raise pytest.UsageError("REQUIRE_CUDA=1, but torch sees no CUDA device")


def _accelerator(config: pytest.Config) -> torch.device:
    return torch.device("simulated" if config.getoption("--device") == "simulated" else "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        accelerator = pytest.param(_accelerator(metafunc.config), marks=pytest.mark.cuda)
        metafunc.parametrize("device", [torch.device("cpu"), accelerator], ids=str, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--device")
    kept, dropped = [], []
    for item in items:
        needs_device = item.get_closest_marker("cuda") is not None
        other_device = wanted != "all" and needs_device == (wanted == "cpu")
        (dropped if other_device else kept).append(item)
        if needs_device and wanted != "simulated" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the test runs on: ``cpu``, or the accelerator."""
    return request.param


@pytest.fixture
def accelerator(pytestconfig: pytest.Config) -> torch.device:
    """The accelerator, for tests with the mark ``cuda``."""
    return _accelerator(pytestconfig)


@pytest.fixture(autouse=True)
def _no_races(pytestconfig: pytest.Config) -> Iterator[None]:
    """On the simulated device, whatever uses its memory must be in order."""
    yield
    if pytestconfig.getoption("--device") == "simulated":
        assert not torch.get_device_module("simulated").take_races()


def _enter_scratch_folder(namespace: dict[str, Any]) -> None:
    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_before"] = os.getcwd()
    os.chdir(namespace["_folder"].name)


def _leave_scratch_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


if importlib.util.find_spec("sybil"):  # absent on a GPU machine where nothing may be installed
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    #: the Python blocks of Markdown files are tests, each file in a scratch folder of its own
    pytest_collect_file = Sybil(
        [PythonCodeBlockParser(), SkipParser()],
        patterns=["*.md"],
        setup=_enter_scratch_folder,
        teardown=_leave_scratch_folder,
    ).pytest()
