"""Compare safemap with its peers in paired rounds; see README.md in this folder."""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs
import peers
import system
import torch

BASELINE = "DiffSynth DiskMap"


def measure_memory(folder: Path, gigabytes: float) -> list[dict[str, Any]]:
    """Peak memory over five sweeps, each contender in a process of its own."""
    rows = []
    for peer in peers.LAZY:
        command = [sys.executable, __file__, "--memory-of", peer, "--folder", str(folder)]
        run = subprocess.run([*command, "--gigabytes", str(gigabytes)], capture_output=True, text=True)
        if run.returncode:
            print(f"    {peer}: {run.stderr.strip().splitlines()[-1][:200]}")
            continue
        rows.append({"peer": peer, **json.loads(run.stdout)})
        print(f"    {peer:<22} anonymous {rows[-1]['anonymous']:>14,}  mapped {rows[-1]['mapped']:>14,}")
    return rows


def memory_of(peer: str, folder: Path, gigabytes: float) -> dict[str, Any]:
    """Sweep five times, one tensor alive at a time; return the highest memory above that before opening."""
    import checkpoints

    paths = checkpoints.dit(folder, gigabytes)
    names = list(checkpoints.names_in_file_order(paths))
    torch.ones(10).sum()
    before = system.memory()
    after_sweep = []
    anonymous = mapped = largest = 0
    with peers.LAZY[peer](paths) as get:
        for _ in range(5):
            for name in names:
                tensor = get(name)
                now = system.memory()
                anonymous, mapped = max(anonymous, now[0] - before[0]), max(mapped, now[1] - before[1])
                largest = max(largest, tensor.nbytes)
                del tensor
            after_sweep.append(system.memory()[0] - before[0])
    return {"anonymous": anonymous, "mapped": mapped, "largest": largest, "after_each_sweep": after_sweep}


def summary(samples: list[jobs.Sample]) -> list[dict[str, Any]]:
    """One row for each case and contender; the ratio is the median of the ratios within each round."""
    times: dict[tuple[str, str], list[float]] = {}
    sizes = {}
    for case, peer, seconds, nbytes in samples:
        times.setdefault((case, peer), []).append(seconds)
        sizes[case] = nbytes
    rows = []
    for (case, peer), seconds in times.items():
        if any(map(math.isnan, seconds)):
            continue
        base = times.get((case, BASELINE), [])
        ratios = [b / s for b, s in zip(base, seconds, strict=False) if not math.isnan(b)]
        median = statistics.median(seconds)
        rows.append(
            {
                **{"case": case, "peer": peer, "seconds": seconds, "median": median, "nbytes": sizes[case]},
                **{"bytes_per_s": sizes[case] / median if sizes[case] else None},
                "over_baseline": statistics.median(ratios) if ratios else None,
            }
        )
    return sorted(rows, key=lambda row: (list(sizes).index(row["case"]), row["median"]))


def show(rows: list[dict[str, Any]]) -> None:
    case = None
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            print(f"  {case}")
        rate = f"{row['bytes_per_s'] / 1e9:7.2f} GB/s" if row["bytes_per_s"] else " " * 12
        ratio = f"{row['over_baseline']:6.2f}x" if row["over_baseline"] else ""
        print(f"    {row['peer']:<22} {row['median'] * 1e6:>14,.1f} us {rate} {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "safemap-benchmarks")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the sharded checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", nargs="*", default=[*jobs.JOBS, "memory"], choices=[*jobs.JOBS, "memory"])
    parser.add_argument("--output", type=Path, help="JSON file for the results; one that exists is added to")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, options.folder, options.gigabytes)))
        return
    result: dict[str, Any] = {
        "system": system.description(),
        "versions": peers.versions(),
        "options": {"gigabytes": options.gigabytes, "rounds": options.rounds, "threads": options.threads},
        "jobs": {},
    }
    for name in options.jobs:
        print(name)
        if name == "memory":
            result["jobs"][name] = measure_memory(options.folder, options.gigabytes)
            continue
        job = jobs.JOBS[name](options.folder, options.gigabytes)
        list(job.rounds(0))  # the first round makes files and loads libraries
        rounds = 2 if name == "sweep-cold" else options.rounds
        samples = [sample for number in range(1, rounds + 1) for sample in job.rounds(number)]
        result["jobs"][name] = summary(samples)
        show(result["jobs"][name])
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        if options.output.exists():
            result["jobs"] = json.loads(options.output.read_text())["jobs"] | result["jobs"]
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
