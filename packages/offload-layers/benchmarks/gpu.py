"""What does a user of a small card feel? Every figure of the accelerator path, in one run of a few minutes.

``python gpu.py`` measures floors first (the bus in both directions, matrix products), then a diffusion
transformer of some gigabytes at two token counts under limits from 2 GB to none, beside the plain model and
beside accelerate and diffusers where they are installed.

A row tells the seconds of a forward (median) and their ratio to the floor, which is the larger of computation
and bytes over bus, the most memory that torch had, and what the driver saw. ``!`` marks outputs that are not
those of the plain model. Needs diffusers; without an accelerator it says so and ends.
"""

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

GB = 10**9
LINE = "{:28} {:>7} {:>9} {:>9} {:>7} {:>10} {:>11} {:>9}"
CONFIG = {"num_layers": 14, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}


def seconds(device: torch.device, run: Callable[[], object], rounds: int) -> float:
    """Median seconds of *run*, the device waited for."""
    module = torch.get_device_module(device)
    taken = []
    for _ in range(rounds):
        module.synchronize()
        start = time.perf_counter()
        run()
        module.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def floors(device: torch.device) -> dict[str, float]:
    host = torch.empty(GB, dtype=torch.uint8, pin_memory=True)
    pageable = torch.zeros(GB // 4, dtype=torch.uint8)
    there = torch.empty(GB, dtype=torch.uint8, device=device)
    a = torch.randn(4096, 8192, device=device, dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    up = seconds(device, lambda: there.copy_(host, non_blocking=True), 5)
    down = seconds(device, lambda: host.copy_(there, non_blocking=True), 5)
    slow = seconds(device, lambda: there[: GB // 4].copy_(pageable), 5)
    product = seconds(device, lambda: a @ b, 20)
    return {
        "host_to_device_bytes_per_s": GB / up,
        "device_to_host_bytes_per_s": GB / down,
        "pageable_to_device_bytes_per_s": GB / 4 / slow,
        "bfloat16_flops": 2 * 4096 * 8192 * 8192 / product,
    }


def model_class() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel


def build(device: str = "cpu") -> nn.Module:
    """Real weights: zeros would make a card run cooler than it does in use."""
    with torch.device("meta"):
        model = model_class()(**CONFIG)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02, generator=generator)
    fresh = model_class()(**{**CONFIG, "num_layers": 1})  # its tables, which no checkpoint has
    model.pos_embed = fresh.pos_embed
    return model.eval().requires_grad_(False).to(device)  # type: ignore[no-any-return]


def inputs(tokens: int, device: torch.device) -> dict[str, Any]:
    side = int(tokens**0.5)
    generator = torch.Generator().manual_seed(0)
    text = 64
    return {
        "hidden_states": torch.randn(1, side * side, 64, generator=generator).to(device, torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, text, CONFIG["joint_attention_dim"], generator=generator).to(
            device, torch.bfloat16
        ),
        "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.bool, device=device),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16, device=device),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }


def ours(model: nn.Module, device: torch.device, limit: int | None, storage: torch.dtype | None) -> Any:
    import offload_layers

    vram = torch.get_device_module(device).mem_get_info(device)[1] if limit is None else limit
    handle = offload_layers.offload(
        model, device=device, vram=vram, ram=200 * GB, dtype=torch.bfloat16, storage_dtype=storage
    )
    return handle.model


def accelerate(model: nn.Module, device: torch.device) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=device)


def diffusers(model: nn.Module, device: torch.device, level: str) -> Any:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type=f"{level}_level",
        num_blocks_per_group=1 if level == "block" else None,
        use_stream=True,
    )
    return model


@torch.no_grad()
def measure(
    name: str,
    make: Callable[[nn.Module], Any],
    device: torch.device,
    tokens: int,
    limit: int | None,
    rates: Any,
) -> dict[str, Any]:
    module = torch.get_device_module(device)
    gc.collect()
    module.empty_cache()
    module.reset_peak_memory_stats()
    total = module.mem_get_info(device)[1]
    model = make(build())
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    arguments = inputs(tokens, device)
    for _ in range(3):  # the order is learned, and who stays is chosen
        output = model(**arguments)[0]
    forward_s = seconds(device, lambda: model(**arguments), 5)
    seen = total - module.mem_get_info(device)[0]
    resident = 0 if limit is None else min(nbytes, limit)
    return {
        "subject": name,
        "tokens": tokens,
        "limit_nbytes": limit,
        "forward_s": forward_s,
        "bus_floor_s": max(0, nbytes - resident) / rates["host_to_device_bytes_per_s"] if limit else 0.0,
        "peak_allocated_nbytes": module.max_memory_allocated(device),
        "driver_nbytes": seen,
        "output": output.float().cpu(),
    }


def subjects(device: torch.device) -> list[tuple[str, int | None, Callable[[nn.Module], Any]]]:
    fp8 = torch.float8_e4m3fn
    found: list[tuple[str, int | None, Callable[[nn.Module], Any]]] = [
        ("plain, resident", None, lambda m: m.to(device)),
        ("offload-layers, no limit", None, lambda m: ours(m, device, None, None)),
    ]
    for limit in (2, 4, 8):
        found.append(
            (f"offload-layers, {limit} GB", limit * GB, lambda m, n=limit: ours(m, device, n * GB, None))
        )
    found.append(("offload-layers, fp8, 4 GB", 4 * GB, lambda m: ours(m, device, 4 * GB, fp8)))
    found.append(("accelerate, cpu_offload", None, lambda m: accelerate(m, device)))
    for level in ("block", "leaf"):
        found.append((f"diffusers, {level}, stream", None, lambda m, n=level: diffusers(m, device, n)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    options = parser.parse_args()
    device = torch.device(options.device, 0)
    if not torch.get_device_module(device).is_available():
        sys.exit(f"torch {torch.__version__} sees no {options.device} device here; nothing was measured")
    rates = floors(device)
    print(json.dumps(rates, indent=1))
    print(
        LINE.format(
            "subject", "tokens", "forward s", "compute s", "/ floor", "limit GB", "peak GB", "driver GB"
        )
    )
    rows = []
    for tokens in options.tokens:
        plain_s, expected = 0.0, None
        for name, limit, make in subjects(device):
            try:
                row = measure(name, make, device, tokens, limit, rates)
            except (ImportError, torch.OutOfMemoryError) as error:
                print(
                    f"{name:28} {tokens:>7} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True
                )
                continue
            output = row.pop("output")
            if name == "plain, resident":
                plain_s, expected = row["forward_s"], output
            row["identical"] = expected is not None and bool(torch.equal(output, expected))
            floor = max(plain_s, row["bus_floor_s"]) or row["forward_s"]
            row["over_floor"] = row["forward_s"] / floor
            rows.append(row)
            cells = (
                f"{row['forward_s']:.3f}",
                f"{plain_s:.3f}",
                f"{row['over_floor']:.2f}" + ("" if row["identical"] else "!"),
                "-" if limit is None else f"{limit / GB:.0f}",
                f"{row['peak_allocated_nbytes'] / GB:.2f}",
                f"{row['driver_nbytes'] / GB:.2f}",
            )
            print(LINE.format(name, tokens, *cells), flush=True)
    if options.output:
        module = torch.get_device_module(device)
        machine = {
            "device": module.get_device_name(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        text = {"date": str(datetime.date.today()), "machine": machine, "floors": rates, "rows": rows}
        options.output.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
