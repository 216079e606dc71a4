"""One measured run in a process of its own: ``python worker.py JOB`` with a job as JSON.

Marks go to standard output, one JSON object a line: a name and a sample of this process's memory. What
libraries print goes to standard error.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from inputs import make_inputs
from job import DemoError, Job, resolve
from memory import resident
from offload_layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    enable_vram_management,
)
from safemap import DiskMap
from safetensors.torch import load_file
from skipinit import skip_model_initialization
from torch import nn

#: names to tensors, read or yet to be read
Source = Mapping[str, torch.Tensor]


class FileTraffic(NamedTuple):
    """Bytes that came from files by reading them, and bytes of files that are mapped and present."""

    read: int
    mapped: int


def construct(job: Job, cls: type[nn.Module]) -> nn.Module:
    return cls(**job.config)


def load_whole(job: Job, model: nn.Module) -> Source:
    """What one writes without this project: read the checkpoint, copy it into the model."""
    state_dict: dict[str, torch.Tensor] = {}
    for file in job.files:
        state_dict.update(read_whole(file))
    model.load_state_dict(state_dict)
    return state_dict


def construct_without_initialization(job: Job, cls: type[nn.Module]) -> nn.Module:
    with skip_model_initialization():
        return cls(**job.config)


def leave_on_disk(job: Job, model: nn.Module) -> Source:
    """Weights stay in the checkpoint until their layer runs, and are dropped after it."""
    computation = {"computation_device": "cpu", "computation_dtype": getattr(torch, job.dtype)}
    resting = ("offload", "onload", "preparing")
    on_disk = {f"{state}_{what}": "disk" for state in resting for what in ("device", "dtype")}
    disk_map: Source = DiskMap(job.files, device="cpu")
    enable_vram_management(
        model, module_map(model), vram_config=on_disk | computation, vram_limit=0, disk_map=disk_map
    )
    return disk_map


STEPS = {
    "plain": (construct, load_whole),
    "offloaded": (construct_without_initialization, leave_on_disk),
}


def read_whole(file: str) -> Any:
    if file.endswith(".safetensors"):
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def module_map(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """Which class of layer is managed by which face, so that every parameter below the root is covered."""
    faces: dict[type[nn.Module], type[nn.Module]] = {}
    for module in model.modules():
        if module is model or not any(True for _ in module.parameters(recurse=False)):
            continue
        has_layers_inside = any(True for inner in module.children() for _ in inner.parameters())
        faces[type(module)] = AutoWrappedNonRecurseModule if has_layers_inside else AutoWrappedModule
    if nn.Linear in faces:
        faces[nn.Linear] = AutoWrappedLinear
    # the first match wins, so that a class must stand before the classes it inherits from
    return dict(sorted(faces.items(), key=lambda item: -len(item[0].__mro__)))


def file_traffic() -> FileTraffic | None:
    """What this process has taken from files up to now; None where the system does not count it."""
    try:
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    now = resident(os.getpid())
    return None if now is None or now.mapped is None else FileTraffic(int(counters["rchar"]), now.mapped)


def tensors_of(output: Any) -> list[torch.Tensor]:
    """All tensors in the output of a model, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_of(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in tensors_of(value)]
    return []


@torch.no_grad()
def run(job: Job, mark: Callable[..., None]) -> None:
    torch.set_num_threads(job.threads)
    dtype = getattr(torch, job.dtype)
    cls = resolve(job.model)
    torch.manual_seed(job.seed)
    torch.set_default_dtype(dtype)  # so that plain construction does not pay for float32 either
    build, load = STEPS[job.mode]
    before = file_traffic()

    mark("construct")
    model = build(job, cls).eval()
    mark("load")
    source = load(job, model)
    loaded = file_traffic()  # while the source is open: what it has mapped counts
    del source
    inputs = make_inputs(job.inputs, model, dtype, job.seed)
    mark("forward")
    output = model(**inputs)
    mark("done")
    done = file_traffic()

    traffic = {}
    if before and loaded and done:
        traffic = {
            "bytes_read": done.read - before.read,
            "bytes_mapped": max(loaded.mapped, done.mapped) - before.mapped,
        }
    tensors = tensors_of(output)
    if not tensors:
        raise DemoError(f"the forward of {job.model} returned no tensor but {type(output).__name__}")
    torch.save(tensors, job.output)
    mark("saved", **traffic)


def main() -> int:
    events: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path.insert(0, os.getcwd())  # for a model class or a function for inputs beside the user

    def mark(name: str, **more: Any) -> None:
        sample = resident(os.getpid())
        assert sample is not None  # this process is alive
        print(json.dumps({"mark": name, "sample": dataclasses.asdict(sample), **more}), file=events)

    try:
        run(Job.loads(sys.argv[1]), mark)
    except DemoError as error:
        mark("failed", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
