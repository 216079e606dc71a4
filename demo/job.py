"""What one measured run does, as plain data that crosses the process border as JSON."""

import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any

#: ``plain``: construct, read everything, run. ``offloaded``: parameters stay on disk until a layer runs.
MODES = ("plain", "offloaded")


class DemoError(Exception):
    """Something that the user can put right; shown as one message, without a traceback."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One forward of one model in one process.

    Attributes:
        mode: One of ``MODES``.
        model: The model class, as ``module:Class``.
        config: Keyword arguments of the class.
        files: Files with weights, none of them an index.
        inputs: ``module:function``, a JSON object of ``{name: {"shape": ..., "dtype": ...}}``, or None for
            the built-in inputs of the model class.
        dtype: Name of the dtype in which the model is built and computes.
        seed: Seed of the inputs.
        threads: Number of threads of torch.
        output: Where the output is written.
    """

    mode: str
    model: str
    config: dict[str, Any]
    files: list[str]
    inputs: str | dict[str, Any] | None
    dtype: str
    seed: int
    threads: int
    output: str

    def dumps(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Job":
        return cls(**json.loads(text))


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve(reference: str) -> Any:
    """The object that ``module:name`` refers to; modules in the current folder are found."""
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise DemoError(f"{reference!r} is no reference to a Python object: expected 'module:name'")
    try:
        found = importlib.import_module(module_name)
    except ImportError as error:
        raise DemoError(f"cannot import {module_name!r} of {reference!r}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise DemoError(f"{reference!r}: {found!r} has no attribute {part!r}")
        found = getattr(found, part)
    return found


def read_json(text_or_path: str, what: str) -> dict[str, Any]:
    """The JSON object in *text_or_path*, which is the object itself or the name of a file that holds it."""
    text = text_or_path
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text_or_path).read_text()
        except OSError as error:
            raise DemoError(
                f"{what}: {text_or_path!r} is no JSON object and no readable file: {error}"
            ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DemoError(f"{what}: {text_or_path!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DemoError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value
