"""The files that are read: made once, kept in a folder, the same bytes for every peer."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

MB = 1_000_000
#: nearest to each of these sizes in bf16; the small ones are norms and biases, the large ones of a wide DiT
SIZE_CLASSES_MB = (0.006, 0.064, 0.3, 1, 2, 5, 9, 18, 28, 56, 113)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """bfloat16 values that no file system compresses."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 0x7F00, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)


def block(number: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one block of a two-stream diffusion transformer, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stream in ("img", "txt"):
        for name in ("q", "k", "v", "out"):
            shapes[f"{stream}_attn.{name}"] = (width, width)
        shapes[f"{stream}_mod"] = (6 * width, width)
        shapes[f"{stream}_mlp.up"] = (4 * width, width)
        shapes[f"{stream}_mlp.down"] = (width, 4 * width)
        shapes[f"{stream}_norm"] = (width // 24,)
    named = {}
    for name, shape in shapes.items():
        named[f"blocks.{number}.{name}.weight"] = shape
        named[f"blocks.{number}.{name}.bias"] = shape[:1]
    return named


def dit(folder: Path, gigabytes: float, width: int = 3072, shards: int = 4) -> list[str]:
    """A sharded checkpoint of whole blocks, at least one in each shard; its files."""
    folder = folder / f"dit-{gigabytes:g}GB-{width}"
    block_nbytes = 2 * sum(torch.Size(shape).numel() for shape in block(0, width).values())
    blocks = max(shards, round(gigabytes * 1e9 / block_nbytes))
    paths = [folder / f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        weight_map = {}
        for i, path in enumerate(paths):
            tensors = {}
            for number in range(i, blocks, shards):
                for k, (name, shape) in enumerate(block(number, width).items()):
                    tensors[name] = noise(shape, 1000 * number + k)
                    weight_map[name] = path.name
            save_file(tensors, path, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [str(path) for path in paths]


def of_one_size(folder: Path, megabytes: float) -> str:
    """A file of equal tensors, a few hundred MB of them or 2,000."""
    path = folder / f"size-{megabytes:g}MB.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        count = max(4, min(2000, int(400 / megabytes)))
        numel = int(megabytes * MB) // 2
        save_file({f"t{i}": noise((numel // 64, 64), i) for i in range(count)}, path)
    return str(path)


def many_names(folder: Path, count: int = 50_000) -> str:
    """A file of very many small tensors, as mixtures of experts have."""
    path = folder / f"names-{count}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        names = (
            f"model.layers.{i // 800}.mlp.experts.{i % 800 // 4}.proj_{i % 4}.weight" for i in range(count)
        )
        save_file({name: noise((4, 8), i) for i, name in enumerate(names)}, path)
    return str(path)


def eight_bits(folder: Path) -> str:
    """Large tensors in float8."""
    path = folder / "float8.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        values = {f"t{i}": noise((4096, 8192), i).view(torch.uint8) % 120 for i in range(4)}
        save_file({name: value.view(torch.float8_e4m3fn) for name, value in values.items()}, path)
    return str(path)


def as_pickle(path: str) -> str:
    """The same tensors in torch's own format."""
    from safetensors.torch import load_file

    other = path.removesuffix(".safetensors") + ".pth"
    if not os.path.exists(other):
        torch.save(load_file(path), other)
    return other


def as_tensorizer(path: str) -> str:
    """The same tensors in the format of tensorizer."""
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    other = path.removesuffix(".safetensors") + ".tensors"
    if not os.path.exists(other):
        serializer = TensorSerializer(other)
        serializer.write_state_dict(load_file(path))
        serializer.close()
    return other


def names_in_file_order(paths: list[str]) -> Iterator[str]:
    """Names as their bytes lie in the files."""
    from safemap import DiskMap

    with DiskMap(paths) as disk_map:
        order = {path: i for i, path in enumerate(disk_map.files)}
        yield from sorted(disk_map, key=lambda name: (order[(i := disk_map.info(name)).file], i.offset or 0))
