"""The same forward twice, plainly and with the weights left on disk: its cost, and that results agree."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from checkpoint import Recipe, generated, weight_files
from job import MODES, DemoError, Job, read_json, usable_cores
from measure import Run, measure
from report import differences, draw, table
from tqdm import tqdm

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "demo"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    own = parser.add_argument_group(
        "your own weights (without them, a checkpoint is generated once and kept)"
    )
    own.add_argument("--checkpoint", nargs="+", metavar="FILE", help="files, an *.index.json, or a folder")
    own.add_argument("--model", metavar="MODULE:CLASS", help="e.g. diffusers:FluxTransformer2DModel")
    own.add_argument(
        "--config", metavar="JSON", help="arguments of the class: a JSON object or a file with one"
    )
    own.add_argument(
        "--inputs",
        metavar="JSON|MODULE:FUNCTION",
        help='arguments of forward: {"x": {"shape": [1, 8], "dtype": "float32"}}, a file with that, or a '
        "function of (model, generator) that returns a dict; built in for QwenImage and Flux of diffusers",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="dtype to build and compute in (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    parser.add_argument(
        "--picture", type=Path, help="where the picture goes (default: memory.png in the cache)"
    )
    options = parser.parse_args(argv)
    if (options.checkpoint is None) != (options.model is None):
        parser.error("--checkpoint and --model go together")
    if options.checkpoint is None and (options.config or options.inputs):
        parser.error("--config and --inputs belong to --checkpoint and --model")
    if not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        parser.error(f"--dtype: {options.dtype!r} is no dtype of torch")
    if options.threads < 1:
        parser.error(f"--threads: {options.threads} is less than 1")
    return options


def common_part(options: argparse.Namespace) -> dict[str, Any]:
    """What the jobs of both modes share."""
    if options.checkpoint is None:
        recipe = Recipe()
        folder = generated(recipe, options.cache)
        what = {"model": recipe.model, "config": dict(recipe.config), "files": weight_files([str(folder)])}
    else:
        config = read_json(options.config, "--config") if options.config else {}
        # a config.json of diffusers also names its class and version, with a leading underscore
        public = {name: value for name, value in config.items() if not name.startswith("_")}
        what = {"model": options.model, "config": public, "files": weight_files(options.checkpoint)}
    inputs = options.inputs
    if inputs is not None and (inputs.lstrip().startswith("{") or inputs.endswith(".json")):
        inputs = read_json(inputs, "--inputs")
    return what | {"inputs": inputs, "dtype": options.dtype, "seed": options.seed, "threads": options.threads}


def warm_page_cache(files: list[str]) -> int:
    """Read every file once, so that neither run pays for the disk; returns the number of bytes."""
    total = sum(os.path.getsize(file) for file in files)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="warming the page cache", leave=False, disable=None
    ) as progress:
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while chunk := opened.read(1 << 24):
                    progress.update(len(chunk))
    return total


def modes_that_fit(nbytes: int) -> list[str]:
    """All modes, or without ``plain`` where a whole copy of the weights would exhaust the machine."""
    available = psutil.virtual_memory().available
    if nbytes < 0.9 * available:
        return list(MODES)
    print(f"plain: left out; it needs {nbytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free.")
    return [mode for mode in MODES if mode != "plain"]


def compare(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Say whether two outputs agree in every bit, and whether that means anything."""
    found = differences(first, second)
    if found:
        print("\nThe outputs DIFFER: " + "; ".join(found))
        return False
    if not all(tensor.isfinite().all() for tensor in first if tensor.is_floating_point()):
        print("\nThe outputs are bit-identical, but not finite: that is no evidence of anything.")
        return False
    shapes = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in first)
    print(f"\nThe outputs are bit-identical ({shapes}).")
    return True


def main(argv: list[str]) -> int:
    options = arguments(argv)
    common = common_part(options)
    nbytes = warm_page_cache(common["files"])
    runs: list[Run] = []
    outputs: list[list[torch.Tensor]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for mode in modes_that_fit(nbytes):
            job = Job(mode=mode, output=os.path.join(scratch, f"{mode}.pt"), **common)
            runs.append(measure(job))
            outputs.append(torch.load(job.output, weights_only=True))
    size = f"{nbytes / 1e9:.2f} GB in {len(job.files)} files"
    title = f"{job.model.split(':')[1]}, {size}, one forward in {job.dtype}"
    print(f"\n{title},\ntorch {torch.__version__}, CPU, {job.threads} threads, warm page cache\n")
    print(table(runs))
    agree = len(outputs) == 1 or compare(*outputs)
    picture = options.picture or options.cache / "memory.png"
    draw(runs, title, picture)
    print(f"Memory over time: {picture}")
    return 0 if agree else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
