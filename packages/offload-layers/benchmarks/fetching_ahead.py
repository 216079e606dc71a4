"""Is it worth converting the weights of the next layers on a CPU while a layer computes?

    python fetching_ahead.py [--width 2048] [--layers 8] [--rounds 9] [--out results/NAME.json]

Linear layers whose weights wait in memory in eight bits: one model fetches ahead, another one converts each
layer when it is called. Both have the same weights and take turns in one process, since shared machines
drift.
"""

import argparse
import json
import os
import platform
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from offload_layers import (
    AutoWrappedLinear,
    enable_vram_management,
    enable_vram_management_recursively,
)
from torch import nn

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENS = (8, 256)
FORWARDS = 2  # timed after one that is not: the first after a change of models is slower


def stack(width: int, layers: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [(width, 4 * width), (4 * width, width)] * (layers // 2)
    return nn.Sequential(*(nn.Linear(*size, dtype=dtype) for size in sizes)).requires_grad_(False)


def models(width: int, layers: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    config: dict[str, Any] = {"computation_dtype": dtype, "computation_device": "cpu"}
    for role in ("offload", "onload", "preparing"):
        config |= {f"{role}_dtype": torch.float8_e4m3fn, f"{role}_device": "cpu"}
    ahead, alone = stack(width, layers, dtype), stack(width, layers, dtype)
    enable_vram_management(ahead, {nn.Linear: AutoWrappedLinear}, config)
    # layers without a schedule know no other layer
    enable_vram_management_recursively(alone, {nn.Linear: AutoWrappedLinear}, config)
    return {"ahead": ahead, "alone": alone}


@torch.no_grad()
def measure(pair: dict[str, nn.Module], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    assert torch.equal(pair["ahead"](x), pair["alone"](x))
    for turn in range(rounds):
        for name in list(pair)[:: 1 if turn % 2 else -1]:
            pair[name](x)
            for _ in range(FORWARDS):
                begin = time.perf_counter()
                pair[name](x)
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    print(
        "| dtype | tokens | ahead: fastest, median s | called: fastest, median s |\n| --- | --- | --- | --- |"
    )
    for (name, dtype), tokens in product(DTYPES.items(), TOKENS):
        x = torch.randn(tokens, options.width, generator=torch.Generator().manual_seed(0)).to(dtype)
        seconds = measure(models(options.width, options.layers, dtype), x, options.rounds)
        rows.append({"dtype": name, "tokens": tokens, "forward_s": seconds})
        cells = [f"{min(times):.3f}, {median(times):.3f}" for times in seconds.values()]
        print("|", " | ".join([name, str(tokens), *cells]), "|", flush=True)
    if options.out:
        report = {
            "options": {name: getattr(options, name) for name in ("width", "layers", "rounds")},
            "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
            "versions": {"torch": torch.__version__},
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
