"""A checkpoint as a lazy mapping from names to tensors: only what is asked for is read."""

from safemap._errors import (
    ClosedMapError,
    ConverterError,
    DuplicateTensorError,
    FileChangedError,
    FormatError,
    MismatchError,
    MissingFileError,
    MissingTensorError,
    SafemapError,
    UnsupportedTensorError,
)
from safemap._layout import TensorInfo
from safemap._load import load_state_dict
from safemap._map import DiskMap
from safemap._slice import TensorSlice

__all__ = [
    "ClosedMapError",
    "ConverterError",
    "DiskMap",
    "DuplicateTensorError",
    "FileChangedError",
    "FormatError",
    "MismatchError",
    "MissingFileError",
    "MissingTensorError",
    "SafemapError",
    "TensorInfo",
    "TensorSlice",
    "UnsupportedTensorError",
    "load_state_dict",
]
