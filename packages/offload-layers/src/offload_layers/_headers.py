"""Names, dtypes and shapes of the tensors in safetensors files, for planning without reading them."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from offload_layers._errors import ConfigError

#: bits of one element. Source: the format codes of safetensors 0.8
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64} | {
    code: bits
    for bits, codes in {
        8: "U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "I64 U64 F64",
    }.items()
    for code in codes.split()
}
_MOST_HEADER_NBYTES = 100_000_000  # Source: the format allows no longer ones


@dataclass(frozen=True)
class StoredTensor:
    """What a header tells of one tensor."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_floating_point(self) -> bool:
        """Whether a dtype of computation would apply."""
        return self.code.startswith(("F", "BF"))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * _BITS[self.code] // 8


def read_headers(files: Iterable[str | os.PathLike[str]]) -> list[StoredTensor]:
    """Return the tensors of all *files* (files, or folders of them) in natural order of their names.

    Raises:
        ConfigError: there is no such file, it is no safetensors file, or a name is in two files.
    """
    found: dict[str, StoredTensor] = {}
    for path in find_files(files):
        for tensor in _read_header(path):
            if tensor.name in found:
                raise ConfigError(f'{path}: tensor "{tensor.name}" is in another of the files too')
            found[tensor.name] = tensor
    return [found[name] for name in sorted(found, key=_natural)]


def find_files(files: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return *files*, with the safetensors files that are in folders among them."""
    paths: list[Path] = []
    for given in files:
        path = Path(given)
        inside = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"{path}: no *.safetensors file in this folder")
        paths += inside
    return paths


def _read_header(path: Path) -> list[StoredTensor]:
    problem = "no safetensors file; a plan needs one, or the model itself: offload_layers.plan(model, ...)"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MOST_HEADER_NBYTES, path.stat().st_size - 8):
                raise ConfigError(f"{path}: {problem}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = [
            StoredTensor(name, str(entry["dtype"]), tuple(map(_size, entry["shape"])))
            for name, entry in header.items()
        ]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: {problem}") from error
    for tensor in tensors:
        if tensor.code not in _BITS:
            raise ConfigError(f'{path}: tensor "{tensor.name}" has the unknown dtype {tensor.code}')
    return tensors


def _size(size: object) -> int:
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"{size!r} is no size of a tensor")
    return size


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Order "blocks.2" before "blocks.10"."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
