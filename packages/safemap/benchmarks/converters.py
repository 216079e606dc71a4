"""What does a fused weight cost, read through a lazy converter and by hand?

``python converters.py`` writes a file of bfloat16 query, key and value matrices, and measures in alternation

* one name: the fused matrix, by a lazy converter, by reading three tensors and ``torch.cat``, and by reading
  them into parts of one tensor that exists already;
* all names: the same for every layer, the results being kept, against converting a state dict in memory.

Times are medians with a warm page cache; bytes are what the process read (``/proc/self/io``).
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safemap
import torch
from safemap import DiskMap, load_state_dict
from safemap._write import write_safetensors
from torch import Tensor

LINE = "{:34} {:>10} {:>9} {:>14} {:>9}"
Run = Callable[[], object]


def fuse(state_dict: dict[str, Any]) -> dict[str, Any]:
    fused = {}
    for name in state_dict:
        if name.endswith(".q"):
            fused[name + "kv"] = torch.cat([state_dict[name[:-1] + part] for part in "qkv"])
    return fused


def write(path: str, layers: int, width: int) -> None:
    names = [f"layers.{i}.{part}" for i in range(layers) for part in "qkv"]
    described = dict.fromkeys(names, (torch.bfloat16, (width, width)))
    write_safetensors(path, described, lambda name: torch.randn(width, width).bfloat16(), {})


def bytes_read() -> int:
    """Return what this process has asked the kernel for, from the page cache or not."""
    try:
        text = Path("/proc/self/io").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in text.splitlines())["rchar"])


def measure(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Run everything in alternation; a result is released before the next run."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    read: dict[str, int] = {}
    for number in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            before, start = bytes_read(), time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - start
            read[name] = bytes_read() - before
            if number:
                times[name].append(elapsed)
            del result
    return {
        name: {
            "median_s": statistics.median(found),
            "best_s": min(found),
            "worst_s": max(found),
            "read_bytes": read[name],
        }
        for name, found in times.items()
    }


def safe_open_by_hand(path: str) -> Callable[[str], Tensor] | None:
    with contextlib.suppress(ImportError):
        from safetensors import safe_open

        file = safe_open(path, "pt")
        return lambda layer: torch.cat([file.get_tensor(layer + part) for part in "qkv"])
    return None


def one_name(path: str, lazy: DiskMap, plain: DiskMap) -> dict[str, Run]:
    layer = "layers.1."
    out = torch.zeros_like(lazy[layer + "qkv"])
    parts = [out[i * len(out) // 3 : (i + 1) * len(out) // 3] for i in range(3)]
    runs: dict[str, Run] = {
        "three read_into, memory touched": lambda: [
            plain.read_into(layer + part, target) for part, target in zip("qkv", parts, strict=True)
        ],
        "lazy": lambda: lazy[layer + "qkv"],
        "lazy, read_into": lambda: lazy.read_into(layer + "qkv", out),
        "lazy, a tenth of the rows": lambda: lazy.slice(layer + "qkv")[: len(out) // 10],
        "by hand: DiskMap, cat": lambda: torch.cat([plain[layer + part] for part in "qkv"]),
    }
    by_hand = safe_open_by_hand(path)
    if by_hand is not None:
        runs["by hand: safe_open, cat"] = lambda: by_hand(layer)
    return runs


def all_names(path: str, lazy: DiskMap) -> dict[str, Run]:
    return {
        "lazy": lambda: [lazy[name] for name in lazy],
        "eager: load_state_dict, converter": lambda: fuse(load_state_dict(path)),
    }


def show(title: str, figures: dict[str, dict[str, float]]) -> None:
    print(LINE.format(title, "median ms", "best ms", "bytes read", "/ lazy"))
    base = figures["lazy"]["median_s"]
    for name, found in figures.items():
        print(
            LINE.format(
                name,
                f"{1e3 * found['median_s']:.2f}",
                f"{1e3 * found['best_s']:.2f}",
                f"{found['read_bytes']:,}",
                f"{found['median_s'] / base:.2f}",
            )
        )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        write(path, arguments.layers, arguments.width)
        with DiskMap(path) as plain:
            start = time.perf_counter()
            DiskMap(path, state_dict_converter=fuse).close()
            opening = {"first_s": time.perf_counter() - start}  # torch imports modules for it
            start, before = time.perf_counter(), bytes_read()
            lazy = DiskMap(path, state_dict_converter=fuse)
            opening["again_s"] = time.perf_counter() - start
            opening["read_bytes"] = bytes_read() - before
            figures = {
                "one name": measure(one_name(path, lazy, plain), arguments.rounds),
                "all names": measure(all_names(path, lazy), max(3, arguments.rounds // 3)),
            }
            lazy.close()
    print(
        f"opening with the converter: {1e3 * opening['first_s']:.1f} ms the first time in a process, "
        f"{1e3 * opening['again_s']:.1f} ms again, {opening['read_bytes']:,} bytes read\n"
    )
    for title, found in figures.items():
        show(title, found)
    if arguments.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "package": safemap.__name__}
        record = {"date": datetime.date.today().isoformat(), **versions, **machine, "argv": sys.argv[1:]}
        arguments.json.write_text(json.dumps({**record, "opening": opening, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
