"""How well does a plan predict what a forward takes, in seconds and in memory?

``python prediction.py`` makes a checkpoint, plans a forward on given inputs, runs it within the same memory
on the CPU, and puts fact beside prediction, as the medians of several of each that take turns, since machines
change their speed. What is predicted from headers and a number of rows alone is put beside both. Needs
diffusers, safemap and skipinit.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from disk_offload import (
    ROOM,
    TOKENS,
    PeakOfAnonymous,
    files,
    forget,
    inputs,
    make_checkpoint,
    memory,
    model_class,
    second_of_two,
    skeleton,
    use,
)
from offload_layers import Plan, Rates, offload, plan
from offload_layers._budget import budget_of
from owned_memory import owned_memory, use_free_memory
from safemap import DiskMap

LINE = "{:>8} {:>9} {:>11} {:>9} {:>7} {:>8} {:>12} {:>9} {:>7}"
SHARES = (1.1, 0.5, 0.1)  # of the model's bytes


@torch.no_grad()
def measure(folder: Path, share: float, tokens: str, rounds: int) -> dict[str, Any]:
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    ram = int(share * nbytes)
    side, text = TOKENS[tokens]

    model = skeleton()
    arguments = inputs(model, tokens)
    handle = offload(model, device="cpu", ram=ram, source=DiskMap(files(folder)))
    before = memory()["RssAnon"]
    by_rows, predictions, taken = [], [], []
    peak = 0
    for _ in range(2):
        handle(**arguments)  # the order is learned, and who stays is chosen
    for _ in range(rounds):
        use_free_memory()  # at once: a system that takes it back does so within seconds
        rough = plan(files(folder), device="cpu", ram=ram, rows=side * side + text)
        source = DiskMap(files(folder))
        exact = plan(skeleton(), device="cpu", ram=ram, source=source, inputs=arguments, rates=rough.rates)
        by_rows.append(rough)
        predictions.append(exact)
        use_free_memory()
        # the plan is for weights that come from the disk
        taken.append(second_of_two(lambda: handle(**arguments), before=lambda: forget(folder)))
        with PeakOfAnonymous() as sampled:
            handle(**arguments)
        peak = max(peak, sampled.peak)
    first = predictions[0]
    return {
        "ram_nbytes": ram,
        "tokens": tokens,
        "predicted_s": _median_s(predictions),
        "predictions_s": sorted(_seconds(predictions)),
        "predicted_by_rows_s": _median_s(by_rows),
        "forward_s": statistics.median(taken),
        "forwards_s": sorted(taken),
        "predicted_peak_nbytes": first.peak_device_nbytes,
        "peak_nbytes": budget_of(torch.device("cpu")).statistics().peak_nbytes,
        "peak_anonymous_nbytes": peak - before,
        "rates": [prediction.to_dict()["rates"] for prediction in predictions],
        "prediction": [prediction.to_dict()["prediction"] for prediction in predictions],
        "predicted_activations_nbytes": first.to_dict()["activations_nbytes"],
    }


def _seconds(plans: Sequence[Plan]) -> list[float]:
    return [prediction.total_s for made in plans if (prediction := made.predict()) is not None]


def _median_s(plans: Sequence[Plan]) -> float:
    return statistics.median(_seconds(plans))


def seconds_to_plan(folder: Path) -> dict[str, float]:
    """How long a plan for all of Qwen-Image takes, from headers alone, with given rates and with a probe."""
    from skipinit import skip_model_initialization

    with skip_model_initialization():
        model = model_class()()
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + parameter.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / "headers.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a hole: it takes no space on the disk
    rates, taken = Rates(2e9, 10e9, 10e9, 1e12), []
    for _ in range(5):
        start_s = time.perf_counter()
        planned = plan(path, device="cpu", ram="16GB", rates=rates)
        taken.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    plan(path, device="cpu", ram="16GB")
    probed = time.perf_counter() - start_s
    path.unlink()
    return {
        "parameters": float(sum(layer.size.numel for layer in planned.layers)),
        "plan_s": statistics.median(taken),
        "plan_with_probe_s": probed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept (default: temporary)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="forwards, and predictions (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights")
    parser.add_argument("--tokens", nargs="+", default=list(TOKENS), choices=TOKENS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    use(getattr(torch, options.dtype))
    if options.measure:
        folder, share, tokens = options.measure
        print(json.dumps(measure(Path(folder), float(share), tokens, options.rounds)))
        return
    with tempfile.TemporaryDirectory() as scratch, owned_memory(ROOM):
        planning = seconds_to_plan(Path(scratch))
        print(", ".join(f"{name} {value:.3g}" for name, value in planning.items()))
        folder = options.folder or Path(scratch)
        make_checkpoint(folder)
        rows = []
        print(
            LINE.format(
                "tokens",
                "ram MB",
                "predicted s",
                "forward s",
                "error",
                "by rows",
                "predicted MB",
                "peak MB",
                "error",
            )
        )
        for share in SHARES:
            for tokens in options.tokens:
                # each in a process of its own, whose books begin at zero
                arguments = ["--measure", str(folder), str(share), tokens, "--rounds", str(options.rounds)]
                arguments += ["--threads", str(options.threads), "--dtype", options.dtype]
                command = [sys.executable, __file__, *arguments]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row = json.loads(run.stdout.strip().splitlines()[-1])
                rows.append(row)
                cells = (
                    f"{row['ram_nbytes'] / 1e6:.0f}",
                    f"{row['predicted_s']:.3f}",
                    f"{row['forward_s']:.3f}",
                    f"{row['predicted_s'] / row['forward_s'] - 1:+.0%}",
                    f"{row['predicted_by_rows_s'] / row['forward_s'] - 1:+.0%}",
                    f"{row['predicted_peak_nbytes'] / 1e6:.0f}",
                    f"{row['peak_nbytes'] / 1e6:.0f}",
                    f"{row['predicted_peak_nbytes'] / row['peak_nbytes'] - 1:+.0%}",
                )
                print(LINE.format(tokens, *cells), flush=True)
    if options.output:
        machine: dict[str, Any] = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        text = {
            "date": str(datetime.date.today()),
            "machine": machine,
            "threads": options.threads,
            "dtype": options.dtype,
            "planning": planning,
            "rows": rows,
        }
        options.output.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    model_class()
    main()
