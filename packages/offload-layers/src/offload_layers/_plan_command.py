"""``offload-layers plan``: what a checkpoint's weights would take on this machine, before they are loaded."""

import argparse
import json
from typing import Any

import torch

from offload_layers._device import default_device
from offload_layers._errors import ConfigError
from offload_layers._offload import plan


def add_plan(commands: Any) -> None:
    """Add the command to argparse's *commands*."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="say where the weights of a checkpoint would be, and how long a forward would take",
        description="Read the headers of a checkpoint and say where its weights would be, and how long a "
        "forward would take. Nothing is loaded.",
    )
    parser.add_argument("files", nargs="+", help="safetensors files, or folders of them")
    parser.add_argument("--device", default=str(default_device()))
    parser.add_argument("--vram", default="auto", help='memory of the device, such as "8GB" (default: auto)')
    parser.add_argument("--ram", default="auto", help='memory of the host, such as "16GB" (default: auto)')
    parser.add_argument("--dtype", help="dtype to compute in, such as bfloat16 (default: as stored)")
    parser.add_argument("--storage-dtype", help="dtype in host memory, such as float8_e4m3fn")
    parser.add_argument(
        "--rows",
        type=int,
        default=4096,
        help="rows of a layer's input, such as tokens (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every layer")
    parser.add_argument("--plot", metavar="FILE", help="also draw where the weights are (needs matplotlib)")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """Print the plan."""
    planned = plan(
        options.files,
        device=options.device,
        vram=options.vram,
        ram=options.ram,
        dtype=_dtype(options.dtype, "--dtype"),
        storage_dtype=_dtype(options.storage_dtype, "--storage-dtype"),
        rows=options.rows,
    )
    if options.plot:
        planned.plot(options.plot)
    print(json.dumps(planned.to_dict(), indent=1) if options.json else planned)
    return 0


def _dtype(name: str | None, option: str) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{option} {name} is no dtype of torch; write bfloat16, float16, float8_e4m3fn ...")
    return dtype
