"""How long, and how much memory, does the construction of a real model take: plainly, skipped, with peers?

Each contender runs in fresh processes, in turns, so that a noisy moment does not meet one of them only.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def qwen_image(**settings: Any) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return lambda: QwenImageTransformer2DModel(**settings)


def flux(**settings: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    return lambda: FluxTransformer2DModel(**settings)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen-image-20b": qwen_image,
    "flux-12b": lambda: flux(guidance_embeds=True),
    "qwen-image-1-layer": lambda: qwen_image(num_layers=1),  # 0.4 billion parameters: plain construction fits
}


def skipinit() -> AbstractContextManager[Any]:
    from skipinit import skip_model_initialization

    return skip_model_initialization()


def original() -> AbstractContextManager[Any]:
    """The original's context manager, from its file: importing diffsynth needs all that it depends on."""
    path = distribution("diffsynth").locate_file("diffsynth/core/vram/initialization.py")
    namespace: dict[str, Any] = {}
    exec(compile(Path(str(path)).read_text(), str(path), "exec"), namespace)
    made: AbstractContextManager[Any] = namespace["skip_model_initialization"]()
    return made


def accelerate() -> AbstractContextManager[Any]:
    from accelerate import init_empty_weights

    return init_empty_weights()


def meta_device() -> AbstractContextManager[Any]:
    import torch

    return torch.device("meta")


class Floor:
    """The same constructors with factories, initialization and registration reduced to Python objects."""

    def __enter__(self) -> None:
        import torch
        from torch import nn

        tensor = torch.empty(1, 1, device="meta")
        self.saved: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, name: str, value: Any) -> None:
            self.saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

        for name in ("empty", "zeros", "ones", "rand", "randn"):
            patch(torch, name, lambda *args, **kwargs: tensor)
        for name in (
            "kaiming_uniform_",
            "uniform_",
            "normal_",
            "ones_",
            "zeros_",
            "constant_",
            "trunc_normal_",
        ):
            patch(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        for layer in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding):
            patch(layer, "reset_parameters", lambda self: None)
        patch(
            nn.Module,
            "register_parameter",
            lambda self, name, value: self._parameters.__setitem__(name, value),
        )

    def __exit__(self, *error: object) -> None:
        for owner, name, value in reversed(self.saved):
            setattr(owner, name, value)


def dispatch() -> AbstractContextManager[Any]:
    """The least that a function mode can do: no value is kept, nothing is checked, no buffer is right."""
    import torch
    from torch import nn
    from torch.overrides import TorchFunctionMode

    factories = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}
    initializers = {getattr(nn.init, name) for name in ("kaiming_uniform_", "uniform_", "normal_", "zeros_")}
    empty, meta = torch.empty, torch.device("meta")

    class Dispatch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in factories:
                return empty(*args, **{**(kwargs or {}), "device": meta})
            if function in initializers:
                return args[0] if args else kwargs["tensor"]
            return function(*args, **kwargs) if kwargs else function(*args)

    mode: AbstractContextManager[Any] = Dispatch()
    return mode


CONTENDERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "floor": Floor,
    "dispatch": dispatch,
    "skipinit": skipinit,
    "original": original,
    "accelerate": accelerate,
    "meta-device": meta_device,
    "plain": nullcontext,
}


def resident(field: str) -> int | None:
    """Bytes of this process's memory: VmRSS (now) or VmHWM (peak); None where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(contender: str, model: str, repeats: int) -> dict[str, Any]:
    """In this process: the first construction and the warm ones, seconds and peak extra bytes."""
    build, enter = MODELS[model](), CONTENDERS[contender]
    enter()  # its imports are not its construction time
    seconds, cpu_seconds, peaks = [], [], []
    parameters = 0
    for _ in range(1 + repeats):
        gc.collect()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = resident("VmRSS")
        start, cpu_start = time.perf_counter(), time.process_time()
        with enter():
            built = build()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        peak = resident("VmHWM")
        if before is not None and peak is not None:
            peaks.append(peak - before)
        parameters = len(list(built.parameters()))
        del built
    return {
        "parameters": parameters,
        "first_s": seconds[0],
        "warm_s": seconds[1:],
        "warm_cpu_s": cpu_seconds[1:],
        "first_peak_extra_bytes": peaks[0] if peaks else None,
        "warm_peak_extra_bytes": max(peaks[1:], default=None),
    }


def in_fresh_process(contender: str, model: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", contender, model, str(repeats)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # waking idle threads costs more than small tensors do
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "accelerate", "diffsynth", "skipinit"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def compare(models: list[str], rounds: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        contenders = [c for c in CONTENDERS if c != "plain" or model.endswith("1-layer")]
        runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
        for _ in range(rounds):
            for contender in contenders:
                runs[contender].append(
                    in_fresh_process(contender, model, repeats if contender != "plain" else 1)
                )
        for contender, measured in runs.items():
            warm = sorted(s for run in measured for s in run["warm_s"])
            peaks = [
                run["first_peak_extra_bytes"] for run in measured if run["first_peak_extra_bytes"] is not None
            ]
            rows.append(
                {
                    "model": model,
                    "contender": contender,
                    "parameters": measured[0]["parameters"],
                    "first_median_s": statistics.median(run["first_s"] for run in measured),
                    "warm_median_s": statistics.median(warm),
                    "warm_cpu_median_s": statistics.median(s for run in measured for s in run["warm_cpu_s"]),
                    "warm_min_s": warm[0],
                    "warm_max_s": warm[-1],
                    "peak_extra_bytes": max(peaks, default=None),
                }
            )
    return rows


COLUMNS = {
    "first ms": "first_median_s",
    "warm ms": "warm_median_s",
    "CPU ms": "warm_cpu_median_s",
    "min ms": "warm_min_s",
    "max ms": "warm_max_s",
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'model':20}{'contender':14}" + "".join(f"{c:>10}" for c in (*COLUMNS, "peak MB", "x ours"))]
    ours = {row["model"]: row["warm_median_s"] for row in rows if row["contender"] == "skipinit"}
    for row in rows:
        times = "".join(f"{1e3 * row[key]:10.1f}" for key in COLUMNS.values())
        peak = "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 1e6:.1f}"
        ratio = row["warm_median_s"] / ours[row["model"]]
        lines.append(f"{row['model']:20}{row['contender']:14}{times}{peak:>10}{ratio:10.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each contender")
    parser.add_argument("--repeats", type=int, default=7, help="warm constructions in each process")
    parser.add_argument("--save", action="store_true", help="write the rows to results/")
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "MODEL", "REPEATS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        contender, model, repeats = options.one
        print(json.dumps(measure(contender, model, int(repeats))))
        return
    rows = compare(options.models, options.rounds, options.repeats)
    print(table(rows))
    if options.save:
        now = datetime.now(timezone.utc)
        machine = f"{platform.machine()}-{os.cpu_count()}-cores"
        report = {
            "date": now.isoformat(timespec="seconds"),
            "machine": machine,
            "versions": versions(),
            "rows": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        which = f"-{options.models[0]}" if len(options.models) == 1 else ""
        path = RESULTS / f"{now:%Y-%m-%d}-{machine}{which}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {path.name}")


if __name__ == "__main__":
    main()
