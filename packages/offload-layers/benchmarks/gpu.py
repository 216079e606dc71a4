"""What does a user of a small card feel? Every figure of the accelerator path, in one run of a few minutes.

``python gpu.py`` measures floors first (the bus in both directions, matrix products), then a diffusion
transformer of some gigabytes at two token counts under limits from 2 GB to none, beside the plain model and
beside DiffSynth-Studio, accelerate and diffusers where they are installed.

A row tells the seconds of a forward (median) and their ratio to the floor, which is the larger of computation
and bytes over bus, the most memory that tensors and other programs had, and what the driver saw. ``!`` marks
outputs that are not those of the plain model, as those of weights kept in eight bits must be, and ``?`` those
that were not compared, as the plain model did not fit. Weights of "locked" come from a source and wait in
page-locked memory; those of "own" belong to the model alone and are moved there in the third forward; those
of the other rows are shared by all rows and stay where they are. The peak is that of the forwards that are
timed, "at first" that of the three before them, in which a model is learned. ``mallocs`` is how often torch
asked the driver for memory while it was timed: 0 if what has passed through is used again.
Weights "from disk" are in the page cache, one gigabyte of them may be in host memory. "Predicted" is what a
plan on the same inputs says beforehand.

Needs diffusers and safemap; without an accelerator it says so and ends.
The options ``--device cpu --layers 1 --heads 1 --tokens 16`` try the script itself.
"""

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from disk_offload import diffsynth_layers, module_map
from torch import nn

GB = 10**9
LINE = "{:30} {:>7} {:>9} {:>9} {:>7} {:>8} {:>11} {:>8} {:>9} {:>12} {:>9} {:>7}"
CONFIG: dict[str, int] = {
    "num_layers": 14,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
}
HALF, EIGHT = torch.bfloat16, torch.float8_e4m3fn
LIMITS = (2, 4, 8)  # GB


class Subject(NamedTuple):
    """What is measured.

    Attributes:
        name: In the table.
        stays_nbytes: What need not cross the bus in a forward; None: all may stay.
        make: Manages a plain model.
        bits: Of an element that crosses the bus.
        owns: Whether nobody else has the weights of the plain model.
        limit_nbytes: Of the device's memory; None: no limit.
    """

    name: str
    stays_nbytes: int | None
    make: "Make"
    bits: int = 16
    owns: bool = False

    @property
    def limit_nbytes(self) -> int | None:
        return self.stays_nbytes or None


