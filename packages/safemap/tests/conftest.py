"""Files for the tests of this package."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safemap._dtypes import BITS
from safemap._write import write_safetensors
from safemap.testing import safetensors_bytes, sample_tensors
from safetensors import SafetensorError, deserialize
from torch import Tensor

Write = Callable[..., str]


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(str(path), described, tensors.__getitem__, metadata or {})
    return str(path)


@pytest.fixture(scope="session")
def save() -> Write:
    """Write tensors to a safetensors file and return its path."""
    return _save


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return sample_tensors()


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, Tensor]) -> str:
    """A safetensors file that holds ``tensors``."""
    return _save(tmp_path / "model.safetensors", tensors, {"format": "pt", "made-by": "tests"})


def _is_known(code: str) -> bool:
    try:
        deserialize(safetensors_bytes({"a": {"dtype": code, "shape": [0], "data_offsets": [0, 0]}}))
    except SafetensorError:
        return False
    return True


@pytest.fixture(scope="session")
def library_knows() -> Callable[[bytes], bool]:
    """Whether the safetensors library knows the dtypes that a file names: older releases lack some."""
    unknown = [f'"{code}"'.encode() for code in BITS if not _is_known(code)]
    return lambda content: not any(code in content for code in unknown)


@pytest.fixture(scope="session")
def save_legacy() -> Write:
    """Write an object in torch's format from before 1.6."""

    def write(path: Path, content: object) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, path, _use_new_zipfile_serialization=False)
        return str(path)

    return write
