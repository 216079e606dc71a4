"""For tests of maps: the laws that every mapping of tensors obeys, and builders of files, good and broken.

Needs pytest, which this package does not ask for.
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safemap._buffers import bytes_of

__all__ = ["MappingTests", "assert_same", "safetensors_bytes", "sample_tensors"]


def sample_tensors() -> dict[str, Tensor]:
    """Return tensors of several dtypes, shapes and sizes: a scalar, an empty one, small and large ones."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "blocks.0.weight": noise(64, 32),
        "blocks.0.bias": noise(64).to(torch.bfloat16),
        "blocks.1.large": noise(700, 600).to(torch.float16),
        "embedding": noise(1200, 1000).to(torch.bfloat16),
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "ids": torch.arange(24).view(2, 3, 4),
        "mask": torch.tensor([True, False, True]),
        "eight.bits": noise(33, 5).to(torch.float8_e4m3fn),
        "spectrum": torch.complex(noise(5), noise(5)),
        "名前": torch.arange(5, dtype=torch.uint8),
    }


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Fail unless both tensors agree in dtype, shape and every bit."""
    assert found.dtype == expected.dtype, f"dtype {found.dtype}, expected {expected.dtype}"
    assert found.shape == expected.shape, f"shape {list(found.shape)}, expected {list(expected.shape)}"
    assert _bits(found) == _bits(expected), "the values differ"


def _bits(tensor: Tensor) -> bytes:
    held = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return bytes(bytes_of(held)) if held.numel() else b""


def safetensors_bytes(header: Mapping[str, Any] | bytes | str, data: bytes = b"") -> bytes:
    """Return the bytes of a safetensors file with exactly this header and data, whether they fit or not."""
    if isinstance(header, str):
        header = header.encode()
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


class MappingTests:
    """The laws of a read-only mapping from names to tensors; derive a class from it and give it ``make``.

    >>> class TestMine(MappingTests):  # doctest: +SKIP
    ...     def make(self, tensors, folder):
    ...         return MyMap(written(tensors, folder))
    """

    def make(self, tensors: dict[str, Tensor], folder: Path) -> Mapping[str, Tensor]:
        """Return the mapping under test, holding exactly *tensors*; *folder* is for its files."""
        raise NotImplementedError

    def sample(self) -> dict[str, Tensor]:
        """Return what to test with."""
        return sample_tensors()

    def expected(self, tensor: Tensor) -> Tensor:
        """Return what the mapping must give for a stored tensor."""
        return tensor

    def test_values(self, tmp_path: Path) -> None:
        """Every name gives its tensor."""
        tensors = self.sample()
        mapping = self.make(tensors, tmp_path)
        for name, tensor in tensors.items():
            assert_same(mapping[name], self.expected(tensor))

    def test_names(self, tmp_path: Path) -> None:
        """Iteration, length, membership and keys agree."""
        tensors = self.sample()
        mapping = self.make(tensors, tmp_path)
        assert len(mapping) == len(tensors)
        assert sorted(mapping) == sorted(tensors)
        assert sorted(mapping.keys()) == sorted(tensors)
        assert list(mapping) == list(mapping)
        assert all(name in mapping for name in mapping)

    def test_items_and_values(self, tmp_path: Path) -> None:
        """``items`` and ``values`` follow the order of iteration."""
        mapping = self.make(self.sample(), tmp_path)
        assert [name for name, _ in mapping.items()] == list(mapping)
        for (name, item), value in zip(mapping.items(), mapping.values(), strict=True):
            assert_same(item, mapping[name])
            assert_same(value, item)

    def test_absent(self, tmp_path: Path) -> None:
        """An unknown name, or what is no name at all, is absent in every way."""
        mapping = self.make(self.sample(), tmp_path)
        sentinel = torch.zeros(1)
        keys: list[Any] = ["nothing", 3, None, ("a", "b")]
        for key in keys:
            assert key not in mapping
            assert mapping.get(key, sentinel) is sentinel
            with pytest.raises(KeyError, match=re.escape(str(key))):
                mapping[key]

    def test_empty(self, tmp_path: Path) -> None:
        """A mapping without tensors is empty and false."""
        mapping = self.make({}, tmp_path)
        assert len(mapping) == 0
        assert not mapping
        assert list(mapping) == []

    def test_values_are_independent(self, tmp_path: Path) -> None:
        """Changing a tensor changes no other one and not the source."""
        tensors = self.sample()
        mapping = self.make(tensors, tmp_path)
        first = mapping["blocks.0.weight"]
        before = first.clone()
        first.zero_()
        assert_same(mapping["blocks.0.weight"], before)
