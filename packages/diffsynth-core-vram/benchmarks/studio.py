"""The real DiffSynth-Studio by itself and on this distribution: seconds, memory, equality of results.

    python studio.py [--blocks 2] [--tokens 256] [--rounds 3] [--dtype float32] [--out results/NAME.json]

The model is Qwen-Image's transformer at its real width with a few blocks and random weights, loaded as a
pipeline loads it. Every measurement is a process of its own; the sides take turns, and each round begins with
another one. Memory is what the process holds beyond its imports. The page cache is warm.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

STAND_INS = Path(__file__).parents[3] / "integration-tests" / "studio"
#: the plain model is the floor, and the oracle
SIDES = ["plain", "alone", "routed"]
CONFIGURATIONS = {
    "no management": "none",
    "in memory": "cpu offload",
    "in memory, 8 bits": "fp8 storage",
    "on disk": "disk, preparing",
    "on disk, nothing kept": "disk",
    "on disk, a limit of 0": "disk",
    "on disk, half of it in memory": "dynamic limit",
    "on disk, then in memory": "disk, memory",
}
KINDS = {"anonymous": "RssAnon:", "mapped": "RssFile:"}
PACKAGES = ["torch", "diffsynth", "safetensors"]


def held() -> dict[str, int]:
    """Bytes of this process, by the kind of memory that holds them."""
    status = dict(line.split("\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(status[key].split()[0]) * 1024 for kind, key in KINDS.items()}


class Memory:
    """The most memory of each kind that this process holds while the ``with`` block lasts."""

    def __enter__(self) -> "Memory":
        gc.collect()
        self.peak = held()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        now = held()
        self.peak = {kind: max(most, now[kind]) for kind, most in self.peak.items()}

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._look()


def load(side: str, configuration: str, path: str, blocks: int, dtype: Any) -> Any:
    from configurations import CONFIGURATIONS as STUDIO
    from configurations import limit_of
    from diffsynth.models.model_loader import ModelPool

    if side == "plain":
        from diffsynth.models.qwen_image_dit import QwenImageDiT
        from safetensors.torch import load_file
        from skipinit import skip_model_initialization

        with skip_model_initialization():
            model = QwenImageDiT(num_layers=blocks)
        # copies: products of mapped weights, which lie less aligned, differ in the last bits
        model.load_state_dict({name: t.clone() for name, t in load_file(path).items()}, assign=True)
        return model.eval()
    what = {
        "model_class": "diffsynth.models.qwen_image_dit.QwenImageDiT",
        "extra_kwargs": {"num_layers": blocks},
    }
    name = CONFIGURATIONS[configuration]
    config, limit = STUDIO[name](dtype), limit_of(name, Path(path).stat().st_size)
    if configuration == "on disk, nothing kept":
        config, limit = config | {"preparing_dtype": "disk", "preparing_device": "disk"}, None
    return ModelPool().load_model_file(what, path, config, vram_limit=limit)


def measure(
    side: str, configuration: str, path: str, blocks: int, tokens: int, dtype_name: str
) -> dict[str, Any]:
    """Load the model and run it; this is what a child process does."""
    sys.path.insert(0, str(STAND_INS))
    import stand_ins  # noqa: F401

    if side == "routed":
        import diffsynth_core_vram

        diffsynth_core_vram.install()
    import torch
    from diffsynth.pipelines.qwen_image import model_fn_qwen_image

    dtype = getattr(torch, dtype_name)
    size = round(tokens**0.5) * 16
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(1, 16, size // 8, size // 8, generator=generator).to(dtype),
        "prompt_emb": torch.randn(1, 16, 3584, generator=generator).to(dtype),
        "prompt_emb_mask": torch.ones(1, 16, dtype=torch.long),
        "timestep": torch.tensor([500.0], dtype=dtype),
    }
    torch.mm(torch.ones(256, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype))  # its threads and buffers
    before = held()
    with torch.no_grad():
        begin = time.perf_counter()
        with Memory() as loading:
            model = load(side, configuration, path, blocks, dtype)
        loaded = time.perf_counter() - begin
        for module in model.modules():
            if hasattr(module, "onload"):
                module.onload()
        seconds = []
        with Memory() as running:
            for _ in range(4):
                begin = time.perf_counter()
                out = model_fn_qwen_image(dit=model, height=size, width=size, **inputs)
                seconds.append(time.perf_counter() - begin)
    return {
        "load_s": loaded,
        "first_forward_s": seconds[0],
        "forward_s": statistics.median(seconds[1:]),
        "load_peak_nbytes": {kind: most - before[kind] for kind, most in loading.peak.items()},
        "forward_peak_nbytes": {kind: most - before[kind] for kind, most in running.peak.items()},
        "result": hashlib.sha256(out.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
    }


def child(*arguments: str) -> dict[str, Any]:
    """Measure in a process of its own; ``{"error": its last line}`` if that fails."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_model(path: Path, blocks: int, dtype: str) -> int:
    """Save a checkpoint with random weights; return its bytes."""
    code = (
        f"import sys; sys.path.insert(0, {str(STAND_INS)!r}); import stand_ins, torch\n"
        "from safetensors.torch import save_file\n"
        "from skipinit import skip_model_initialization\n"
        "from diffsynth.models.qwen_image_dit import QwenImageDiT\n"
        f"with skip_model_initialization(): model = QwenImageDiT(num_layers={blocks})\n"
        f"random = lambda t: torch.empty(t.shape, dtype=torch.{dtype}).normal_(std=0.02)\n"
        f"save_file({{n: random(t) for n, t in model.state_dict().items()}}, {str(path)!r})\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    return path.stat().st_size


def row(configuration: str, side: str, runs: list[dict[str, Any]], expected: str | None) -> str:
    failed = next((run["error"] for run in runs if "error" in run), None)
    if failed is not None:
        return f"| {configuration} | {side} | fails: {failed[:80]} |"

    def middle(*keys: str) -> float:
        values = []
        for run in runs:
            value: Any = run
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    phases = ("load", "forward")
    peaks = [f"{middle(f'{phase}_peak_nbytes', kind) / 1e6:,.0f}" for phase in phases for kind in KINDS]
    times = [f"{middle(f'{what}_s'):.2f}" for what in ("load", "first_forward", "forward")]
    equal = "yes" if all(run["result"] == expected for run in runs) else "no"
    return "| " + " | ".join([configuration, side, *times, *peaks, equal]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights")
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, configuration, path, blocks, tokens, dtype = options.child
        print(json.dumps(measure(side, configuration, path, int(blocks), int(tokens), dtype)))
        return

    header = "configuration | side | load s | first forward s | forward s"
    peaks = " | ".join(f"{phase}: {kind} MB" for phase in ("load", "forward") for kind in KINDS)
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        nbytes = write_model(file, options.blocks, options.dtype)
        print(f"model: {nbytes / 1e9:.2f} GB, {options.dtype}\n")
        print(f"| {header} | {peaks} | equal |")
        print("| --- " * (header.count("|") + peaks.count("|") + 3) + "|")
        common = (str(file), str(options.blocks), str(options.tokens), options.dtype)
        expected = None
        for configuration in options.configurations:
            found = rows[configuration] = {side: [] for side in SIDES}
            for turn in range(options.rounds):
                for side in SIDES[turn % 3 :] + SIDES[: turn % 3]:
                    found[side].append(child(side, configuration, *common))
            if "8 bits" not in configuration:
                expected = found["plain"][0].get("result", expected)
            for side, runs in found.items():
                oracle = found["alone"][0].get("result") if "8 bits" in configuration else expected
                print(row(configuration, side, runs, oracle), flush=True)
    report = {
        "model_nbytes": nbytes,
        "options": {name: getattr(options, name) for name in ("blocks", "tokens", "rounds", "dtype")},
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
