"""Shared by every package's tests: the ``device`` fixture, the ``cuda`` marker, README blocks as tests."""

import importlib.util
import os
import tempfile
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda", "all"], default="all", help="run the tests of this device only"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    if os.environ.get("REQUIRE_CUDA") == "1" and not torch.cuda.is_available():
        raise pytest.UsageError("REQUIRE_CUDA=1, but torch sees no CUDA device")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        cuda = pytest.param("cuda", marks=pytest.mark.cuda)
        metafunc.parametrize("device", ["cpu", cuda], ids=["cpu", "cuda"], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--device")
    kept, dropped = [], []
    for item in items:
        needs_cuda = item.get_closest_marker("cuda") is not None
        other_device = (wanted == "cpu" and needs_cuda) or (wanted == "cuda" and not needs_cuda)
        (dropped if other_device else kept).append(item)
        if needs_cuda and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the test runs on, ``cpu`` or ``cuda``."""
    return torch.device(request.param)


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
