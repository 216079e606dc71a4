"""The real DiffSynth-Studio by itself and on this distribution: seconds, memory, equality of results.

    python studio.py [--blocks 2] [--tokens 256] [--rounds 3] [--out results/NAME.json]

The model is Qwen-Image's transformer at its real width with a few blocks and random weights, loaded as a
pipeline loads it. Every measurement is a process of its own; the two sides take turns. Memory is what the
process holds beyond its imports. The page cache is warm.
"""

import argparse
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
from pathlib import Path
from typing import Any

STAND_INS = Path(__file__).parents[3] / "integration-tests" / "studio"
SIDES = ["alone", "routed"]
CONFIGURATIONS = ["no management", "in memory, 8 bits", "on disk"]


class AnonymousMemory:
    """The largest anonymous memory of this process while the ``with`` block lasts."""

    def __enter__(self) -> "AnonymousMemory":
        self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("this system does not tell the anonymous memory of a process")


def vram_config(name: str) -> dict[str, Any]:
    import torch

    half, eight = torch.bfloat16, torch.float8_e4m3fn
    config: dict[str, Any] = {"computation_dtype": half, "computation_device": "cpu"}
    where = {
        "no management": {"offload": (None, None), "onload": (half, "cpu"), "preparing": (half, "cpu")},
        "in memory, 8 bits": dict.fromkeys(("offload", "onload", "preparing"), (eight, "cpu")),
        "on disk": dict.fromkeys(("offload", "onload", "preparing"), ("disk", "disk")),
    }[name]
    for role, (dtype, device) in where.items():
        config[f"{role}_dtype"], config[f"{role}_device"] = dtype, device
    return config


def measure(side: str, configuration: str, path: str, blocks: int, tokens: int) -> dict[str, Any]:
    """Load the model and run it three times; this is what a child process does."""
    sys.path.insert(0, str(STAND_INS))
    import stand_ins  # noqa: F401

    if side == "routed":
        import diffsynth_core_vram

        diffsynth_core_vram.install()
    import torch
    from diffsynth.models.model_loader import ModelPool
    from diffsynth.pipelines.qwen_image import model_fn_qwen_image

    size = round(tokens**0.5) * 16
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(1, 16, size // 8, size // 8, generator=generator).bfloat16(),
        "prompt_emb": torch.randn(1, 16, 3584, generator=generator).bfloat16(),
        "prompt_emb_mask": torch.ones(1, 16, dtype=torch.long),
        "timestep": torch.tensor([500.0], dtype=torch.bfloat16),
    }
    with AnonymousMemory() as floor:
        pass
    with AnonymousMemory() as memory, torch.no_grad():
        begin = time.perf_counter()
        model = ModelPool().load_model_file(
            {
                "model_class": "diffsynth.models.qwen_image_dit.QwenImageDiT",
                "extra_kwargs": {"num_layers": blocks},
            },
            path,
            vram_config(configuration),
        )
        loaded = time.perf_counter() - begin
        for module in model.modules():
            if hasattr(module, "onload"):
                module.onload()
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            out = model_fn_qwen_image(dit=model, height=size, width=size, **inputs)
            seconds.append(time.perf_counter() - begin)
    return {
        "load_s": loaded,
        "first_forward_s": seconds[0],
        "forward_s": statistics.median(seconds[1:]),
        "peak_nbytes": memory.peak - floor.peak,
        "result": hashlib.sha256(out.view(torch.uint8).numpy().tobytes()).hexdigest(),
    }


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_model(path: Path, blocks: int) -> int:
    """Save a checkpoint with random weights; return its bytes."""
    code = (
        f"import sys; sys.path.insert(0, {str(STAND_INS)!r}); import stand_ins, torch\n"
        "from safetensors.torch import save_file\n"
        "from diffsynth.core import skip_model_initialization\n"
        "from diffsynth.models.qwen_image_dit import QwenImageDiT\n"
        f"with skip_model_initialization(): model = QwenImageDiT(num_layers={blocks})\n"
        "random = lambda t: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02)\n"
        f"save_file({{n: random(t) for n, t in model.state_dict().items()}}, {str(path)!r})\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stderr=subprocess.DEVNULL)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, configuration, path, blocks, tokens = options.child
        print(json.dumps(measure(side, configuration, path, int(blocks), int(tokens))))
        return

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        nbytes = write_model(path, options.blocks)
        rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for configuration in CONFIGURATIONS:
            found = rows[configuration] = {side: [] for side in SIDES}
            for _ in range(options.rounds):
                for side in SIDES:
                    args = (side, configuration, str(path), str(options.blocks), str(options.tokens))
                    found[side].append(child(*args))
    report = {
        "model_nbytes": nbytes,
        "options": {name: getattr(options, name) for name in ("blocks", "tokens", "rounds")},
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    print(f"model: {nbytes / 1e9:.2f} GB\n")
    print("| configuration | side | load s | first forward s | forward s | peak MB | equal |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for configuration, found in rows.items():
        for side, runs in found.items():
            middle = {k: statistics.median(run[k] for run in runs) for k in runs[0] if k != "result"}
            equal = "yes" if runs[0]["result"] == found["alone"][0]["result"] else "no"
            peak = middle["peak_nbytes"] / 1e6
            print(
                f"| {configuration} | {side} | {middle['load_s']:.2f} | {middle['first_forward_s']:.2f} "
                f"| {middle['forward_s']:.2f} | {peak:,.0f} | {equal} |"
            )
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