class Driver:
    """What torch tells of a device; zeros for a CPU, of whose memory it tells nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = torch.get_device_module(device)
        self.has_memory = device.type != "cpu"

    def synchronize(self) -> None:
        if self.has_memory:
            self.module.synchronize(self.device)

    def forget(self) -> None:
        gc.collect()
        if self.has_memory:
            self.module.empty_cache()

    def free_and_total(self) -> tuple[int, int]:
        return self.module.mem_get_info(self.device) if self.has_memory else (0, 0)

    def forget_peak(self) -> None:
        if self.has_memory:
            self.module.reset_peak_memory_stats(self.device)

    def mallocs(self) -> int | None:
        """How often torch has asked the driver for memory, where it tells."""
        stats = self.module.memory_stats(self.device) if self.has_memory else {}
        return stats.get("num_device_alloc")  # type: ignore[no-any-return]

    def peak(self) -> int:
        """Bytes that tensors took at most, with what others have now: a limit counts both."""
        if not self.has_memory:
            return 0
        free, total = self.free_and_total()
        others = total - free - self.module.memory_reserved(self.device)
        return int(self.module.max_memory_allocated(self.device) + others)

    def name(self) -> str:
        return str(self.module.get_device_name(self.device)) if self.has_memory else platform.processor()


def seconds(driver: Driver, run: Callable[[], object], rounds: int) -> float:
    """Median seconds of *run*, the device waited for."""
    taken = []
    for _ in range(rounds):
        driver.synchronize()
        start = time.perf_counter()
        run()
        driver.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def floors(driver: Driver) -> dict[str, float]:
    nbytes, width = (GB, 8192) if driver.has_memory else (GB // 100, 256)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=driver.has_memory)
    pageable = torch.zeros(nbytes // 4, dtype=torch.uint8)
    there = torch.empty(nbytes, dtype=torch.uint8, device=driver.device)
    a = torch.randn(width // 2, width, device=driver.device, dtype=HALF)
    b = torch.randn(width, width, device=driver.device, dtype=HALF)
    up = seconds(driver, lambda: there.copy_(host, non_blocking=True), 5)
    down = seconds(driver, lambda: host.copy_(there, non_blocking=True), 5)
    slow = seconds(driver, lambda: there[: nbytes // 4].copy_(pageable), 5)
    product = seconds(driver, lambda: a @ b, 20)
    return {
        "host_to_device_bytes_per_s": nbytes / up,
        "device_to_host_bytes_per_s": nbytes / down,
        "pageable_to_device_bytes_per_s": nbytes / 4 / slow,
        "bfloat16_flops": 2 * (width // 2) * width * width / product,
    }


def model_class() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel


def skeleton() -> nn.Module:
    from skipinit import skip_model_initialization

    with skip_model_initialization():
        model = model_class()(**CONFIG)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def make_weights(device: torch.device) -> dict[str, torch.Tensor]:
    """Values in host memory, made on the device: zeros would make a card run cooler than it does in use."""
    generator = torch.Generator(device).manual_seed(0)

    def values(parameter: torch.Tensor) -> torch.Tensor:
        made = torch.empty(parameter.shape, dtype=HALF, device=device)
        return made.normal_(0, 0.02, generator=generator).cpu()

    return {name: values(parameter) for name, parameter in skeleton().named_parameters()}


def write(weights: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, file)


def build(weights: dict[str, torch.Tensor]) -> nn.Module:
    model = skeleton()
    model.load_state_dict(weights, assign=True, strict=False)
    return model


def inputs(tokens: int, device: torch.device) -> dict[str, Any]:
    side = int(tokens**0.5)
    generator = torch.Generator().manual_seed(0)
    text = 64
    images = torch.randn(1, side * side, 64, generator=generator)
    texts = torch.randn(1, text, CONFIG["joint_attention_dim"], generator=generator)
    return {
        "hidden_states": images.to(device, HALF),
        "encoder_hidden_states": texts.to(device, HALF),
        "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.bool, device=device),
        "timestep": torch.tensor([0.5], dtype=HALF, device=device),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }


Inputs = dict[str, Any]
Make = Callable[[nn.Module, Inputs], Any]


def ours(device: torch.device, limit: int | None, storage: torch.dtype | None = None) -> Make:
    def make(model: nn.Module, arguments: Inputs) -> Any:
        import offload_layers

        vram = "auto" if limit is None else limit
        return offload_layers.offload(
            model,
            device=device,
            vram=vram,
            ram="auto",
            dtype=HALF,
            storage_dtype=storage,
            inputs=arguments,
        )

    return make


def from_source(device: torch.device, limit: int, file: Path, ram: int | str) -> Make:
    def make(model: nn.Module, arguments: Inputs) -> Any:
        import offload_layers
        from safemap import DiskMap

        return offload_layers.offload(
            skeleton(),
            device=device,
            vram=limit,
            ram=ram,
            source=DiskMap(file),
            dtype=HALF,
            inputs=arguments,
        )

    return make


def diffsynth(device: torch.device, limit: int) -> Make:
    def make(model: nn.Module, arguments: Inputs) -> Any:
        layers = diffsynth_layers()
        own = (layers.AutoWrappedLinear, layers.AutoWrappedModule, layers.AutoWrappedNonRecurseModule)
        config: dict[str, Any] = {
            f"{role}_dtype": HALF for role in ("offload", "onload", "preparing", "computation")
        }
        config |= {"offload_device": "cpu", "onload_device": "cpu"}
        config |= {"preparing_device": str(device), "computation_device": str(device)}
        managed = layers.enable_vram_management(model, module_map(*own, of=skeleton()), config, limit / 2**30)
        for layer in managed.modules():
            if hasattr(layer, "onload"):
                layer.onload()
        return managed

    return make


def accelerate(device: torch.device) -> Make:
    def make(model: nn.Module, arguments: Inputs) -> Any:
        from accelerate import cpu_offload

        return cpu_offload(model, execution_device=device)

    return make


def diffusers(device: torch.device, level: str) -> Make:
    def make(model: nn.Module, arguments: Inputs) -> Any:
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            model,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type=f"{level}_level",
            num_blocks_per_group=1 if level == "block" else None,
            use_stream=device.type != "cpu",
        )
        return model

    return make


def subjects(device: torch.device, file: Path) -> list[Subject]:
    found = [
        Subject("plain, resident", None, lambda model, _: model.to(device)),
        Subject("offload-layers, all free memory", None, ours(device, None)),
    ]
    found += [Subject(f"offload-layers, {n} GB", n * GB, ours(device, n * GB)) for n in LIMITS]
    found.append(Subject("offload-layers, locked, 4 GB", 4 * GB, from_source(device, 4 * GB, file, "auto")))
    found.append(Subject("offload-layers, own, 4 GB", 4 * GB, ours(device, 4 * GB), owns=True))
    found.append(Subject("offload-layers, fp8, 4 GB", 4 * GB, ours(device, 4 * GB, EIGHT), bits=8))
    found.append(Subject("offload-layers, from disk, 4 GB", 4 * GB, from_source(device, 4 * GB, file, GB)))
    if device.type != "cpu":  # its limit asks the driver
        found += [Subject(f"DiffSynth-Studio, {n} GB", n * GB, diffsynth(device, n * GB)) for n in LIMITS]
    found.append(Subject("accelerate, cpu_offload", 0, accelerate(device)))
    found += [Subject(f"diffusers, {x}, stream", 0, diffusers(device, x)) for x in ("block", "leaf")]
    return found


@torch.no_grad()
def measure(
    subject: Subject, weights: dict[str, torch.Tensor], driver: Driver, tokens: int, bus: float
) -> dict[str, Any]:
    driver.forget()
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    arguments = inputs(tokens, driver.device)
    its = {name: tensor.clone() for name, tensor in weights.items()} if subject.owns else weights
    plain = build(its)
    del its
    model = subject.make(plain, arguments)
    plan = getattr(model, "plan", None)
    predicted_s = None if plan is None else plan.predict().total_s
    predicted_nbytes = None if plan is None else plan.peak_device_nbytes + plan.work.activations_nbytes
    driver.forget_peak()
    for _ in range(3):  # the order is learned, and who stays is chosen
        output = model(**arguments)[0]
    first_peak = driver.peak()
    driver.forget_peak()
    mallocs = driver.mallocs()
    forward_s = seconds(driver, lambda: model(**arguments), 5)
    free, total = driver.free_and_total()
    stays, after = subject.stays_nbytes, driver.mallocs()
    crossing = 0 if stays is None else max(0, nbytes * subject.bits // 16 - stays)
    return {
        "tokens": tokens,
        "limit_nbytes": subject.limit_nbytes,
        "forward_s": forward_s,
        "bus_floor_s": crossing / bus,
        "peak_allocated_nbytes": driver.peak(),
        "first_peak_allocated_nbytes": first_peak,
        "predicted_s": predicted_s,
        "predicted_peak_nbytes": predicted_nbytes,
        "driver_nbytes": total - free,
        "mallocs": None if after is None or mallocs is None else after - mallocs,
        "output": output.float().cpu(),
    }


def measure_all(
    tokens_of_rows: list[int],
    driver: Driver,
    weights: dict[str, torch.Tensor],
    file: Path,
    rates: dict[str, float],
    end: float,
) -> list[dict[str, Any]]:
    """Measure and show every row that is begun before *end*."""
    rows = []
    for tokens in tokens_of_rows:
        plain_s, expected = 0.0, None
        for subject in subjects(driver.device, file):
            name, limit = subject.name, subject.limit_nbytes
            if time.perf_counter() > end:
                print(f"{name:30} {tokens:>7} left out: the time is up", flush=True)
                continue
            try:
                row = measure(subject, weights, driver, tokens, rates["host_to_device_bytes_per_s"])
            except Exception as error:  # of peers that are not installed, or want what is not there
                reason = str(error).partition("\n")[0]
                print(f"{name:30} {tokens:>7} {type(error).__name__}: {reason}", flush=True)
                continue
            output = row.pop("output")
            if name == "plain, resident":
                plain_s, expected = row["forward_s"], output
            row["subject"] = name
            row["identical"] = None if expected is None else bool(torch.equal(output, expected))
            floor = max(plain_s, row["bus_floor_s"]) or row["forward_s"]
            row["over_floor"] = row["forward_s"] / floor
            rows.append(row)
            cells = (
                f"{row['forward_s']:.3f}",
                f"{plain_s:.3f}",
                f"{row['over_floor']:.2f}" + {True: "", False: "!", None: "?"}[row["identical"]],
                "-" if limit is None else f"{limit / GB:.0f}",
                "-" if row["predicted_s"] is None else f"{row['predicted_s']:.3f}",
                f"{row['peak_allocated_nbytes'] / GB:.2f}",
                f"{row['first_peak_allocated_nbytes'] / GB:.2f}",
                "-" if row["predicted_s"] is None else f"{row['predicted_peak_nbytes'] / GB:.2f}",
                f"{row['driver_nbytes'] / GB:.2f}",
                "-" if row["mallocs"] is None else str(row["mallocs"]),
            )
            print(LINE.format(name, tokens, *cells), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--layers", type=int, default=14, help="of the model, 680 MB each with 24 heads")
    parser.add_argument("--heads", type=int, default=24, help="of each layer")
    parser.add_argument("--seconds", type=float, default=280.0, help="after which no row is begun")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    options = parser.parse_args()
    CONFIG.update(num_layers=options.layers, num_attention_heads=options.heads)
    end = time.perf_counter() + options.seconds
    device = torch.device(options.device)
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, 0)
    if not torch.get_device_module(device).is_available():
        sys.exit(f"torch {torch.__version__} sees no {options.device} device here; nothing was measured")
    driver = Driver(device)
    rates = floors(driver)
    print(json.dumps(rates, indent=1))
    print(
        LINE.format(
            "subject",
            "tokens",
            "forward s",
            "plain s",
            "/ floor",
            "limit GB",
            "predicted s",
            "peak GB",
            "at first",
            "predicted GB",
            "driver GB",
            "mallocs",
        )
    )
    weights = make_weights(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        write(weights, file)
        rows = measure_all(options.tokens, driver, weights, file, rates, end)
    if options.output:
        machine = {
            "device": driver.name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        text = {"date": str(datetime.date.today()), "machine": machine, "floors": rates, "rows": rows}
        options.output.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
