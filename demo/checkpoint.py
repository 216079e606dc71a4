"""The demo's checkpoint: a real architecture at full width and reduced depth, made once and kept."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from job import DemoError, resolve
from safetensors.torch import save_file
from tqdm import tqdm

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """All that determines the bytes of a generated checkpoint."""

    model: str = "diffusers:QwenImageTransformer2DModel"
    #: everything else is the class's default, that is the width of the published 60-layer model
    config: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"num_layers": 2})
    dtype: str = "bfloat16"
    seed: int = 0
    shard_nbytes: int = 400_000_000
    #: to be raised when the way in which values are made changes
    version: int = 1

    @property
    def digest(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def generated(recipe: Recipe, cache: Path) -> Path:
    """The folder with the recipe's checkpoint, made now unless *cache* has it whole."""
    folder = cache / f"{recipe.model.split(':')[1]}-{recipe.digest}"
    if is_whole(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=cache))
    try:
        _write(recipe, partial)
        try:
            partial.rename(folder)  # the name appears with all its files, or not at all
        except OSError:
            if not is_whole(folder):  # otherwise another demo was faster, and its files are the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether *folder* has an index and every shard in the size that was written."""
    try:
        index = json.loads((folder / INDEX).read_text())
        shards: dict[str, int] = index["metadata"]["shard_sizes"]
        return set(index["weight_map"].values()) == set(shards) and all(
            (folder / shard).stat().st_size == size for shard, size in shards.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(recipe: Recipe, folder: Path) -> None:
    with torch.device("meta"):  # only names and shapes are needed
        model = resolve(recipe.model)(**recipe.config)
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if free < 1.1 * total:
        raise DemoError(
            f"{folder.parent} has {free:,} bytes free; the checkpoint needs {total:,}. Pass --cache."
        )
    shards = list(_split(shapes, dtype.itemsize, recipe.shard_nbytes))
    generator = torch.Generator().manual_seed(recipe.seed)
    weight_map: dict[str, str] = {}
    about = "generating the checkpoint"
    with tqdm(total=total, unit="B", unit_scale=True, desc=about, leave=False, disable=None) as progress:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = _values(name, shapes[name], dtype, generator)
                progress.update(tensors[name].nbytes)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
    sizes = {file: os.path.getsize(folder / file) for file in sorted(set(weight_map.values()))}
    index = {"metadata": {"total_size": total, "shard_sizes": sizes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _split(shapes: Mapping[str, torch.Size], itemsize: int, limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    used = 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * itemsize
        if names and used + nbytes > limit:
            yield names
            names, used = [], 0
        names.append(name)
        used += nbytes
    yield names


def _values(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Values at which activations neither vanish nor overflow: scales near 1, matrices by fan-in."""
    if len(shape) > 1:
        spread = shape[1:].numel() ** -0.5
        return torch.empty(shape).normal_(0.0, spread, generator=generator).to(dtype)
    centre = 1.0 if name.endswith("weight") else 0.0
    return torch.empty(shape).normal_(centre, 0.02, generator=generator).to(dtype)


def weight_files(paths: Sequence[str]) -> list[str]:
    """The files with weights that *paths* (files, an index, a folder) stand for.

    Raises:
        DemoError: A file is missing, or a folder holds no weights.
    """
    files = [file for path in paths for file in _expand(Path(path).expanduser().resolve())]
    for file in files:
        if not file.is_file():
            raise DemoError(f"no such file with weights: {file}")
    return [str(file) for file in files]


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        indexes = sorted(path.glob("*.index.json"))
        if len(indexes) == 1:
            return _expand(indexes[0])
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise DemoError(f"{path} holds no *.safetensors file; name the files themselves")
        return found
    if path.name.endswith(".index.json") and path.is_file():
        try:
            shards = set(json.loads(path.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DemoError(
                f"{path} is no index of a checkpoint (a 'weight_map' is needed): {error!r}"
            ) from error
        return [path.parent / shard for shard in sorted(shards)]
    return [path]
