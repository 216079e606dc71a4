"""One adapter for each library: how it gives a tensor that owns its memory, on the CPU."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Get = Callable[[str], Tensor]


@contextmanager
def safemap(paths: list[str], **options: Any) -> Iterator[Get]:
    from safemap import DiskMap

    with DiskMap(paths, threads=torch.get_num_threads(), **options) as disk_map:
        yield disk_map.__getitem__


@contextmanager
def safemap_all_threads(paths: list[str]) -> Iterator[Get]:
    from safemap import DiskMap

    with DiskMap(paths) as disk_map:
        yield disk_map.__getitem__


@contextmanager
def safemap_mapped(paths: list[str]) -> Iterator[Get]:
    with safemap(paths, mmap=True) as get:
        yield lambda name: touched(get(name))


def touched(view: Tensor) -> Tensor:
    """Read one byte of each page: a view costs nothing until its pages are used."""
    if view.numel():
        view.reshape(-1).view(torch.uint8)[::4096].sum()
    return view


@contextmanager
def safe_open(paths: list[str], **options: Any) -> Iterator[Get]:
    from safetensors import safe_open

    files = [safe_open(path, framework="pt", **options) for path in paths]
    owner = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no __iter__)
    is_view = "backend" not in options
    yield lambda name: owner[name].get_tensor(name).clone() if is_view else owner[name].get_tensor(name)


@contextmanager
def safe_open_views(paths: list[str]) -> Iterator[Get]:
    from safetensors import safe_open

    files = [safe_open(path, framework="pt") for path in paths]
    owner = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    yield lambda name: owner[name].get_tensor(name)


@contextmanager
def diffsynth(paths: list[str], **options: Any) -> Iterator[Get]:
    disk_map = _diffsynth_module().DiskMap(paths, device="cpu", **options)
    yield disk_map.__getitem__


def _diffsynth_module() -> Any:
    """Load the file alone: the distribution's ``__init__`` imports everything it has."""
    distribution = importlib.metadata.distribution("diffsynth")
    path = distribution.locate_file("diffsynth/core/vram/disk_map.py")
    spec = importlib.util.spec_from_file_location("diffsynth_disk_map", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def accelerate(paths: list[str]) -> Iterator[Get]:
    from accelerate.utils import OffloadedWeightsLoader
    from safetensors import safe_open

    index = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            index.update({name: {"safetensors_file": path, "weight_name": name} for name in file.keys()})  # noqa: SIM118
    loader = OffloadedWeightsLoader(index=index)
    yield lambda name: loader[name].clone()


@contextmanager
def torch_mmap(paths: list[str]) -> Iterator[Get]:
    from checkpoints import as_pickle

    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors.update(torch.load(as_pickle(path), mmap=True, weights_only=True))
    yield lambda name: tensors[name].clone()


@contextmanager
def tensorizer(paths: list[str]) -> Iterator[Get]:
    from checkpoints import as_tensorizer
    from tensorizer import TensorDeserializer

    owner = {}
    for path in paths:
        deserializer = TensorDeserializer(as_tensorizer(path), device="cpu", lazy_load=True)
        owner.update(dict.fromkeys(deserializer.keys(), deserializer))
    yield lambda name: owner[name][name].clone()


#: peers that give single tensors
LAZY: dict[str, Callable[..., Any]] = {
    "safemap": safemap,
    "safemap mmap=True": safemap_mapped,
    "DiffSynth DiskMap": diffsynth,
    "safe_open + clone": safe_open,
    "safe_open pread": lambda paths: safe_open(paths, backend="pread"),
    "accelerate": accelerate,
    "torch.load mmap": torch_mmap,
    "tensorizer lazy": tensorizer,
}


def load_file(paths: list[str]) -> None:
    from safetensors.torch import load_file

    for path in paths:
        for tensor in load_file(path).values():
            tensor.clone()


def fastsafetensors(paths: list[str]) -> None:
    from fastsafetensors import fastsafe_open

    for path in paths:
        with fastsafe_open(path, nogds=True, device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name).clone()


def runai(paths: list[str]) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths)
        for _, tensor in streamer.get_tensors():
            tensor.clone()


#: peers that read whole files
WHOLE: dict[str, Callable[..., None]] = {
    "load_file": load_file,
    "fastsafetensors": fastsafetensors,
    "runai-model-streamer": runai,
}

DISTRIBUTIONS = (
    *("torch", "safemap", "safetensors", "diffsynth", "accelerate", "tensorizer", "fastsafetensors"),
    "runai-model-streamer",
)


def versions() -> dict[str, str]:
    """Versions of what is installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source" if name == "safemap" else ""
    return found
